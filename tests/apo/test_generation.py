"""Decoding, seeds, and the run that generates the responses of a file."""

import threading
from dataclasses import replace

import pytest
from conftest import read_json

from apo.cli import InputError
from apo.generation import Decoding, default_decoding, derive_seed, generate_responses, make_records
from apo.prompts import Prompt
from apo.resume import ResultStore

PROMPTS = [Prompt(f"record {i + 1}", str(i), f"prompt {i}") for i in range(4)]


class FakeEngine:
    """Keeps two texts for each prompt in a thread of its own; skips `refused` ids."""

    def __init__(self, refused: str = "", share: list[Prompt] = PROMPTS) -> None:
        self.settings, self.notes, self.share, self.refused = {}, {}, share, refused
        self.seen: list[str] = []

    def generate(self, prompts, keep) -> None:
        self.seen = [prompt.query_id for prompt in prompts]
        for prompt in prompts:
            if prompt.query_id not in self.refused:
                thread = threading.Thread(target=keep, args=(prompt, [f"{prompt.query_id} \nHuman: And?", "x"]))
                thread.start()
                thread.join()


def generate(folder, engine, prompts=PROMPTS, **options):
    store = ResultStore(folder / "r.json", {"seed": 1})
    options = {"fields": ["sample_0", "sample_1"], "stop_strings": ("\nHuman",), **options}
    return generate_responses(store, prompts, engine, **options)


def test_seed_of_a_response_depends_on_all_three():
    seeds = {derive_seed(seed, query_id, n) for seed in (1, 2) for query_id in ("1", "11") for n in (1, 11)}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(42, "a", 0) == derive_seed(42, "a", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "--num_samples 0: expected at least 1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 0.0}, "--temperature 0 --num_samples 4: expected 1"),
        ({"top_p": 0.0}, "--top_p 0.0: expected more than 0"),
        ({"top_k": -1}, "--top_k -1"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
    ],
)
def test_decoding_that_cannot_work_is_refused(change, message):
    decoding = Decoding(4, 1.0, 0, 1.0, 1.0, 8)
    decoding.check()
    with pytest.raises(InputError, match=message):
        replace(decoding, **change).check()


def test_llama_2_chat_samples_at_a_temperature_of_its_own():
    assert default_decoding("sampling", "plain") == Decoding(4, 1.2, 50, 1.0, 1.0, 256)
    assert default_decoding("sampling", "llama-2-chat") == Decoding(4, 0.6, 50, 0.9, 1.0, 256)
    assert default_decoding("testing", "llama-2-chat") == Decoding(1, 0.3, 5, 0.85, 1.05, 512)


def test_records_hold_trimmed_responses_in_the_order_of_the_prompts(tmp_path, caplog):
    caplog.set_level("INFO")
    records = generate(tmp_path, FakeEngine())
    assert records == read_json(tmp_path / "r.json")
    assert records[3] == {"query_id": "3", "query": "prompt 3", "sample_0": " 3", "sample_1": " x"}
    assert [record["query_id"] for record in records] == list("0123")
    assert "4 responses cut where they continue as the user" in caplog.text
    assert generate(tmp_path, FakeEngine()) is None and "already exists" in caplog.text


def test_refused_and_changed_prompts_are_the_only_ones_generated_again(tmp_path, caplog):
    before = generate(tmp_path, FakeEngine("2"))
    assert [record["query_id"] for record in before] == list("013")
    assert "1 prompts refused by the server, left out: 2; the same command retries them" in caplog.text
    changed = [PROMPTS[3], Prompt("", "1", "changed"), PROMPTS[2]]
    engine = FakeEngine(share=changed)
    after = generate(tmp_path, engine, changed)
    assert engine.seen == ["1", "2"] and [record["query_id"] for record in after] == list("312")
    assert after[0] == before[2]


def test_all_prompts_refused_is_an_error():
    with pytest.raises(InputError, match="refused all 4 prompts"):
        make_records(PROMPTS, {}, ["golden"])


def test_confirm_sees_what_is_left_and_ends_the_run(tmp_path):
    generate(tmp_path, FakeEngine("2"))
    before = sorted(path.name for path in tmp_path.iterdir())
    seen = []
    assert generate(tmp_path, None, confirm=lambda todo: seen.extend(todo.values())) is None
    assert seen == [PROMPTS[2]] and sorted(path.name for path in tmp_path.iterdir()) == before
