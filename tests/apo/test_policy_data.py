"""The LLM's training data: the ids that were sampled, the responses that a method learns from, batches."""

import pytest
from conftest import make_bpe_tokenizer, pair, write_records
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from apo.cli import InputError
from apo.policy_data import PolicyDataCollator, cut, load_policy_dataset
from apo.sampling import load_tokenizer

PROMPT = "\n\nHuman: Why?\n\nAssistant:"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def record(scores: list[float], **fields) -> dict:
    return {"text": [f"{PROMPT}<sep> answer {i}" for i in range(len(scores))], "scores": scores, **fields}


@pytest.fixture
def tokenizer(base_llama):
    return load_tokenizer(str(base_llama), "plain")


def load(tmp_path, tokenizer, records, align_type="rrhf", template="plain", max_length=64, **options):
    path = write_records(tmp_path / "data.json", records)
    settings = {"align_type": align_type, "template": template, "max_length": max_length}
    return load_policy_dataset(path, tokenizer, **settings, cache_dir=str(tmp_path), **options)


def responses(dataset, tokenizer) -> list[list[str]]:
    return [[tokenizer.decode(ids) for ids in row] for row in dataset["response_ids"]]


# ------------------------------------------------------------------------------------------------ tokens


def test_ids_are_those_that_were_sampled(tmp_path, tokenizer):
    """A prompt as it is sampled from, with bos; a response as it follows it; eos."""
    dataset = load(tmp_path, tokenizer, [record([0.5, -2.0])])
    assert dataset["prompt_ids"][0] == tokenizer(PROMPT).input_ids
    whole = tokenizer(f"{PROMPT} answer 0").input_ids
    assert dataset["prompt_ids"][0] + dataset["response_ids"][0][0] == [*whole, tokenizer.eos_token_id]


def test_llama_2_chat_prompt_is_rendered(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, [record([0.5, -2.0])], template="llama-2-chat")
    assert tokenizer.decode(dataset["prompt_ids"][0], skip_special_tokens=True).strip() == "[INST] Why? [/INST]"


def test_response_after_a_chat_template_has_no_space_and_its_end_token(tmp_path):
    """The template ends a turn with a token that is not eos."""
    special = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_bpe_tokenizer(special)
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    dataset = load(tmp_path, tokenizer, [record([0.5, -2.0])], template="chat")
    text = tokenizer.decode(dataset["prompt_ids"][0] + dataset["response_ids"][0][0])
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nanswer 0<|im_end|>"
    plain = load(tmp_path, tokenizer, [record([0.5, -2.0])])
    assert responses(plain, tokenizer)[0][0] == " answer 0<|eos|>"


ids = st.lists(st.integers(3, 9), min_size=1, max_size=12)


@given(ids, st.lists(ids, min_size=1, max_size=4), st.booleans(), st.integers(8, 30))
def test_cut_keeps_bos_and_the_end_of_the_prompt(prompt, responses, has_bos, max_length):
    prompt = [1, *prompt] if has_bos else prompt
    cut_prompt, cut_responses = cut(prompt, responses, 1, max_length)
    longest = max(map(len, responses))
    assert len(cut_prompt) + max(map(len, cut_responses)) == min(max_length, len(prompt) + longest)
    assert all(whole[: len(part)] == part for whole, part in zip(responses, cut_responses, strict=True))
    assert prompt[: int(has_bos)] == cut_prompt[: int(has_bos)]
    kept = cut_prompt[int(has_bos) :]
    assert kept == prompt[len(prompt) - len(kept) :] and len(kept) >= 1
    if longest + len(prompt) > max_length and longest <= max_length - 2:
        assert cut_responses == responses


