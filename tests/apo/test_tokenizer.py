"""The roles of pad and separator, sentencepiece's ids, saving."""

import pytest
from conftest import CHECKPOINT, copy_checkpoint, make_bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from apo.cli import InputError
from apo.tokenizer import load_reward_tokenizer


def test_sentencepiece_checkpoint_takes_two_byte_pieces_for_its_roles():
    tokenizer = load_reward_tokenizer(str(CHECKPOINT))
    assert (tokenizer.pad_token_id, tokenizer.sep_token_id) == (3, 4)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_sentencepiece_keeps_the_dummy_prefix_that_transformers_drops():
    """' Here' begins with the dummy prefix and a space: two of them."""
    ours = load_reward_tokenizer(str(CHECKPOINT))
    theirs = load_reward_tokenizer(str(CHECKPOINT), backend="transformers")
    pieces = [ours._sentencepiece.id_to_piece(i) for i in ours.encode([" Here"])[0]]
    assert "".join(pieces) == "▁▁Here"
    assert ours.encode([" Here"]) != theirs.encode([" Here"])
    assert ours.encode(["Here"]) == theirs.encode(["Here"])


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_no_text_holds_the_id_of_a_role(text):
    tokenizer = _sentencepiece_tokenizer()
    [ids] = tokenizer.encode([f"\x00{text}\x01 and \x00\x01 more"])
    assert not {tokenizer.pad_token_id, tokenizer.sep_token_id} & set(ids)
    assert ids


_CACHE = {}


def _sentencepiece_tokenizer():
    return _CACHE.setdefault("tokenizer", load_reward_tokenizer(str(CHECKPOINT)))


def save_bpe(folder, special_tokens, chat_template=None, **roles):
    tokenizer = make_bpe_tokenizer(special_tokens, **roles)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=300).save_pretrained(folder)
    return load_reward_tokenizer(str(folder))


BOS_EOS = ["<|bos|>", "<|eos|>"]


@pytest.mark.parametrize(
    "special_tokens, roles, template, expected",
    [
        (["<|pad|>", "<|x|>"], {"pad_token": "<|pad|>"}, None, ("<|pad|>", "<|x|>")),
        (["<|x|>", "<|pad|>", "<|y|>"], {"pad_token": "<|pad|>"}, None, ("<|pad|>", "<|x|>")),
        (["<|x|>", "<|y|>"], {"pad_token": "<|eos|>"}, None, ("<|x|>", "<|y|>")),
        (["<|unk|>", "<|x|>", "<|y|>"], {"unk_token": "<|unk|>", "pad_token": "<|unk|>"}, None, ("<|x|>", "<|y|>")),
        (["<|user|>", "<|x|>", "<|y|>"], {}, "{{ '<|user|>' }}", ("<|x|>", "<|y|>")),
        (["<|user|>", "<|x|>"], {}, "{{ '<|user|>' }}", ("<|x|>", "<|reward_sep|>")),
        (["<|pad|>"], {"pad_token": "<|pad|>"}, None, ("<|pad|>", "<|reward_sep|>")),
        ([], {}, None, ("<|reward_pad|>", "<|reward_sep|>")),
    ],
    ids=["own pad", "own pad behind", "pad is eos", "pad is unk", "template", "one spare", "only pad", "none"],
)
def test_roles_of_other_tokenizers_follow_the_stated_rule(tmp_path, special_tokens, roles, template, expected):
    """Own pad token unless it is bos, eos or unk; then special tokens that nothing uses; then new ones."""
    extra = {"extra_special_tokens": [token for token in special_tokens if token not in roles.values()]}
    tokenizer = save_bpe(tmp_path, [*BOS_EOS, *special_tokens], template, **roles, **extra)
    ids = [tokenizer.pad_token_id, tokenizer.sep_token_id]
    assert tuple(tokenizer.hf_tokenizer.convert_ids_to_tokens(ids)) == expected
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.hf_tokenizer.unk_token_id}
    tokens = " and ".join(expected)
    [encoded] = tokenizer.encode([f"text with {tokens} in it"])
    assert not set(ids) & set(encoded)
    assert tokenizer.decode(encoded).startswith("text with") and tokenizer.decode(encoded).endswith("in it")


@pytest.mark.parametrize("kind", ["sentencepiece", "transformers", "bpe"])
def test_special_tokens_in_a_text_are_text(tmp_path, kind):
    if kind == "bpe":
        tokenizer = save_bpe(tmp_path, [*BOS_EOS, "<|user|>"], extra_special_tokens={"a": "<|user|>"})
    else:
        tokenizer = load_reward_tokenizer(str(CHECKPOINT), backend=kind)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = " ".join(["So.", *tokenizer.hf_tokenizer.convert_ids_to_tokens(special), "No."])
    [ids] = tokenizer.encode([text])
    assert not set(special) & set(ids)
    assert tokenizer.decode(ids).strip() == text


def test_tokenizer_needs_eos_but_no_bos(tmp_path):
    """As Qwen's, which have no bos."""
    tokenizer = make_bpe_tokenizer(BOS_EOS)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    assert load_reward_tokenizer(str(tmp_path)).bos_token_id is None
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no eos token"):
        load_reward_tokenizer(str(tmp_path))


def test_folder_without_tokenizer_is_refused(tmp_path):
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: no usable tokenizer") as error:
        load_reward_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_tokenizer_saves_into_the_folder_it_came_from(tmp_path, monkeypatch):
    """Training on in place, the folder written in two ways."""
    folder = copy_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    load_reward_tokenizer("model").save_pretrained(folder)
    assert (folder / "tokenizer.model").read_bytes() == (CHECKPOINT / "tokenizer.model").read_bytes()
