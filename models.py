"""The reward model: a LLaMA with a scalar head, its pooling, loading and saving.

Dimension key, for every module of the project:

    B  prompts (items) of a batch        N  sequences, all present responses of a batch (B*R where none is absent)
    R  responses per prompt, at most     T  tokens of the longest sequence
    D  hidden size                       V  vocabulary size
    S  tokens of a whole batch in one row (`apo.tree`)
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaModel, LlamaPreTrainedModel, set_seed
from transformers.utils import ModelOutput

from apo.cli import InputError
from apo.divergence import refuse_non_finite
from apo.run_state import check_weights
from apo.tokenizer import RewardTokenizer
from apo.tree import prepare_attention

logger = logging.getLogger(__name__)

POOLING_TYPES = ("last", "eos", "average", "max")
SIDES = ("left", "right")


@dataclass
class RewardSettings:
    """What scoring must repeat from training; `config.json` records it as `reward_settings`.

    The defaults are the reference's.
    """

    pooling_type: str = "average"
    max_length: int = 256
    truncation_side: str = "left"
    add_sep_token: bool = False
    tokenizer_backend: str = "sentencepiece"
    sep_token_id: int | None = None

    @property
    def sequence_settings(self) -> dict[str, Any]:
        """Those that `reward_datasets.build_sequence` takes."""
        return {name: getattr(self, name) for name in ("max_length", "truncation_side", "add_sep_token")}


def resolve_settings(config: LlamaConfig, **flags: Any) -> RewardSettings:
    """Settles each setting: the flag if it was given, else what the checkpoint records, else the reference's default.

    A flag that contradicts the checkpoint wins, with a warning.

    Raises:
        InputError: the checkpoint records unknown settings.
    """
    recorded = getattr(config, "reward_settings", {})
    known = [field.name for field in fields(RewardSettings)]
    if not isinstance(recorded, dict) or not set(recorded) <= set(known):
        raise InputError(f"config.json: found reward_settings {recorded}, known: {', '.join(known)}")
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        if name in recorded and recorded[name] != value:
            logger.warning(
                "--%s %s contradicts the checkpoint, which was trained with %s", name, value, recorded[name]
            )
    settings = RewardSettings(**{**recorded, **given})
    if settings.pooling_type not in POOLING_TYPES or settings.truncation_side not in SIDES:
        raise InputError(
            f"config.json: found reward_settings {recorded}, expected pooling_type {', '.join(POOLING_TYPES)} and "
            f"truncation_side {', '.join(SIDES)}"
        )
    positions = config.max_position_embeddings * ((config.rope_parameters or {}).get("factor") or 1)
    if settings.max_length > positions:
        raise InputError(
            f"max_length {settings.max_length}: the model has {positions:g} positions; lower --max_length"
        )
    return settings


# ------------------------------------------------------------------------------------------------ model


@dataclass
class RewardModelOutput(ModelOutput):
    """`rewards` (N,) float32; `lm_losses` (N,) mean next-token loss of the sequences asked for, 0 elsewhere."""

    rewards: Tensor | None = None
    lm_losses: Tensor | None = None


def pool_rewards(token_rewards: Tensor, attention_mask: Tensor, pooling_type: str) -> Tensor:
    """Reduces the reward of every token to one reward per sequence.

    `eos` is the last token, `last` the one before it (the reference's name for the position before end of sequence),
    `average` and `max` run over the tokens of the sequence; padding never takes part.

    Args:
        token_rewards: (N, T).
        attention_mask: (N, T), 1 = token, padded on either side.
        pooling_type: one of `POOLING_TYPES`.

    Returns:
        (N,).
    """
    mask = attention_mask.bool()
    if pooling_type == "average":
        return (token_rewards * mask).sum(-1) / mask.sum(-1)
    if pooling_type == "max":
        return token_rewards.masked_fill(~mask, -torch.inf).max(-1).values
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    first, last = positions.masked_fill(~mask, mask.shape[1]).min(-1), positions.masked_fill(~mask, -1).max(-1)
    index = last.values if pooling_type == "eos" else torch.maximum(last.values - 1, first.values)
    return token_rewards.gather(1, index[:, None]).squeeze(1)


class RewardModel(LlamaPreTrainedModel):
    """LLaMA with a linear head of one output and no bias: keys `model.*`, `reward_head.weight`, and, only with
    `with_lm_head`, `lm_head.weight`; otherwise an LM head in the checkpoint is dropped."""

    _keys_to_ignore_on_load_unexpected = (r"lm_head\.weight",)

    def __init__(self, config: LlamaConfig, with_lm_head: bool = False) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.reward_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if with_lm_head else None
        if with_lm_head:
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.post_init()

    @property
    def settings(self) -> RewardSettings:
        """The recorded settings of this model."""
        return RewardSettings(**getattr(self.config, "reward_settings", {}))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        lm_mask: Tensor | None = None,
        tree: dict[str, Tensor] | None = None,
    ) -> RewardModelOutput:
        """Scores sequences, padded or as a tree.

        Args:
            input_ids: (N, T) token ids, padded on either side; with a tree, (1, S).
            attention_mask: (N, T), 1 = token of the sequence.
            lm_mask: (N,) bool, the sequences whose LM loss to compute; needs the LM head.
            tree: the other tensors of `apo.tree.build_token_tree`; needs one of its attentions.

        Returns:
            `RewardModelOutput`. Padding, its side and the tree change no reward: positions count from the first token
            of each sequence.
        """
        if tree is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            hidden = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state  # (N, T, D)
        else:
            attend = prepare_attention(tree, self.config._attn_implementation)
            hidden = self.model(
                input_ids=input_ids, position_ids=tree["position_ids"], use_cache=False, attend=attend
            ).last_hidden_state  # (1, S, D)
        token_rewards = self.reward_head(hidden).squeeze(-1).float()
        if tree is not None:
            token_rewards = token_rewards[0, tree["paths"]]
        rewards = pool_rewards(token_rewards, attention_mask, self.settings.pooling_type)  # (N, T) -> (N,)
        if lm_mask is None:
            return RewardModelOutput(rewards=rewards)
        if tree is not None:
            hidden, input_ids = hidden[0, tree["paths"][lm_mask]], input_ids[0, tree["paths"][lm_mask]]
        else:
            hidden, input_ids = hidden[lm_mask], input_ids[lm_mask]
        lm_losses = self._lm_losses(hidden, input_ids, attention_mask[lm_mask])
        return RewardModelOutput(
            rewards=rewards, lm_losses=torch.zeros_like(rewards).masked_scatter(lm_mask, lm_losses)
        )

    def _lm_losses(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean next-token cross entropy over the unmasked targets of each sequence, (N,).

        Runs the head for N = 0 too: under ZeRO-3 every rank has to gather its weights.
        """
        logits = self.lm_head(hidden[:, :-1]).float()  # (N, T-1, V)
        losses = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")  # (N, T-1)
        mask = attention_mask[:, :-1] * attention_mask[:, 1:]
        return (losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)


# ------------------------------------------------------------------------------------------------ loading


def load_config(path: str) -> LlamaConfig:
    """Reads the config of a LLaMA-like model from a folder or the Hub.

    Raises:
        InputError: no such model, no or a broken `config.json`, or another architecture.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: the model folder has no config.json; expected a folder that save_pretrained wrote")
    if _is_local(path) and not Path(path).exists():
        raise InputError(f"{path}: no such folder; expected a model folder or the name of a model on the Hub")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub have many kinds for a model or a config they refuse
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no model there ({reason}); expected a model folder or the name of a model on the Hub"
        ) from error
    if not isinstance(config, LlamaConfig):
        raise InputError(f"{path}: found the architecture {config.model_type}, expected llama")
    return config


def _is_local(path: str) -> bool:
    """Whether a path is meant as a local folder: no `model` or `owner/model`, or below a folder that exists."""
    first, *rest = Path(path).parts or ("",)
    return path[:1] in ("/", ".", "~") or len(rest) > 1 or (rest and (first == "outputs" or Path(first).is_dir()))


def load_reward_model(
    path: str,
    config: LlamaConfig,
    tokenizer: RewardTokenizer,
    settings: RewardSettings,
    *,
    seed: int,
    with_lm_head: bool = False,
    needs_trained_head: bool = False,
    will_train: bool = True,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> RewardModel:
    """Loads a pretrained LLaMA, or a reward model, and logs where its reward head came from.

    An existing head is never initialised again, a missing one after seeding with `seed`.

    Args:
        path: a model folder, or a name on the Hub.
        config: of `load_config`; it gets the settings and the pad token.
        tokenizer: of the model; the embedding table grows to its size.
        settings: what scoring must repeat.
        seed: of a new head and of new rows of the embedding table.
        with_lm_head: whether to load the LM head, which the LM loss needs.
        needs_trained_head: whether a checkpoint without a reward head is refused.
        will_train: whether a new head is trained before it is used; if not, `head_origin` of the model says so.
        dtype: of the weights.
        attention: of `apo.tree.choose_attention`.

    Raises:
        InputError: the checkpoint lacks weights other than the reward head, or the head where it is needed, or a
            weight is not finite, or the only head is another library's and is not trained anew.
    """
    check_weights(path)
    set_seed(seed)
    config.pad_token_id = None  # set below: an added pad token lies beyond the table that is loaded
    config.reward_settings = asdict(settings)
    try:
        model, info = RewardModel.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            with_lm_head=with_lm_head,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be loaded ({str(error).splitlines()[0]})") from error
    missing = set(info["missing_keys"]) - {"reward_head.weight"}
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise InputError(f"{path}: the checkpoint lacks {len(missing)} weights ({names}); expected a complete LLaMA")
    if len(tokenizer.hf_tokenizer) > config.vocab_size:
        logger.info("embedding table grown from %d to %d tokens", config.vocab_size, len(tokenizer.hf_tokenizer))
        model.resize_token_embeddings(len(tokenizer.hf_tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    refuse_non_finite(path, dict(model.named_parameters()))
    _check_head(model, path, seed, info, needs_trained_head, will_train)
    return model


def _check_head(
    model: RewardModel, path: str, seed: int, info: dict[str, Any], needs_trained_head: bool, will_train: bool
) -> None:
    """Logs where the reward head came from; see `load_reward_model`."""
    head_loaded = "reward_head.weight" not in info["missing_keys"]
    foreign = "score.weight, a head of another library, but " if "score.weight" in info["unexpected_keys"] else ""
    if not head_loaded and (needs_trained_head or (foreign and not will_train)):
        found = f"found {foreign}no reward head (reward_head.weight)"
        raise InputError(f"{path}: {found}, so rewards would be random; give a reward model")
    model.head_origin = f"loaded from {path}" if head_loaded else f"initialised (seed {seed})"
    logger.info("reward head: %s", model.head_origin)
    if not head_loaded and not will_train:
        logger.warning("the reward head is random: the metrics of this run say nothing of the model")
