"""Seeded sampling: each response from its own random stream, whatever stands beside it."""

from dataclasses import replace

import pytest
import torch
from conftest import load_model, make_bpe_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from apo.cli import InputError
from apo.prompts import Decoding, Prompt
from apo.sampling import (
    GumbelNoise,
    UserTurn,
    check_positions,
    form_batches,
    generate,
    load_llm,
    load_tokenizer,
    sample_batches,
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
STOP_STRINGS = ("\nHuman",)


@pytest.fixture(scope="module")
def llm(base_llama):
    tokenizer = load_tokenizer(str(base_llama), "plain")
    return load_llm(str(base_llama), "float32", tokenizer), tokenizer


def continue_prompts(llm, token_ids: list[list[int]], seeds: list[int], **options) -> list[str]:
    return generate(*llm, token_ids=token_ids, seeds=seeds, **options)


def test_noise_makes_the_argmax_a_draw():
    """Probabilities 0.5, 0.3, 0.2, none: of 4,000 draws 2000, 1200, 800, 0, give or take four standard deviations."""
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


def test_steps_come_in_the_order_of_transformers():
    names = [type(step).__name__ for step in sampling_steps(replace(DECODING, top_k=5, top_p=0.9), [1], "cpu")]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "GumbelNoise"]
    assert len(sampling_steps(replace(DECODING, temperature=0, top_k=5), [1], "cpu")) == 0
    assert len(sampling_steps(replace(DECODING, repetition_penalty=1.1), [1], "cpu")) == 3


@pytest.mark.parametrize("change", [{}, {"repetition_penalty": 1.5, "top_k": 20, "top_p": 0.9}])
def test_a_response_does_not_depend_on_its_batch(llm, change):
    """Not on the rows beside it, the padding they bring, or its place; the penalty does not see the padding."""
    token_ids = tokenize(llm[1], QUERIES, "plain", 64)
    options = {"decoding": replace(DECODING, **change), "stop_strings": STOP_STRINGS}
    alone = [continue_prompts(llm, [ids], [seed], **options)[0] for seed, ids in enumerate(token_ids)]
    assert continue_prompts(llm, token_ids, [0, 1, 2, 3], **options) == alone
    assert continue_prompts(llm, token_ids[::-1], [3, 2, 1, 0], **options) == alone[::-1]
    assert len(set(alone)) == 4


def test_seeds_make_responses_and_the_global_state_does_not(llm):
    ids = tokenize(llm[1], QUERIES[:1], "plain", 64)
    options = {"decoding": DECODING, "stop_strings": STOP_STRINGS}
    torch.manual_seed(1)
    first = continue_prompts(llm, ids * 3, [1, 2, 1], **options)
    torch.manual_seed(2)
    assert continue_prompts(llm, ids * 3, [1, 2, 1], **options) == first
    assert first[0] == first[2] != first[1]
    assert continue_prompts(llm, ids, [1, 2, 1], **options | {"decoding": replace(DECODING, num_samples=3)}) == first


def test_temperature_0_is_greedy(llm):
    ids = tokenize(llm[1], QUERIES[:1], "plain", 64)
    greedy = llm[0].generate(torch.tensor(ids), max_new_tokens=8)[0, len(ids[0]) :]
    options = {"decoding": replace(DECODING, temperature=0), "stop_strings": STOP_STRINGS}
    assert continue_prompts(llm, ids, [1], **options) == [llm[1].decode(greedy, skip_special_tokens=True)]
    options["decoding"] = replace(DECODING, top_k=1)
    assert continue_prompts(llm, ids, [1], **options) == [llm[1].decode(greedy, skip_special_tokens=True)]


def test_decoding_is_not_left_to_the_checkpoint(base_llama, llm, tmp_path):
    """A generation_config.json that samples coldly and penalises, as chat models ship, changes nothing but eos."""
    model = AutoModelForCausalLM.from_pretrained(base_llama)
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=9.0, eos_token_id=[2, 5]
    )
    model.save_pretrained(tmp_path)
    llm[1].save_pretrained(tmp_path)
    loaded = load_llm(str(tmp_path), "float32", llm[1])
    assert loaded.generation_config.eos_token_id == [2, 5] and loaded.generation_config.pad_token_id == 2
    ids = tokenize(llm[1], QUERIES, "plain", 64)
    options = {"decoding": replace(DECODING, max_new_tokens=4), "stop_strings": STOP_STRINGS}
    assert continue_prompts((loaded, llm[1]), ids, [0, 1, 2, 3], **options) == continue_prompts(
        llm, ids, [0, 1, 2, 3], **options
    )


