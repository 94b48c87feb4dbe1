"""LoRA: an adapter is trained in place of the whole model. Everything that concerns PEFT is here.

The adapter of a reward model is saved as it is: its folder stands for a model wherever a reward model is expected. The
adapter of an LLM is merged at the end of a run, for other programs; only checkpoints are adapter folders. These hold

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
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file

from apo.cli import InputError, first_few, read_json
from apo.divergence import MIN_WEIGHTS_CHANGED, sample_weights
from apo.resume import model_version
from apo.run_state import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

HEADS = ("reward_head", "lm_head")  # without an adapter: the first is trained whole, the second not at all


class AdaptedModel(PeftModel):
    """A model of which only an adapter, and a reward head, are trained and saved."""

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
) -> PreTrainedModel | AdaptedModel:
    """Puts an adapter on its base model: the one in `path`, or a new one if `path` is the base model.

    Args:
        model: the base model, its embedding table grown to the tokenizer.
        lora: to train the adapter: the flags `--lora_*`, None or empty where they are not given. None: to use it.
        num_base_tokens: rows of the embedding table before it grew; the adapter holds the rows beyond.

    Returns:
        to train: an `AdaptedModel`; to use: the plain model with the adapter merged into its weights. Weights that
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
            adapter = AdaptedModel(model, config)
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


def refuse_adapter(path: str) -> None:
    """Raises an InputError for an adapter where a whole LLM is expected."""
    if file := find_adapter_config_file(path):
        expected = "expected a whole LLM, as the end of a run writes it, or merge_and_unload of PEFT"
        raise InputError(f"{file}: found a LoRA adapter, {expected}")


def load_merged(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the base LLM of an adapter that was just saved, and merges the adapter into its weights, on the CPU.

    Warns if rounding leaves most weights as they were.
    """
    base = read_json(Path(folder, CONFIG_NAME))["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that were tied, and are not if they are trained
        how = {"torch_device": "cpu", "low_cpu_mem_usage": True}  # draws no random number
        adapter = PeftModel.from_pretrained(model, folder, **how)
        weights = [module.get_base_layer().weight for module in adapter.modules() if isinstance(module, LoraLayer)]
        before = sample_weights(weights)
        merged = adapter.merge_and_unload()
    changed = (before != sample_weights(weights)).double().mean().item()
    if changed < MIN_WEIGHTS_CHANGED and dtype != torch.float32:
        text = "%s: merging changed only %.1f %% of the adapted weights, the rest is lost in %s; give --dtype float32"
        logger.warning(text, folder, 100 * changed, str(dtype)[6:])
    return merged


def merge(folder: str, dtype: torch.dtype) -> None:
    """Puts the whole LLM in the place of an adapter that was just saved."""
    load_merged(folder, dtype).save_pretrained(folder)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        Path(folder, name).unlink()


def _new_config(model: PreTrainedModel, base: str, lora: Mapping[str, Any], num_base_tokens: int) -> LoraConfig:
    """The config of a new adapter; the version of its base model goes into the model's config."""
    names = {part for name, _ in model.named_modules() for part in name.split(".")}
    whole = {*({"reward_head"} & names), *lora["lora_modules_to_save"]}
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
        modules_to_save=sorted(whole) or None,
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
