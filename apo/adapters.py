"""LoRA: an adapter is trained and saved in place of the whole model. Everything that concerns PEFT is here.

An adapter folder stands for a model wherever one is expected. It holds

    adapter_model.safetensors   the LoRA matrices, the reward head, the embeddings of added tokens
    adapter_config.json         rank, modules and the name of the base model, as PEFT writes them
    config.json                 the reward settings, the pad token, and `base_model_version`, of `apo.resume`
    the tokenizer
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file

from apo.cli import InputError, first_few, read_json
from apo.resume import model_version
from apo.run_state import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

HEADS = ("reward_head", "lm_head")  # without an adapter: the first is trained whole, the second not at all


class RewardAdapter(PeftModel):
    """A reward model of which only an adapter and the reward head are trained and saved."""

    def save_pretrained(self, folder: str, *, is_main_process: bool = True, **options: Any) -> None:
        """Saves an adapter folder, without the tokenizer."""
        super().save_pretrained(folder, is_main_process=is_main_process, save_embedding_layers=False, **options)
        if is_main_process:
            self.config.save_pretrained(folder)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes none: `apo.run_files` does."""


def find_base(
    path: str, config: PreTrainedConfig, load_config: Callable[[str], PreTrainedConfig], load_in_4bit: bool
) -> tuple[str, PreTrainedConfig]:
    """Returns the base model of an adapter folder, and its config; what it was given if `path` is a whole model.

    Args:
        path: a model, or an adapter folder, whose config is `config`.
        load_config: reads the config of the base model.
        load_in_4bit: whether the base model is about to be quantised.

    Raises:
        InputError: the base model is missing, or is not the one that the adapter was trained on.
    """
    file = find_adapter_config_file(path)
    if file is None:
        return path, config
    try:
        base = read_json(Path(file))["base_model_name_or_path"]
        base_config = load_config(base)
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{file}: base_model_name_or_path: {error}; give the place of the base model") from error
    check_weights(base)
    base_config.base_model_version = model_version(base, getattr(base_config, "_commit_hash", None))
    if base_config.base_model_version != (recorded := getattr(config, "base_model_version", None)):
        found = f"its version is {base_config.base_model_version}, the adapter was trained on {recorded}"
        raise InputError(f"{path}: its base model {base} has changed: {found}; restore it, or train again")
    if hasattr(config, "quantization_config") != (load_in_4bit or hasattr(base_config, "quantization_config")):
        logger.warning("%s: rewards differ a little from training, where --load_in_4bit was another", path)
    return base, base_config


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to load a base model in four bits (NF4, arXiv:2305.14314) that computes in `dtype`."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(HEADS), **options)


def adapt(
    model: PreTrainedModel, path: str, base: str, lora: Mapping[str, Any] | None, num_base_tokens: int
) -> PreTrainedModel | RewardAdapter:
    """Puts an adapter on its base model: the one in `path`, or a new one if `path` is the base model.

    Args:
        model: the base model, its embedding table grown to the tokenizer.
        lora: to train the adapter: the flags `--lora_*`, None or empty where they are not given. None: to use it.
        num_base_tokens: rows of the embedding table before it grew; the adapter holds the rows beyond.

    Returns:
        to train: a `RewardAdapter`; to use: the plain model with the adapter merged into its weights. Weights that
        are quantised, or sharded by ZeRO-3, cannot be merged into; there the adapter stays beside them.

    Raises:
        InputError: modules that the model does not have, or an adapter that does not fit it.
    """
    is_new = base == path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is meant, or an error below
            config = _new_config(model, base, lora, num_base_tokens) if is_new else _read_config(path, lora)
            if config.trainable_token_indices and is_deepspeed_zero3_enabled():
                raise InputError(f"{path}: the tokenizer has added tokens; LoRA with these needs ZeRO-2, not ZeRO-3")
            adapter = RewardAdapter(model, config)
            if not is_new:
                found = adapter.load_adapter(path, "default", is_trainable=lora is not None, torch_device="cpu")
                if unfit := [*found.missing_keys, *found.unexpected_keys]:
                    raise ValueError(f"missing or unknown weights: {first_few(unfit)}")
    except InputError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"{path}: the LoRA adapter does not fit ({' '.join(str(error).split())[:300]})") from error
    if lora is not None:
        config.target_modules = sorted({*config.target_modules} - {*HEADS})  # a set has another order in each process
        num_trained, total = adapter.get_nb_trainable_parameters()
        logger.info("LoRA: rank %d, %d of %d parameters are trained", config.r, num_trained, total)
    elif not getattr(model, "is_quantized", False) and not is_deepspeed_zero3_enabled():
        del model.config.base_model_version
        return adapter.merge_and_unload().requires_grad_(True)  # as it was before PEFT froze it
    return adapter


def _new_config(model: PreTrainedModel, base: str, lora: Mapping[str, Any], num_base_tokens: int) -> LoraConfig:
    """The config of a new adapter; the version of its base model goes into the model's config."""
    whole = {"reward_head", *lora["lora_modules_to_save"]}
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    if unknown := whole - names:
        raise InputError(f"--lora_modules_to_save {' '.join(sorted(unknown))}: the model has no such modules")
    embedding = model.get_input_embeddings()
    is_whole = any(name.split(".")[-1] in whole and module is embedding for name, module in model.named_modules())
    targets = lora["lora_target_modules"]
    model.config.base_model_version = model_version(base, getattr(model.config, "_commit_hash", None))
    return LoraConfig(
        r=lora["lora_r"] or 16,
        lora_alpha=lora["lora_alpha"] or 32,
        lora_dropout=lora["lora_dropout"],
        target_modules="all-linear" if targets == ["all-linear"] else targets or None,
        exclude_modules=list(HEADS),
        modules_to_save=sorted(whole),
        trainable_token_indices=None if is_whole else [*range(num_base_tokens, embedding.num_embeddings)] or None,
        base_model_name_or_path=base,
    )


def _read_config(path: str, lora: Mapping[str, Any] | None) -> LoraConfig:
    config = LoraConfig.from_pretrained(path)
    config.inference_mode = lora is None
    if lora is not None:
        if given := [name for name, value in lora.items() if name != "lora_dropout" and value]:
            raise InputError(f"--{given[0]}: the adapter in {path} keeps its own; leave the flag out")
        config.lora_dropout = lora["lora_dropout"]
    return config