def test_an_end_token_of_id_0_is_kept(base_llama, llm, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_llama)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path)
    assert load_llm(str(tmp_path), "float32", llm[1]).generation_config.eos_token_id == 0


def test_a_prompt_of_one_token_is_answered(llm):
    assert len(continue_prompts(llm, [[1], [1]], [1, 2], decoding=DECODING, stop_strings=STOP_STRINGS)) == 2


def test_a_row_that_plays_the_user_is_stopped(llm):
    """Two rows: the prompt's own turns do not count, nor does half a stop_string."""
    tokenizer = llm[1]
    prompt = tokenizer("a\nHuman b", add_special_tokens=False).input_ids
    new = [tokenizer(text, add_special_tokens=False).input_ids for text in ("a b c\n\nHuman", "a b c d e\n\nHum")]
    rows = [prompt + ids[-6:] if len(ids) >= 6 else None for ids in new]
    assert None not in rows
    stop = UserTurn(tokenizer, len(prompt), STOP_STRINGS)
    assert stop(torch.tensor(rows), None).tolist() == [True, False]
    assert stop(torch.tensor(rows)[:, : len(prompt)], None).tolist() == [False, False]


def test_samples_of_a_prompt_stay_together(llm):
    prompts = [Prompt("", str(i), query) for i, query in enumerate(QUERIES)]
    token_ids = tokenize(llm[1], QUERIES, "plain", 64)
    options = {"decoding": replace(DECODING, num_samples=2), "seed": 1, "stop_strings": STOP_STRINGS}
    options |= {"prompts": prompts, "token_ids": token_ids}
    together = {p.query_id: t for p, t in sample_batches(*llm, batches=[[3, 1], [0, 2]], **options)}
    apart = {p.query_id: t for p, t in sample_batches(*llm, batches=[[0], [1], [2], [3]], **options)}
    assert together == apart and list(together) == ["3", "1", "0", "2"]
    assert all(len(set(texts)) == 2 for texts in together.values())


def test_batches_are_of_similar_length_and_hold_everything_once():
    lengths = [3, 9, 1, 9, 4]
    assert form_batches([[0] * n for n in lengths], 2) == [[1, 3], [4, 0], [2]]


def test_long_prompts_lose_their_front_and_keep_bos(llm, caplog):
    [whole] = tokenize(llm[1], QUERIES[1:2], "plain", 64)
    [cut] = tokenize(llm[1], QUERIES[1:2], "plain", 5)
    assert cut == [llm[1].bos_token_id, *whole[-4:]]
    assert "1 of 1 prompts cut in front to 5 tokens" in caplog.text
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


def test_llama_2_chat_turns_hold_bos_and_eos(base_llama):
    tokenizer = AutoTokenizer.from_pretrained(base_llama)
    [ids] = tokenize(tokenizer, ["[INST] a [/INST] b </s><s>[INST] c [/INST]"], "llama-2-chat", 64)
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1


def test_a_model_without_chat_template_says_so(base_llama):
    with pytest.raises(InputError, match="found no chat template in the tokenizer; --prompt_template plain"):
        load_tokenizer(str(base_llama), "chat")


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}'])
def test_a_broken_tokenizer_is_one_line(base_llama, tmp_path, content):
    (tmp_path / "config.json").write_bytes((base_llama / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="no usable tokenizer") as caught:
        load_tokenizer(str(tmp_path), "plain")
    assert "\n" not in str(caught.value)


def test_an_error_without_words_is_named(monkeypatch):
    def fail(path: str) -> None:
        raise ValueError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(InputError, match=r"no usable tokenizer \(ValueError\)"):
        load_tokenizer("somewhere", "plain")


def test_a_reward_model_is_no_llm(base_llama, llm, tmp_path):
    model, _ = load_model(base_llama)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks weights \(lm_head.weight\); expected a complete language model"):
        load_llm(str(tmp_path), "float32", llm[1])


def test_prompts_must_leave_room_for_the_answer():
    check_positions([[0] * 5], 3, 8)
    with pytest.raises(InputError, match=r"longest prompt has 6 tokens .*8 positions; expected together at most that"):
        check_positions([[0] * 5, [0] * 6], 3, 8)
