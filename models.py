"""The reward model: any decoder of transformers with a scalar head; its pooling, loading and saving.

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
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import ModelOutput

from apo.adapters import adapt, find_base, four_bits
from apo.cli import InputError, first_few
from apo.divergence import refuse_non_finite
from apo.launch import seeded
from apo.run_state import check_weights
from apo.tokenizer import RewardTokenizer, load_reward_tokenizer
from apo.tree import batching_of, choose_attention, prepare_attention

logger = logging.getLogger(__name__)

POOLING_TYPES = ("last", "eos", "average", "max")
SIDES = ("left", "right")
# Prompts and responses whose rewards tell whether a saved model is the one in memory.
PROBES = (
    ["\n\nHuman: How do I dry herbs?\n\nAssistant:", "\n\nHuman: Hi!\n\nAssistant:", "Why?", ""],
    [
        " Hang them in small bunches, away from the sun.",
        " I don't know.",
        " Because 2 + 2 = 4.",
        " \u00bfQu\u00e9? \u732b",
    ],
)


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


def resolve_settings(config: PreTrainedConfig, **flags: Any) -> RewardSettings:
    """Settles each setting: the flag if it was given, else what the checkpoint records, else the reference's default.

    A flag that contradicts the checkpoint wins, with a warning. The reward models of other libraries record no
    settings; their class reads the last token that is not padding.

    Raises:
        InputError: the checkpoint records unknown settings.
    """
    recorded = getattr(config, "reward_settings", {})
    if not recorded and is_classifier(config):
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        recorded = {"pooling_type": "last" if config.pad_token_id in eos else "eos"}
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
    is_length = isinstance(settings.max_length, int) and settings.max_length > 0
    if not is_length or settings.pooling_type not in POOLING_TYPES or settings.truncation_side not in SIDES:
        raise InputError(
            f"config.json: found reward_settings {recorded}, expected pooling_type {', '.join(POOLING_TYPES)}, "
            f"truncation_side {', '.join(SIDES)} and a whole number as max_length"
        )
    positions = count_positions(config)
    if settings.max_length > positions:
        raise InputError(
            f"max_length {settings.max_length}: the model has {positions:g} positions; lower --max_length"
        )
    return settings


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a model is saved as a `*ForSequenceClassification`, as other libraries save their reward models."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def count_positions(config: PreTrainedConfig) -> float:
    """Returns the positions that a model can tell apart, with those that scaling of its rotations adds."""
    rotations = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in rotations.values() if isinstance(value, dict)] or [rotations]
    recorded = getattr(config, "max_position_embeddings", None) or float("inf")

    def scaled(rotation: dict[str, Any]) -> float:
        original = rotation.get("original_max_position_embeddings")
        factor = rotation.get("factor") or 1
        return max(recorded, factor * original) if original else factor * recorded  # LLaMA 3 records the scaled number

    return max(map(scaled, of_layers))


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


class RewardModel(PreTrainedModel):
    """A decoder with a linear head of one output and no bias.

    The backbone has the name and keys that it has in the models of transformers (`model.*` in LLaMA); the head is
    `reward_head.weight`. `lm_head.weight` is there only with `with_lm_head`.

        model = RewardModel.from_pretrained("outputs/rm_base")
        model.score("\n\nHuman: Dry herbs?\n\nAssistant:", " In bunches.")
    """

    _keys_to_ignore_on_load_unexpected = (r"lm_head\.", r"embed_out\.")  # LM heads are read with the LM loss only
    _keep_in_fp32_modules_strict = ("reward_head",)
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_attention_backend = True  # the backbone refuses what it does not support
    tokenizer: RewardTokenizer
    head_origin: str

    def __init__(self, config: PreTrainedConfig, with_lm_head: bool = False) -> None:
        super().__init__(config)
        causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        self.base_model_prefix = causal_lm.base_model_prefix
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT's last hidden states
        self.reward_head = nn.Linear(width, 1, bias=False)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False) if with_lm_head else None
        if with_lm_head:
            self._tied_weights_keys = causal_lm._tied_weights_keys
        self.post_init()

    @property
    def settings(self) -> RewardSettings:
        """The recorded settings of this model."""
        return RewardSettings(**getattr(self.config, "reward_settings", {}))

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype = torch.float32) -> RewardModel:
        """Loads a trained reward model and its tokenizer, ready to `score`.

        Args:
            path: a folder that `train.py` wrote, a reward model of another library (`score.weight`), or a Hub name.
            dtype: of the weights.

        Raises:
            InputError: no complete reward model there.
        """
        path = str(path)
        config = load_config(path)
        settings = resolve_settings(config)
        tokenizer = load_reward_tokenizer(path, config, settings.tokenizer_backend)
        settings.sep_token_id = tokenizer.sep_token_id
        attention = choose_attention(config, "padded", torch.device("cpu"), dtype)
        loading = {"seed": 0, "needs_trained_head": True, "will_train": False, "dtype": dtype, "attention": attention}
        return load_reward_model(path, config, tokenizer, settings, **loading).eval()

    @torch.no_grad()
    def score(self, prompt: str | list[str], response: str | list[str], batch_size: int = 8) -> float | list[float]:
        """Returns the reward of a response to a prompt, or those of several, as training saw them.

        Args:
            prompt: the text before the response, with its roles: "\n\nHuman: Why?\n\nAssistant:".
            response: the text after it, with its leading space.
            batch_size: sequences in a forward pass; changes no reward.
        """
        from accelerate.utils import send_to_device

        from reward_datasets import RewardDataCollator, build_sequence

        if isinstance(prompt, str) != isinstance(response, str):
            raise InputError("score: expected two texts, or two lists of texts")
        if isinstance(prompt, str):
            return self.score([prompt], [response])[0]
        if len(prompt) != len(response):
            raise InputError(f"score: found {len(prompt)} prompts and {len(response)} responses, expected as many")
        ids = zip(self.tokenizer.encode(prompt), self.tokenizer.encode(response), strict=True)
        sequences = [build_sequence(*pair, self.tokenizer, **self.settings.sequence_settings) for pair in ids]
        batching = batching_of(self.config._attn_implementation)
        collate = RewardDataCollator(self.tokenizer.pad_token_id, batching=batching)
        rewards: list[float] = []
        for start in range(0, len(sequences), batch_size):
            tensors = send_to_device(collate.token_tensors(sequences[start : start + batch_size]), self.device)
            rewards += self(**tensors).rewards.tolist()
        return rewards

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
            hidden = self.base_model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state  # (N, T, D)
        else:
            attend = prepare_attention(tree, self.config._attn_implementation)
            hidden = self.base_model(
                input_ids=input_ids, position_ids=tree["position_ids"], use_cache=False, attend=attend
            ).last_hidden_state  # (1, S, D)
        with torch.autocast(hidden.device.type, enabled=False):  # 16 bits would make close rewards equal
            token_rewards = self.reward_head(hidden.to(self.reward_head.weight.dtype)).squeeze(-1).float()
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


def load_config(path: str) -> PreTrainedConfig:
    """Reads the config of a decoder from a folder or the Hub.

    Raises:
        InputError: no such model, no or a broken `config.json`, or an architecture that is no decoder of text.
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
    is_text = config.get_text_config() is config and not config.is_encoder_decoder
    if not is_text or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        expected = (
            "expected a decoder of text alone that AutoModelForCausalLM knows, such as llama, qwen3, gemma3_text"
        )
        raise InputError(f"{path}: found the architecture {config.model_type}, {expected}")
    return config


