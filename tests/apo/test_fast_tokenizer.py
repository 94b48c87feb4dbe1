"""The tokenizer for other libraries gives the ids of training, from the text that its chat template writes."""

import io
import shutil

import pytest
import sentencepiece
from conftest import CHECKPOINT, make_bpe_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, LlamaConfig

from apo.cli import InputError
from apo.fast_tokenizer import make_fast_tokenizer, save_fast_tokenizer
from apo.tokenizer import load_reward_tokenizer

SETTINGS = {"pooling_type": "last", "max_length": 64, "truncation_side": "left", "add_sep_token": True}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{kind: (this project's tokenizer, the one for other libraries as AutoTokenizer loads it)}."""
    made = {}
    for kind in ("sentencepiece", "bpe"):
        source, folder = CHECKPOINT, tmp_path_factory.mktemp(kind)
        if kind == "bpe":
            source = tmp_path_factory.mktemp("source")
            make_bpe_tokenizer(["<|bos|>", "<|eos|>"]).save_pretrained(source)
            LlamaConfig(vocab_size=302).save_pretrained(source)
        own = load_reward_tokenizer(str(source))
        LlamaConfig().save_pretrained(folder)
        shutil.copyfile(CHECKPOINT / "tokenizer.model", folder / "tokenizer.model")  # is not read
        save_fast_tokenizer(make_fast_tokenizer(own, **SETTINGS), folder)
        made[kind] = own, AutoTokenizer.from_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
@given(prompt=st.text(), response=st.text())
@example(prompt="", response="")
@example(prompt="\x00a\x01b", response="  <unk> <0x0A> \x00")
@example(prompt="--------- aaaaaaaaa", response="\n\n\n   \t▁▁ e\u0301")
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_training(tokenizers, kind, prompt, response):
    """Special tokens as text are left out: this project reads them as text, other libraries as tokens."""
    own, fast = tokenizers[kind]
    assume(not any(token in prompt + response for token in fast.all_special_tokens))
    prompt_ids, response_ids = own.encode([prompt, response])
    expected = [own.bos_token_id, *prompt_ids, own.sep_token_id, *response_ids]
    text = f"{fast.bos_token}{prompt}<sep>{response}"
    assert fast(text).input_ids == fast(text, add_special_tokens=False).input_ids == expected


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_pad_is_eos_for_last_pooling_only(tokenizers, kind):
    own, fast = tokenizers[kind]
    assert fast.pad_token_id == fast.eos_token_id == own.eos_token_id
    assert fast.model_max_length == 63  # without eos
    eos = make_fast_tokenizer(own, **SETTINGS | {"pooling_type": "eos"})
    assert eos.pad_token_id == own.pad_token_id != eos.eos_token_id
    assert eos.model_max_length == 64


def test_template_writes_what_training_reads(tokenizers):
    own, fast = tokenizers["sentencepiece"]
    prompt = "<s>\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:<sep>"
    assert fast.apply_chat_template(MESSAGES, tokenize=False) == f"{prompt} Because."
    assert fast.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True) == f"{prompt} "
    eos = make_fast_tokenizer(own, **SETTINGS | {"pooling_type": "eos"})
    assert eos.apply_chat_template(MESSAGES, tokenize=False) == f"{prompt} Because.</s>"
    assert eos.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True) == f"{prompt} "


def test_template_of_a_model_without_bos_and_separator(tokenizers):
    own, _ = tokenizers["bpe"]
    tokenizer = load_reward_tokenizer(str(own.hf_tokenizer.name_or_path))
    tokenizer.bos_token_id = None
    fast = make_fast_tokenizer(tokenizer, **SETTINGS | {"add_sep_token": False})
    assert fast.apply_chat_template(MESSAGES[1:3], tokenize=False) == "\n\nHuman: Hi\n\nAssistant: Yes?"
    assert fast.bos_token is None and fast.sep_token is None


def test_template_refuses_an_unknown_role(tokenizers):
    with pytest.raises(TemplateError, match="found the role tool, expected user, assistant or system"):
        tokenizers["bpe"][1].apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "found no byte-pair encoding"),
        ({"byte_fallback": False}, "found no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "found a normalisation of characters"),
        ({"remove_extra_whitespaces": True, "add_dummy_prefix": False}, "found removal of spaces, no dummy prefix"),
        ({"user_defined_symbols": ["<user>"]}, "found pieces of its own"),
    ],
)
def test_sentencepiece_of_another_kind_is_refused(tmp_path, changes, message):
    """Their ids would differ: nothing but LLaMA's kind was compared."""
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2}
    model = io.BytesIO()
    lines = [f"question {i} and the answer to it" for i in range(99)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **options | {"unk_id": 0, "bos_id": 1, "eos_id": 2} | changes,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_reward_tokenizer(str(CHECKPOINT))
    tokenizer.sentencepiece_path = str(tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match=message):
        make_fast_tokenizer(tokenizer, **SETTINGS)
