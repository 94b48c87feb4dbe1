"""Seeded sampling: each response has its own random stream and depends on no other."""

import argparse
import signal
from dataclasses import replace

import pytest
import torch
from conftest import load_model, make_bpe_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apo import sampling
from apo.cli import InputError, raise_interrupt
from apo.generation import BrokenOff, Decoding
from apo.prompts import Prompt
from apo.sampling import (
    GumbelNoise,
    LocalEngine,
    load_llm,
    load_tokenizer,
    sampling_steps,
    tokenize,
)

DECODING = Decoding(num_samples=1, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=8)
QUERIES = [
    "Why?",
    "How do bees find their way home in the rain?",
    "What is it?",
    "Tell me more about the sea, please.",
]


@pytest.fixture(scope="module")
def llm(base_llama):
    tokenizer = load_tokenizer(str(base_llama), "plain")
    return load_llm(str(base_llama), "float32", tokenizer), tokenizer


def new_engine(path, batch_size: int = 1, **changes) -> LocalEngine:
    """An engine for `QUERIES`, with changes of `DECODING`."""
    rendered = {Prompt("", str(i), query): query for i, query in enumerate(QUERIES)}
    flags = {"model_name_or_path": str(path), "prompt_template": "plain", "dtype": "float32", "seed": 1}
    flags |= {"max_length": 64, "per_device_eval_batch_size": batch_size}
    config, decoding = AutoConfig.from_pretrained(path), replace(DECODING, **changes)
    return LocalEngine(rendered, config, decoding, argparse.Namespace(**flags))


def continue_prompts(llm, token_ids, seeds, *, stop_string: str = "\nHuman", **changes) -> list[str]:
    model, tokenizer = llm
    engine = new_engine(tokenizer.name_or_path, **changes)
    engine.stop_strings = (stop_string,)
    return engine.continue_prompts(model, token_ids, seeds)


def test_argmax_with_noise_is_a_draw():
    """Probabilities 0.5, 0.3, 0.2, none: of 4,000 draws 2000, 1200, 800, 0, within four standard deviations."""
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(4000, 4)
    draws = GumbelNoise(list(range(4000)), torch.device("cpu"))(None, logits).argmax(-1)
    counts = torch.bincount(draws, minlength=4)
    assert abs(counts[0] - 2000) < 130 and abs(counts[1] - 1200) < 120 and counts[3] == 0


def test_noise_of_a_row_depends_on_its_seed_and_step_only():
    logits = torch.zeros(3, 50)
    steps = GumbelNoise([1, 2, 1], torch.device("cpu"))
    first, second = steps(None, logits), steps(None, logits)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(GumbelNoise([2], torch.device("cpu"))(None, logits[:1]), first[1:2])


def test_steps_have_the_order_of_transformers():
    names = [type(step).__name__ for step in sampling_steps(replace(DECODING, top_k=5, top_p=0.9), [1], "cpu")]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "GumbelNoise"]
    assert len(sampling_steps(replace(DECODING, temperature=0, top_k=5), [1], "cpu")) == 0
    assert len(sampling_steps(replace(DECODING, repetition_penalty=1.1), [1], "cpu")) == 3


@pytest.mark.parametrize("change", [{}, {"repetition_penalty": 1.5, "top_k": 20, "top_p": 0.9}])
def test_a_response_does_not_depend_on_its_batch(llm, change):
    """Not on other rows, padding or its place; the repetition penalty does not see the padding."""
    token_ids = tokenize(llm[1], QUERIES, "plain", 64)
    alone = [continue_prompts(llm, [ids], [seed], **change)[0] for seed, ids in enumerate(token_ids)]
    assert continue_prompts(llm, token_ids, [0, 1, 2, 3], **change) == alone
    assert continue_prompts(llm, token_ids[::-1], [3, 2, 1, 0], **change) == alone[::-1]
    assert len(set(alone)) == 4