def _is_local(path: str) -> bool:
    """Whether a path is meant as a local folder: no `model` or `owner/model`, or below a folder that exists."""
    first, *rest = Path(path).parts or ("",)
    return path[:1] in ("/", ".", "~") or len(rest) > 1 or (rest and (first == "outputs" or Path(first).is_dir()))


def load_reward_model(
    path: str,
    config: PreTrainedConfig,
    tokenizer: RewardTokenizer,
    settings: RewardSettings,
    *,
    seed: int,
    with_lm_head: bool = False,
    needs_trained_head: bool = False,
    will_train: bool = True,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    lora: dict[str, Any] | None = None,
    load_in_4bit: bool = False,
) -> RewardModel:
    """Loads a pretrained decoder, a reward model or the adapter of one, and logs where its reward head came from.

    The head is `reward_head.weight`, or `score.weight` in the models of other libraries. An existing head is never
    initialised again, a missing one is drawn from `seed`. An adapter is merged into its base model, unless it is
    to be trained: see `apo.adapters.adapt`.

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
        lora: flags of the adapter to train, None if the whole model is trained or none.
        load_in_4bit: whether to quantise the weights of the decoder.

    Raises:
        InputError: the checkpoint lacks weights other than the reward head, or the head where it is needed, or a
            weight has another shape or is not finite, or the base model of an adapter is missing or has changed.
    """
    check_weights(path)
    base, config = find_base(path, config, load_config, load_in_4bit)
    config.pad_token_id = None  # set below: an added pad token lies beyond the table that is loaded
    config.reward_settings = asdict(settings)
    if with_lm_head:
        _check_lm_head(config)
    with seeded(seed):
        quantization = four_bits(dtype) if load_in_4bit else None
        options = {"dtype": dtype, "attn_implementation": attention, "quantization_config": quantization}
        model, info = _read_weights(base, config=config, with_lm_head=with_lm_head, **options)
        if len(tokenizer.hf_tokenizer) > config.vocab_size:
            logger.info("embedding table grown from %d to %d tokens", config.vocab_size, len(tokenizer.hf_tokenizer))
            model.resize_token_embeddings(len(tokenizer.hf_tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
        model.tokenizer = tokenizer
        is_new_head = base == path and "reward_head.weight" in info["missing_keys"]
        _check_head(model, path, seed, is_new_head, needs_trained_head, will_train)
        if base != path or lora is not None:
            model = adapt(model, path, base, lora, num_base_tokens=config.vocab_size)
        elif will_train and getattr(model, "is_quantized", False):
            raise InputError(f"{path}: quantised weights cannot be trained; give --use_peft true")
    refuse_non_finite(path, dict(model.named_parameters()))
    return model


def _read_weights(path: str, **options: Any) -> tuple[RewardModel, dict[str, Any]]:
    """Returns a reward model and which weights were found, as `from_pretrained` of transformers does."""
    try:
        model, info = super(RewardModel, RewardModel).from_pretrained(
            path,
            key_mapping={r"^score\.": "reward_head."},
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, SafetensorError, ImportError, ValueError) as error:  # the last two: quantised ones
        raise InputError(f"{path}: the weights cannot be loaded ({str(error).splitlines()[0]})") from error
    _check_weight_names(path, info)
    # Otherwise transformers gives the head its old name again when it saves.
    model._weight_conversions = [c for c in model._weight_conversions if "reward_head." not in c.target_patterns]
    return model, info


def _check_lm_head(config: PreTrainedConfig) -> None:
    """Refuses the LM loss for models whose logits are more than `lm_head.weight` times the last hidden states."""
    keys = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys or {}
    changes = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    if "lm_head.weight" not in keys or any(getattr(config, name, None) for name in changes):
        raise InputError(f"--lm_loss_coeff is not supported for {config.model_type}; expected a model such as llama")


def _check_weight_names(path: str, info: dict[str, Any]) -> None:
    """Refuses weights that are missing or have another shape, and names those that are not read."""
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        hint = "; a reward head has one label" if name.startswith("reward_head") else ""
        raise InputError(f"{path}: {name} has the shape {tuple(found)}, expected {tuple(expected)}{hint}")
    if missing := set(info["missing_keys"]) - {"reward_head.weight"}:
        lacking = f"lacks {len(missing)} weights ({first_few(sorted(missing))})"
        raise InputError(f"{path}: the checkpoint {lacking}; expected a complete model")
    if unread := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights are not read (%s)", path, len(unread), first_few(unread))


def _check_head(
    model: RewardModel, path: str, seed: int, is_new: bool, needs_trained_head: bool, will_train: bool
) -> None:
    """Logs where the reward head came from; see `load_reward_model`."""
    if is_new and needs_trained_head:
        raise InputError(
            f"{path}: found no reward head (reward_head.weight or score.weight), so rewards would be random; give a "
            "reward model"
        )
    model.head_origin = f"initialised (seed {seed})" if is_new else f"loaded from {path}"
    logger.info("reward head: %s", model.head_origin)
    if is_new and not will_train:
        logger.warning("the reward head is random: the metrics of this run say nothing of the model")


def check_saved_model(folder: str, rewards: list[float], dtype: torch.dtype, tolerance: float) -> None:
    """Reloads a model that was just saved, and compares its rewards of `PROBES`.

    Args:
        rewards: those of the model in memory.
        dtype: of the weights.
        tolerance: largest difference, as a share of the largest reward; covers other kernels and 16-bit rounding.

    Raises:
        InputError: what was written is another model, or none.
    """
    level = logger.manager.disable
    logging.disable(logging.INFO)  # where the head came from is no news
    try:
        saved = RewardModel.from_pretrained(folder, dtype).score(*PROBES)
    finally:
        logging.disable(level)
    difference = max(abs(a - b) for a, b in zip(saved, rewards, strict=True))
    if not difference <= tolerance * max(map(abs, rewards)):
        raise InputError(
            f"{folder}: the saved model gives other rewards than the one in memory (up to {difference:.3g} apart), so "
            "it is not the model that was trained; save it again, from the last whole checkpoint"
        )
