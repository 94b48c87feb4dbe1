"""The reward model's tokenizer: its pad and separator roles, and sentencepiece's ids for LLaMA-1/2."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from apo.cli import InputError

SENTENCEPIECE_ROLES = ("<0x00>", "<0x01>")  # LLaMA-1/2: ids 3 (pad) and 4 (separator), bytes that no text contains
ADDED_ROLES = ("<|reward_pad|>", "<|reward_sep|>")


class RewardTokenizer:
    """A tokenizer with fixed pad and separator roles, whose ids for LLaMA-1/2 are those of sentencepiece.

    transformers 5 and sentencepiece encode a leading space differently, and almost every response has one. So
    sentencepiece itself encodes for a checkpoint that ships `tokenizer.model`, unless it was trained on the ids of
    transformers.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        hf_tokenizer: PreTrainedTokenizerBase,
        sentencepiece_path: str | None,
        backend: str,
        pad_token_id: int,
        sep_token_id: int,
    ) -> None:
        self.hf_tokenizer = hf_tokenizer
        self.sentencepiece_path = sentencepiece_path
        use_sentencepiece = backend == "sentencepiece" and sentencepiece_path
        self._sentencepiece = SentencePieceProcessor(model_file=sentencepiece_path) if use_sentencepiece else None
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id
        self.eos_token_id: int = hf_tokenizer.eos_token_id
        self.pad_token_id = pad_token_id
        self.sep_token_id = sep_token_id
        self._no_text = {pad_token_id, sep_token_id, *find_byte_roles(self._sentencepiece)}

    @property
    def uses_sentencepiece(self) -> bool:
        """Whether the ids are sentencepiece's own."""
        return self._sentencepiece is not None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the ids depend on, for the cache of tokenised data."""
        if self._sentencepiece:
            vocabulary = Path(self.sentencepiece_path).read_bytes()
        else:
            vocabulary = self.hf_tokenizer.backend_tokenizer.to_str().encode()
        roles = [self.bos_token_id, self.eos_token_id, self.pad_token_id, self.sep_token_id]
        return hashlib.sha256(vocabulary + json.dumps(roles).encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encodes texts; "</s>" in a text is text, and ids of the pad and separator roles never come from one."""
        if self._sentencepiece:
            batch = self._sentencepiece.encode(texts)
        else:
            options = {"add_special_tokens": False, "split_special_tokens": True}
            batch = self.hf_tokenizer(texts, **options).input_ids if texts else []
        no_text = self._no_text
        return [ids if no_text.isdisjoint(ids) else [i for i in ids if i not in no_text] for ids in batch]

    def decode(self, ids: list[int]) -> str:
        """Text of a token sequence, special tokens shown."""
        return self.hf_tokenizer.decode(ids)

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Saves the tokenizer so that `load_reward_tokenizer` gives the same ids and roles."""
        self.hf_tokenizer.save_pretrained(output_dir)
        target = Path(output_dir) / "tokenizer.model"
        if self.sentencepiece_path and Path(self.sentencepiece_path).resolve() != target.resolve():
            shutil.copyfile(self.sentencepiece_path, target)


def find_byte_roles(pieces: SentencePieceProcessor | None) -> tuple[int, int] | tuple[()]:
    """Returns the ids of the bytes that stand for pad and separator; none without byte fallback.

    They stay no text where eos is the pad token, as in an exported model.
    """
    ids = [pieces.piece_to_id(piece) for piece in SENTENCEPIECE_ROLES] if pieces else []
    return tuple(ids) if ids and all(map(pieces.is_byte, ids)) else ()


def load_reward_tokenizer(
    path: str, config: PreTrainedConfig | None = None, backend: str = "sentencepiece"
) -> RewardTokenizer:
    """Loads the tokenizer of a model and determines its pad and separator roles.

    The rule: (1) what the checkpoint records, if it is a reward model of this project; (2) for sentencepiece with byte
    fallback, as in LLaMA-1/2, the byte pieces <0x00> and <0x01>, ids 3 and 4; (3) else pad is the tokenizer's own
    pad token unless that is also bos, eos or unk, and the roles still open go, in order of id, to special tokens that
    are neither one of these nor in the chat template; (4) else new tokens are added and the embedding table grows.

    Args:
        path: a model folder, or a name on the Hub.
        config: the model's config; read from `path` if absent.
        backend: `sentencepiece`, the ids of `tokenizer.model` where there is one; or `transformers`, those of the HF
            tokenizer, for a model that was trained on them.

    Raises:
        InputError: no usable tokenizer there.
    """
    try:
        config = config or AutoConfig.from_pretrained(path, trust_remote_code=False)
        hf_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        sentencepiece_path = cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
        if hf_tokenizer.eos_token_id is None:
            raise InputError(f"{path}: the tokenizer has no eos token, which ends every sequence")
        pad_token_id, sep_token_id = _settle_roles(hf_tokenizer, sentencepiece_path, config)
        hf_tokenizer.pad_token = hf_tokenizer.convert_ids_to_tokens(pad_token_id)
        hf_tokenizer.model_max_length = int(1e30)  # no warning for long texts: they are truncated later
        return RewardTokenizer(hf_tokenizer, sentencepiece_path, backend, pad_token_id, sep_token_id)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no usable tokenizer ({str(error).splitlines()[0]})") from error


def _settle_roles(
    hf_tokenizer: PreTrainedTokenizerBase, sentencepiece_path: str | None, config: PreTrainedConfig
) -> tuple[int, int]:
    recorded = getattr(config, "reward_settings", {})
    if recorded.get("sep_token_id") is not None:
        return config.pad_token_id, recorded["sep_token_id"]
    if sentencepiece_path and (roles := find_byte_roles(SentencePieceProcessor(model_file=sentencepiece_path))):
        return roles
    used = {hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.unk_token_id}
    own_pad = [] if hf_tokenizer.pad_token_id in {None, *used} else [hf_tokenizer.pad_token_id]
    template = str(hf_tokenizer.chat_template or "")
    spare = [
        token_id
        for token_id, token in sorted(hf_tokenizer.added_tokens_decoder.items())
        if token.special and token_id not in {*used, *own_pad} and token.content not in template
    ]
    roles = (own_pad + spare)[:2]
    if len(roles) < 2:
        hf_tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED_ROLES[len(roles) :])})
        roles += [hf_tokenizer.convert_tokens_to_ids(token) for token in ADDED_ROLES[len(roles) :]]
    return roles[0], roles[1]