def test_responses_depend_on_seeds_and_not_on_the_global_state(llm):
    ids = tokenize(llm[1], QUERIES[:1], "plain", 64)
    torch.manual_seed(1)
    first = continue_prompts(llm, ids * 3, [1, 2, 1])
    torch.manual_seed(2)
    assert continue_prompts(llm, ids * 3, [1, 2, 1]) == first
    assert first[0] == first[2] != first[1]
    assert continue_prompts(llm, ids, [1, 2, 1], num_samples=3) == first


def test_temperature_0_is_greedy(llm):
    ids = tokenize(llm[1], QUERIES[:1], "plain", 64)
    greedy = llm[0].generate(torch.tensor(ids), max_new_tokens=8)[0, len(ids[0]) :]
    expected = [llm[1].decode(greedy, skip_special_tokens=True)]
    assert continue_prompts(llm, ids, [1], temperature=0) == expected
    assert continue_prompts(llm, ids, [1], top_k=1) == expected


def test_only_end_tokens_are_read_from_generation_config(base_llama, llm, tmp_path):
    """Chat models ship a generation_config.json with a temperature and a penalty."""
    model = AutoModelForCausalLM.from_pretrained(base_llama)
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=9.0, eos_token_id=[2, 5]
    )
    model.save_pretrained(tmp_path)
    llm[1].save_pretrained(tmp_path)
    loaded = load_llm(str(tmp_path), "float32", llm[1])
    assert loaded.generation_config.eos_token_id == [2, 5] and loaded.generation_config.pad_token_id == 2
    ids = tokenize(llm[1], QUERIES, "plain", 64)
    expected = continue_prompts(llm, ids, [0, 1, 2, 3], max_new_tokens=4)
    assert continue_prompts((loaded, llm[1]), ids, [0, 1, 2, 3], max_new_tokens=4) == expected


def test_an_end_token_of_id_0_is_kept(base_llama, llm, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_llama)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path)
    assert load_llm(str(tmp_path), "float32", llm[1]).generation_config.eos_token_id == 0


def test_a_prompt_of_one_token_has_responses(llm):
    assert len(continue_prompts(llm, [[1], [1]], [1, 2])) == 2


def test_a_response_stops_at_a_stop_string_and_is_the_same_up_to_it(llm):
    """The stop string is what one of four responses holds; only this one ends there, and nothing before changes."""
    ids = tokenize(llm[1], QUERIES, "plain", 64)
    whole = continue_prompts(llm, ids, [0, 1, 2, 3], max_new_tokens=24)
    stop_string = whole[1][10:14]
    cut = continue_prompts(llm, ids, [0, 1, 2, 3], max_new_tokens=24, stop_string=stop_string)
    assert len(cut[1]) < len(whole[1])
    for short, long in zip(cut, whole, strict=True):
        assert short == long if stop_string not in long else short.split(stop_string)[0] == long.split(stop_string)[0]


def test_a_response_breaks_off_only_at_the_largest_number_of_tokens(llm, monkeypatch):
    """Four responses of 24 tokens, of which some hold a stop string; then any token is the end."""
    ids = tokenize(llm[1], QUERIES, "plain", 64)
    whole = continue_prompts(llm, ids, [0, 1, 2, 3], max_new_tokens=24)
    assert all(isinstance(text, BrokenOff) for text in whole)
    stop_string = whole[1][10:14]
    stopped = continue_prompts(llm, ids, [0, 1, 2, 3], max_new_tokens=24, stop_string=stop_string)
    assert [isinstance(text, BrokenOff) for text in stopped] == [stop_string not in text for text in whole]
    monkeypatch.setattr(llm[0].generation_config, "eos_token_id", list(range(llm[0].config.vocab_size)))
    ended = continue_prompts(llm, ids, [0, 1, 2, 3], max_new_tokens=1)
    assert not any(isinstance(text, BrokenOff) for text in ended)


@pytest.fixture
def make_engine(base_llama, monkeypatch):
    """An engine in process `rank` of `world`."""

    def make(batch_size: int, rank: int = 0, world: int = 1) -> LocalEngine:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return new_engine(base_llama, batch_size, num_samples=2)

    return make


