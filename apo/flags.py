"""Which values flags take: ranges of numbers, and the flags of transformers that are refused or have no effect."""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from apo.cli import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# (least, largest): names. A default is always allowed, such as None, or -1 for --max_steps.
RANGES = {
    (0, sys.float_info.max): "apo_loss_coeff rm_kl_coeff lm_loss_coeff learning_rate weight_decay max_grad_norm "
    "adam_epsilon neftune_noise_alpha",
    (-sys.float_info.max, sys.float_info.max): "lm_score_thresh",
    (0, 1 - 1e-9): "adam_beta1 adam_beta2 lora_dropout",
    (0, 10**9): "warmup_steps eval_delay dataloader_num_workers",
    (1e-9, 10**9): "beta num_train_epochs save_steps eval_steps logging_steps",  # steps below 1: a share of the run
    (1, 10**9): "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_steps "
    "eval_accumulation_steps save_total_limit torch_empty_cache_steps dataloader_prefetch_factor ddp_timeout "
    "ddp_bucket_cap_mb apo_sample_num eval_token_budget calibration_bins lora_r lora_alpha",
    (8, 10**9): "max_length",
    (0, 2**32 - 1): "seed data_seed",
}
# Why: names.
REFUSED = {
    "a batch of items with several responses cannot be split or dispatched": "accelerator_config",
    "it would change the batch size, and so the result; lower --per_device_train_batch_size": "auto_find_batch_size",
    "SIGTERM saves a checkpoint anyway": "enable_jit_checkpoint",
    "a resumed run would not see the data of a whole one": "ignore_data_skip",
    "the preference losses have no smoothing": "label_smoothing_factor",
    "each data set has its column of lengths": "length_column_name",
    "responses are scored by train.py --task_type inference": "do_predict",
    "the run ends at the first loss that is not finite anyway": "debug",
    "untested here; give --deepspeed": "fsdp fsdp_config parallelism_config",
    "its optimizers are untested here": "optim_args optim_target_modules",
    "upload the output folder with `hf upload`": "push_to_hub hub_token hub_private_repo hub_model_id hub_revision "
    "hub_strategy hub_always_push",
    "every batch has another shape": "torch_compile torch_compile_backend torch_compile_mode",
    "its kernels are for the forward passes of transformers": "use_liger_kernel liger_kernel_config",
}
REFUSED_IN_TREES = {
    "its noise would have the scale of the row of all sequences; give --batching padded": "neftune_noise_alpha"
}
NO_EFFECT = {
    "metrics are computed over all records of a set": "batch_eval_metrics eval_do_concat_batches "
    "eval_use_gather_object include_for_metrics label_names prediction_loss_only",
    "a step has one loss, on any number of devices": "average_tokens_across_devices",
    "a loss that is not finite ends the run": "logging_nan_inf_filter",
    "the columns of the data are fixed": "remove_unused_columns",
    "training and scoring take one forward pass": "use_cache",
}


def check_flags(group: Any) -> None:
    """Refuses a value out of range or a flag of `REFUSED`; gives one without effect its default, with a warning."""

    def given(table: dict[Any, str]) -> list[tuple[str, Any, Any]]:
        """Returns (name, value, key of the table) of the flags that differ from their default."""
        rows = [(name, getattr(group, name, None), key) for key, names in table.items() for name in names.split()]
        return [row for row in rows if row[1] not in (None, [], getattr(type(group), row[0], None))]

    for name, value, (least, largest) in given(RANGES):
        if not all(least <= number <= largest for number in (value if isinstance(value, list) else [value])):
            raise InputError(f"--{name} {value}: expected {least:g} or more, at most {largest:.10g}")
    for name, _, why in given(REFUSED | (REFUSED_IN_TREES if getattr(group, "batching", "") == "tree" else {})):
        raise InputError(f"--{name} is not supported: {why}")
    for name, _, why in given(NO_EFFECT):
        logger.warning("--%s has no effect: %s", name, why)
        setattr(group, name, getattr(type(group), name, []))


def check_packages(args: TrainingArguments) -> None:
    """Refuses a tracker, optimizer or schedule that transformers could not build once the model is loaded."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    if missing := set(args.report_to) - set(get_available_reporting_integrations()):
        raise InputError(f"--report_to {' '.join(missing)}: no such package is installed; install it, or give none")
    if args.do_train:
        weight = torch.zeros(1)
        try:
            Trainer.get_optimizer_cls_and_kwargs(args)
            kwargs = dict(args.lr_scheduler_kwargs or {})
            get_scheduler(args.lr_scheduler_type, torch.optim.SGD([weight]), 1, 2, kwargs)
            checkpoint(abs, weight, **{"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})})
        except Exception as error:  # each optimizer and schedule has its own kind
            names = f"--optim {args.optim.value}, --lr_scheduler_type {args.lr_scheduler_type.value} or their kwargs"
            raise InputError(f"{names}: {' '.join(str(error).split())}") from error


def check_training(args: TrainingArguments, train_set: Dataset) -> None:
    """Refuses training data without a complete batch where others are dropped; warns of flags that do not fit them."""
    batch_size = args.per_device_train_batch_size * args.world_size
    num_batches = (math.floor if args.dataloader_drop_last else math.ceil)(len(train_set) / batch_size)
    if not num_batches:
        found = f"found {len(train_set)} training records, expected at least {batch_size}, one batch"
        raise InputError(f"--dataloader_drop_last: {found}; lower --per_device_train_batch_size")
    num_steps = math.ceil(args.num_train_epochs * math.ceil(num_batches / args.gradient_accumulation_steps))
    num_steps = args.max_steps if args.max_steps > 0 else num_steps
    if args.warmup_steps >= max(1, num_steps) and args.lr_scheduler_type != "constant":
        logger.warning("--warmup_steps %d: too many, the run ends after %d steps", args.warmup_steps, num_steps)


def check_types(args: TrainingArguments, train_set: Dataset) -> None:
    """Warns where the type of the records and the task of a reward model do not fit together."""
    num_apo = sum(train_set["is_apo"][:])
    if num_apo and args.task_type != "apo":
        logger.warning('%d training records are "type": "apo", but human pairs without --task_type apo', num_apo)
    if not num_apo and args.task_type == "apo":
        logger.warning('--task_type apo has no effect: no training record is "type": "apo"')
