"""LoRA: a small adapter is trained and saved in place of the model. Everything that concerns PEFT is here.

An adapter folder stands for a model wherever one is expected. It holds

    adapter_model.safetensors   the LoRA matrices, the reward head, the embeddings of added tokens
    adapter_config.json         rank, modules and the name of the base model, as PEFT writes them
    config.json                 the reward settings, the pad token, and `base_model_version`, a hash of the base model
    the tokenizer
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file

from apo.cli import InputError, first_few
from apo.resume import model_version
from apo.run_state import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

HEADS = ("reward_head", "lm_head")


class RewardAdapter(PeftModel):
    """A reward model of which only an adapter and the reward head are trained and saved."""

    def save_pretrained(self, folder: str, *, is_main_process: bool = True, **options: Any) -> None:
        """Saves an adapter folder, without the tokenizer; all processes call this function together."""
        super().save_pretrained(folder, is_main_process=is_main_process, save_embedding_layers=False, **options)
        if is_main_process:
            self.config.save_pretrained(folder)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes none: `apo.run_files` does."""


def base_of(path: str) -> str | None:
    """Returns the base model that an adapter folder names; None for the folder or Hub name of a whole model."""
    file = find_adapter_config_file(path)
    if file is None:
        return None
    base = read_json_object(Path(file)).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{file}: found no base_model_name_or_path, expected an adapter_config.json of train.py")
    return base


def check_base(path: str, config: PreTrainedConfig, base: str, base_config: PreTrainedConfig) -> None:
    """Raises an InputError if the base model is not the one that an adapter with this config was trained on."""
    recorded = getattr(config, "base_model_version", None)
    version = model_version(base, getattr(base_config, "_commit_hash", None))
    if version != recorded:
        raise InputError(
            f"{path}: its base model {base} has changed: version {version}, the adapter was trained on {recorded}; "
            "restore it, or give its place as base_model_name_or_path in adapter_config.json"
        )
    base_config.base_model_version = recorded


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to load a base model in four bits (NF4, arXiv:2305.14314) that computes in `dtype`."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(HEADS), **options)


def adapt(
    model: PreTrainedModel, path: str, base: str, lora: Mapping[str, Any] | None, num_base_tokens: int
) -> PreTrainedModel | RewardAdapter:
    """Puts an adapter on its base model: the one in `path`, or a new one.

    Args:
        model: the base model, its embedding table grown to the tokenizer.
        path: the adapter folder; the base model itself for a new adapter.
        base: the name of the base model.
        lora: the flags `--lora_*` of an adapter to train, None or empty where they are not given. The adapter of
            `path` keeps its own shape. None: the adapter is only used.
        num_base_tokens: rows of the embedding table before it grew; the adapter holds the rows beyond.

    Returns:
        to train: a `RewardAdapter`; else the plain model with the adapter merged into its weights. Weights that are
        quantised, or sharded by ZeRO-3, cannot be merged into; there the adapter stays beside them.

    Raises:
        InputError: modules that the model does not have, or an adapter that does not fit it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is meant, or an error below
            if base == path:
                adapter = _new_adapter(model, base, lora, num_base_tokens)
            else:
                adapter = _load_adapter(model, path, lora)
    except (ValueError, RuntimeError, LookupError, TypeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: the LoRA adapter does not fit ({' '.join(str(error).split())[:300]})") from error
    if lora is not None:
        num_trained, total = adapter.get_nb_trainable_parameters()
        logger.info("LoRA: rank %d, %d of %d parameters are trained", adapter.active_peft_config.r, num_trained, total)
        return adapter
    if getattr(model, "is_quantized", False) or is_deepspeed_zero3_enabled():
        return adapter
    del model.config.base_model_version
    return adapter.merge_and_unload()


def _new_adapter(model: PreTrainedModel, base: str, lora: Mapping[str, Any], num_base_tokens: int) -> RewardAdapter:
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    if unknown := set(lora["lora_modules_to_save"]) - names:
        raise InputError(f"--lora_modules_to_save {' '.join(sorted(unknown))}: the model has no such modules")
    targets = lora["lora_target_modules"]
    config = LoraConfig(
        r=lora["lora_r"] or 16,
        lora_alpha=lora["lora_alpha"] or 32,
        lora_dropout=lora["lora_dropout"],
        target_modules="all-linear" if targets == ["all-linear"] else targets or None,
        exclude_modules=list(HEADS),
        modules_to_save=sorted({"reward_head", *lora["lora_modules_to_save"]}),
        trainable_token_indices=list(range(num_base_tokens, model.get_input_embeddings().num_embeddings)) or None,
        base_model_name_or_path=base,
    )
    model.config.base_model_version = model_version(base, getattr(model.config, "_commit_hash", None))
    adapter = RewardAdapter(model, config)
    config.target_modules = sorted({*config.target_modules} - {*HEADS})  # a set has another order in each process
    return adapter


def _load_adapter(model: PreTrainedModel, path: str, lora: Mapping[str, Any] | None) -> RewardAdapter:
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = lora is None
    if lora is not None:
        if given := [name for name, value in lora.items() if name != "lora_dropout" and value]:
            raise InputError(f"--{given[0]}: the adapter in {path} keeps its own; leave the flag out")
        config.lora_dropout = lora["lora_dropout"]
    adapter = RewardAdapter(model, config)
    found = adapter.load_adapter(path, "default", is_trainable=lora is not None, torch_device="cpu")
    if unfit := [*found.missing_keys, *found.unexpected_keys]:
        raise ValueError(f"missing or unknown weights: {first_few(unfit)}")
    return adapter