def run(engine: LocalEngine, prompts: list[Prompt]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    engine.generate(prompts, lambda prompt, responses: texts.update({prompt.query_id: responses}))
    return texts


def test_responses_depend_neither_on_batches_nor_on_processes(make_engine):
    whole = make_engine(3)
    texts = run(whole, whole.share)
    assert list(texts) == ["1", "3", "2", "0"] and all(len(set(responses)) == 2 for responses in texts.values())
    engines = [make_engine(1, rank, 3) for rank in range(3)]
    assert {key: value for engine in engines for key, value in run(engine, engine.share).items()} == texts
    assert whole.settings == engines[0].settings
    some = whole.share[1:3]
    assert run(whole, some) == {prompt.query_id: texts[prompt.query_id] for prompt in some}


def test_without_prompts_no_model_is_loaded(make_engine, monkeypatch):
    monkeypatch.setattr(sampling, "load_llm", None)
    assert run(make_engine(1, 4, 5), []) == {}


def test_batches_hold_prompts_of_similar_length(make_engine):
    assert [[prompt.query_id for prompt in batch] for batch in make_engine(3).batches] == [["1", "3", "2"], ["0"]]


def test_long_prompts_keep_bos_and_their_last_tokens(llm, caplog):
    [whole] = tokenize(llm[1], QUERIES[1:2], "plain", 64)
    [cut] = tokenize(llm[1], QUERIES[1:2], "plain", 5)
    assert cut == [llm[1].bos_token_id, *whole[-4:]]
    assert "1 of 1 prompts cut to their last 5 tokens" in caplog.text
    assert tokenize(llm[1], QUERIES[1:2], "plain", len(whole)) == [whole]


def test_chat_template_is_the_tokenizers_own():
    tokenizer = make_bpe_tokenizer(["<|bos|>", "<|eos|>"])
    tokenizer.chat_template = "<|bos|>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    [ids] = tokenize(tokenizer, [[{"role": "user", "content": "Why?"}]], "chat", 64)
    assert tokenizer.decode(ids) == "<|bos|>[user]Why?[assistant]" and ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(InputError, match=r"chat template refuses a prompt \(no system message\)"):
        tokenize(tokenizer, [[{"role": "system", "content": "Be kind."}]], "chat", 64)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_that_does_not_end_or_fails_is_one_line(template, monkeypatch, capfd):
    """Also where SIGTERM, which ends the process of the template, is handled."""
    monkeypatch.setattr(sampling, "TEMPLATE_SECONDS", 1)
    before = signal.signal(signal.SIGTERM, raise_interrupt)
    tokenizer = make_bpe_tokenizer(["<|bos|>", "<|eos|>"])
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"template refuses a prompt \((TimeoutError|division by zero)\), .* 1 s"):
        tokenize(tokenizer, [[{"role": "user", "content": "Why?"}]], "chat", 64)
    signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == ""


def test_llama_2_chat_turns_hold_bos_and_eos(base_llama):
    tokenizer = AutoTokenizer.from_pretrained(base_llama)
    [ids] = tokenize(tokenizer, ["[INST] a [/INST] b </s><s>[INST] c [/INST]"], "llama-2-chat", 64)
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1


def test_a_missing_chat_template_is_named(base_llama):
    with pytest.raises(InputError, match="found no chat template in the tokenizer; --prompt_template plain"):
        load_tokenizer(str(base_llama), "chat")


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}'])
def test_a_broken_tokenizer_is_one_line(base_llama, tmp_path, content):
    (tmp_path / "config.json").write_bytes((base_llama / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="no usable tokenizer") as caught:
        load_tokenizer(str(tmp_path), "plain")
    assert "\n" not in str(caught.value)


def test_an_error_without_message_is_named(monkeypatch):
    def fail(path: str, **options: bool) -> None:
        raise ValueError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(InputError, match=r"no usable tokenizer \(ValueError\)"):
        load_tokenizer("somewhere", "plain")


def test_a_reward_model_is_refused(base_llama, llm, tmp_path):
    model, _ = load_model(base_llama)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks weights \(lm_head.weight\); expected a complete language model"):
        load_llm(str(tmp_path), "float32", llm[1])