def test_cuts_are_counted(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    long = {"text": [f"{PROMPT}<sep>{' word' * n}" for n in (9, 99)], "scores": [1, 0]}
    load(tmp_path, tokenizer, [record([1, 0]), long], max_length=32)
    assert "1 prompts cut, so that 32 tokens suffice" in caplog.text
    assert "1 responses cut, so that 32 tokens suffice" in caplog.text


# ------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("align_type", "expected"),
    [("rrhf", [1, 2, 3, 0]), ("dpo", [1, 0]), ("rjs", [1]), ("sft", [1])],
)
def test_responses_of_a_method_are_in_order_of_their_reward(tmp_path, tokenizer, align_type, expected):
    """Among equal rewards in file order; scores that float32 cannot tell apart are different."""
    scores = [-3.0, 1.0 + 1e-12, 1.0, 1.0]
    dataset = load(tmp_path, tokenizer, [record(scores)], align_type)
    assert dataset["scores"][0] == [scores[i] for i in expected]
    assert [text[-5] for text in responses(dataset, tokenizer)[0]] == [str(i) for i in expected]


def test_pairs_without_a_difference_are_left_out_of_dpo_alone(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    same = {"text": [f"{PROMPT}<sep> same"] * 2, "scores": [1, 0]}
    records = [record([1, 0]), record([2, 2]), same]
    assert len(load(tmp_path, tokenizer, records, "dpo")) == 1
    assert "3 records, 2 of them (1 with equal responses, 1 with equal scores) left out" in caplog.text
    assert len(load(tmp_path, tokenizer, records, "rrhf")) == 3
    with pytest.raises(InputError, match=r"found 1 records \(1 with equal scores\), expected a better"):
        load(tmp_path, tokenizer, [record([2, 2])], "dpo")


def test_golden_records_are_for_sft(tmp_path, tokenizer):
    golden = [{"query_id": "a", "query": PROMPT, "golden": " Because."}]
    dataset = load(tmp_path, tokenizer, golden, "sft")
    assert responses(dataset, tokenizer) == [["Because.</s>"]]
    with pytest.raises(InputError, match='record 1: field "golden": found one response, without a score'):
        load(tmp_path, tokenizer, golden, "rjs")


def test_preference_pairs_are_read_too(tmp_path, tokenizer):
    pairs = [{"prompt": PROMPT, "chosen": " Because.", "rejected": " No."}]
    assert responses(load(tmp_path, tokenizer, pairs, "dpo"), tokenizer) == [["Because.</s>", "No.</s>"]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"query_id": "a", "query": "Why?", "sample_0": " x"}, "without scores, expected text and scores; score"),
        ({"text": [" a", " b"], "scores": [1, 0]}, 'field "text": found no prompt, expected one'),
        (pair() | {"scores": [1]}, "found 1 scores, expected 2"),
    ],
)
def test_other_records_are_refused(tmp_path, tokenizer, bad, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, tokenizer, [record([1, 0]), bad])


def test_other_settings_do_not_take_the_cache_of_these(tmp_path, tokenizer, base_llama):
    records = [record([1, 0, 3])]
    first = load(tmp_path, tokenizer, records)[:]
    changes = ({"align_type": "dpo"}, {"template": "llama-2-chat"}, {"max_length": 10})
    others = [load(tmp_path, tokenizer, records, **change)[:] for change in changes]
    assert all(other != first for other in others)
    again = load(tmp_path, AutoTokenizer.from_pretrained(base_llama), records)[:]
    assert again == first and len(list((tmp_path / "policy_data").glob("*.arrow"))) == 4


# ------------------------------------------------------------------------------------------------ batches


def test_collator_makes_the_example_of_its_docstring():
    items = [
        {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]], "scores": [0.7, -0.2], "query_id": "a"},
        {"prompt_ids": [6], "response_ids": [[7]], "scores": [1.0], "query_id": "b"},
    ]
    batch = PolicyDataCollator()(items)
    assert batch["lengths"].tolist() == [[2, 1], [1, 0]] and batch["scores"].tolist() == [[0.7, -0.2], [1.0, 0.0]]
    assert batch["labels"].tolist() == [3, 4, 5, 7] and batch["query_ids"] == ["a", "b"]
    assert batch["reference_logps"].tolist() == [[0, 0], [0, 0]]
