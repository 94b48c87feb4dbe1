"""A tokenizer for other libraries: `tokenizer.json` and a chat template that give the reward model's own ids.

The tokenizer adds no special token. A text holds all of them, as the chat template writes it:

    <s>\\n\\nHuman: Why?\\n\\nAssistant:<sep> Because.</s>          (</s> for `eos` pooling only)

So every library sees one bos, whether or not it asks for special tokens, and a cut takes the bos of a long text away
as in training; a bos of the post-processor would stay, or come twice. `last` pooling needs no eos: the token before it
is the last one, and with eos as the pad token a trailing eos is skipped like padding.
"""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from apo.cli import InputError, write_json
from apo.prompts import ROLES
from apo.records import SEPARATOR
from apo.tokenizer import SENTENCEPIECE_ROLES, RewardTokenizer

PAD_TOKEN = "<pad>"
SPACE = "▁"  # sentencepiece's
PIECE_TYPES = sentencepiece_model_pb2.ModelProto.SentencePiece.Type


def make_fast_tokenizer(
    tokenizer: RewardTokenizer, *, pooling_type: str, max_length: int, truncation_side: str, add_sep_token: bool
) -> PreTrainedTokenizerFast:
    """Returns the tokenizer for other libraries; `max_length` and the rest are the model's `RewardSettings`.

    Its longest text is one token shorter than `max_length` for `last` pooling, by the eos that it does not need.

    Raises:
        InputError: the vocabulary cannot be written as `tokenizer.json` with the same ids.
    """
    build = _convert_sentencepiece if tokenizer.uses_sentencepiece else _copy_tokenizer
    backend = build(tokenizer, add_sep_token)
    is_last = pooling_type == "last"
    names = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    names |= {"pad": tokenizer.eos_token_id if is_last else tokenizer.pad_token_id}
    names |= {"sep": tokenizer.sep_token_id} if add_sep_token else {}
    tokens = {f"{name}_token": backend.id_to_token(i) for name, i in names.items() if i is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokens,
        chat_template=chat_template(has_bos="bos_token" in tokens, has_sep=add_sep_token, has_eos=not is_last),
        model_max_length=max_length - is_last,
        truncation_side=truncation_side,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_fast_tokenizer(tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Saves it with names that releases before transformers 5 know too: the class, and the template in its place."""
    tokenizer.save_pretrained(output_dir, save_jinja_files=False)
    path = output_dir / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def chat_template(*, has_bos: bool, has_sep: bool, has_eos: bool) -> str:
    """Returns the Jinja template that writes messages as `apo.records` does, with the special tokens in place.

    The separator stands before the last response, which is the last message or what a generation prompt asks for.
    """
    names = ", ".join(f"'{role}': '{name}'" for name, role in ROLES.items())
    sep = "{{- sep_token -}}" if has_sep else ""
    lines = [
        f"{{%- set names = {{{names}}} -%}}",
        "{{- bos_token -}}" if has_bos else "",
        "{%- for message in messages -%}",
        "{%- if message.role not in names -%}",
        "{{- raise_exception('found the role ' ~ message.role ~ ', expected user, assistant or system') -}}",
        "{%- endif -%}",
        "{{- '\\n\\n' ~ names[message.role] ~ ':' -}}",
        f"{{%- if loop.last and message.role == 'assistant' -%}}{sep}{{%- endif -%}}" if has_sep else "",
        "{{- ' ' ~ message.content -}}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- '\\n\\nAssistant:' -}}}}{sep}{{{{- ' ' -}}}}",
        "{%- elif messages[-1].role == 'assistant' -%}{{- eos_token -}}" if has_eos else "",
        "{%- endif -%}",
    ]
    return "\n".join(filter(None, lines))


# ------------------------------------------------------------------------------------------------ the two kinds


def _copy_tokenizer(tokenizer: RewardTokenizer, add_sep_token: bool) -> Tokenizer:
    """Returns the tokenizer as it is, without its post-processor; the separator is called `<sep>`."""
    spec = json.loads(tokenizer.hf_tokenizer.backend_tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    if add_sep_token:
        old, vocab = tokenizer.hf_tokenizer.convert_ids_to_tokens(tokenizer.sep_token_id), spec["model"]["vocab"]
        if old in vocab:
            vocab[SEPARATOR] = vocab.pop(old)
        for token in spec["added_tokens"]:
            if token["id"] == tokenizer.sep_token_id:
                token |= {"content": SEPARATOR, "special": True, "normalized": False}
    return Tokenizer.from_str(json.dumps(spec))


def _convert_sentencepiece(tokenizer: RewardTokenizer, add_sep_token: bool) -> Tokenizer:
    """Returns byte-pair encoding with sentencepiece's ids, also of a response after `<sep>`.

    Each part of a text between special tokens gets a dummy prefix of its own, as in training. The two bytes that serve
    as pad and separator are in no id of a text, as in `RewardTokenizer.encode`. A literal `<unk>` is text.
    """
    assert add_sep_token, "without a separator no text gives a response its dummy prefix"
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(tokenizer.sentencepiece_path).read_bytes())
    _check_sentencepiece(tokenizer.sentencepiece_path, proto)
    names = [piece.piece for piece in proto.pieces]
    characters = "".join(f"\\x{piece[3:5]}" for piece in SENTENCEPIECE_ROLES)  # "<0x01>" is \x01
    for piece, name in zip(SENTENCEPIECE_ROLES, (PAD_TOKEN, SEPARATOR), strict=True):
        names[names.index(piece)] = name

    vocab = {name: token_id for token_id, name in enumerate(names)}
    backend = Tokenizer(BPE(vocab=vocab, merges=_list_merges(proto), byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{characters}]"), "removed")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id)
    backend.add_special_tokens([AddedToken(names[i], special=True, normalized=False) for i in dict.fromkeys(special)])
    return backend


def _check_sentencepiece(path: str, proto: sentencepiece_model_pb2.ModelProto) -> None:
    """Raises an InputError unless the model is of LLaMA-1/2's kind."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    found = {
        "no byte-pair encoding": trainer.model_type != trainer.BPE,
        "no byte fallback": not trainer.byte_fallback,
        "a normalisation of characters": normalizer.precompiled_charsmap,
        "removal of spaces": normalizer.remove_extra_whitespaces,
        "no dummy prefix": not normalizer.add_dummy_prefix,
        "pieces of its own": any(piece.type == PIECE_TYPES.USER_DEFINED for piece in proto.pieces),
    }
    if names := [name for name, is_so in found.items() if is_so]:
        raise InputError(f"{path}: found {', '.join(names)}; only a tokenizer like that of LLaMA-1/2 can be exported")


def _list_merges(proto: sentencepiece_model_pb2.ModelProto) -> list[tuple[str, str]]:
    """Returns the pairs of pieces that make another one, the one with the highest score first, as in sentencepiece."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == PIECE_TYPES.NORMAL}
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    pairs = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
