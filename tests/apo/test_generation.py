"""Decoding, seeds, and the run that generates the responses of a file."""

import os
import threading
from collections import Counter

import pytest
from conftest import read_json

from apo.cli import InputError
from apo.generation import BrokenOff, derive_seed, generate_responses
from apo.prompts import Prompt
from apo.resume import ResultStore

PROMPTS = [Prompt(f"record {i + 1}", str(i), f"prompt {i}") for i in range(4)]
FIELDS = ["sample_0", "sample_1"]


class FakeEngine:
    """Keeps two texts for each prompt in a thread of its own; skips `refused` ids."""

    def __init__(self, refused: str = "", share: list[Prompt] = PROMPTS) -> None:
        self.settings, self.notes, self.share, self.refused = {}, {}, share, refused
        self.stop_strings = ("\nHuman",)
        self.missing = Counter(empty=len(refused))
        self.seen: list[str] = []

    def generate(self, prompts, keep) -> None:
        self.seen = [prompt.query_id for prompt in prompts]
        for prompt in prompts:
            if prompt.query_id not in self.refused:
                thread = threading.Thread(target=keep, args=(prompt, [f"{prompt.query_id} \nHuman: And?", "x"]))
                thread.start()
                thread.join()


def generate(folder, engine, prompts=PROMPTS, seed=1, may_miss=True):
    store = ResultStore(folder / "r.json", {"seed": seed})
    return generate_responses(store, prompts, engine, FIELDS, may_miss=may_miss)


def test_seed_of_a_response_depends_on_all_three():
    seeds = {derive_seed(seed, query_id, n) for seed in (1, 2) for query_id in ("1", "11") for n in (1, 11)}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(42, "a", 0) == derive_seed(42, "a", 0)


def test_records_hold_trimmed_responses_in_the_order_of_the_prompts(tmp_path, caplog):
    caplog.set_level("INFO")
    records = generate(tmp_path, FakeEngine())
    assert records == read_json(tmp_path / "r.json")
    assert records[3] == {"query_id": "3", "query": "prompt 3", "sample_0": " 3", "sample_1": " x"}
    assert [record["query_id"] for record in records] == list("0123")
    assert "4 responses cut where they continue as the user" in caplog.text
    engine = FakeEngine()
    assert generate(tmp_path, engine) == records and engine.seen == []


def test_second_run_into_the_same_file_is_refused(tmp_path):
    """The engine of the first run starts the second one, whose settings are others."""
    engine = FakeEngine()
    engine.generate = lambda prompts, keep: generate(tmp_path, FakeEngine(), seed=2)
    with pytest.raises(InputError, match=rf"found {tmp_path}/r.rank0.lock, held by process {os.getpid()} on "):
        generate(tmp_path, engine)
    generate(tmp_path, FakeEngine())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.settings.json"]


def test_refused_and_changed_prompts_are_the_only_ones_generated_again(tmp_path, caplog):
    before = generate(tmp_path, FakeEngine("2"))
    assert [record["query_id"] for record in before] == list("013")
    assert "1 prompts without a response (1 empty), the same command asks again; left out: 2" in caplog.text
    changed = [PROMPTS[3], Prompt("", "1", "changed"), PROMPTS[2]]
    engine = FakeEngine(share=changed)
    after = generate(tmp_path, engine, changed)
    assert engine.seen == ["1", "2"] and [record["query_id"] for record in after] == list("312")
    assert after[0] == before[2]


def test_no_response_at_all_is_an_error(tmp_path):
    engine = FakeEngine("0123")
    engine.missing = Counter(refusal=3, empty=1)
    with pytest.raises(InputError, match=r"4 prompts without a response \(1 empty, 3 refusal\)"):
        generate(tmp_path, engine)


def test_a_result_that_lacks_prompts_is_written_and_an_error_unless_allowed(tmp_path):
    with pytest.raises(InputError, match="1 of 4 prompts have no response"):
        generate(tmp_path, FakeEngine("2"), may_miss=False)
    assert len(read_json(tmp_path / "r.json")) == 3
    assert len(generate(tmp_path, FakeEngine("2"), may_miss=True)) == 3


def test_responses_that_break_off_are_listed_also_after_a_kill_and_a_second_run(tmp_path):
    """The first run is killed after its first prompt, the second one responds to two more, the third to the last."""

    class BreakingEngine(FakeEngine):
        def generate(self, prompts, keep) -> None:
            for prompt in prompts:
                keep(prompt, [BrokenOff(" and"), f"{prompt.query_id}."])
                if self.refused == "kill":
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, BreakingEngine("kill"))
    generate(tmp_path, FakeEngine("2"))
    assert read_json(tmp_path / "r.settings.json")["broken_off"] == ["0:sample_0"]
    records = generate(tmp_path, BreakingEngine())
    assert records[2]["sample_0"] == " and"
    assert read_json(tmp_path / "r.settings.json")["broken_off"] == ["0:sample_0", "2:sample_0"]


def test_finished_responses_are_those_kept_and_those_of_the_result(tmp_path):
    generate(tmp_path, FakeEngine("2"))
    store = ResultStore(tmp_path / "r.json", {"seed": 1})
    store.append(PROMPTS[2].key, [" new", ""])
    engine = FakeEngine()
    records = generate(tmp_path, engine)
    assert [record["sample_0"] for record in records] == [" 0", " 1", " new", " 3"] and engine.seen == []
