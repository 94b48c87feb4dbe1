"""Every flag of transformers works, or is refused, or is said to have no effect; numbers have a range."""

import math
from dataclasses import fields

import pytest
import torch
from conftest import CHECKPOINT, E2E, run_main, training_losses
from transformers import TrainingArguments

from apo.cli import InputError
from apo.flags import NO_EFFECT, RANGES, REFUSED, REFUSED_IN_TREES
from arguments import ModelArguments, RewardTrainingArguments
from llm_arguments import LLMArguments

WORK = """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    eval_accumulation_steps save_only_model save_strategy save_steps save_on_each_node save_total_limit
    load_best_model_at_end metric_for_best_model greater_is_better
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed skip_memory_metrics
    do_train do_eval resume_from_checkpoint local_rank"""


def names_of(table: dict) -> list[str]:
    return [name for names in table.values() for name in names.split()]


def test_every_flag_of_transformers_has_one_verdict():
    """A new release of transformers with a new flag fails here: find out what it does in both batchings."""
    verdicts = [*WORK.split(), *names_of(REFUSED), *names_of(REFUSED_IN_TREES), *names_of(NO_EFFECT)]
    assert len(verdicts) == len(set(verdicts))
    assert sorted({field.name for field in fields(TrainingArguments)} ^ set(verdicts)) == []
    known = {
        field.name for group in (ModelArguments, LLMArguments, RewardTrainingArguments) for field in fields(group)
    }
    assert set(names_of(RANGES)) <= known


def arguments(**flags: object) -> RewardTrainingArguments:
    return RewardTrainingArguments(use_cpu=True, report_to=flags.pop("report_to", "none"), **flags)


def other_value(name: str) -> object:
    """A value that differs from the default."""
    default = getattr(RewardTrainingArguments, name, None)
    return not default if isinstance(default, bool) else "other" if name not in names_of(RANGES) else 5.0


@pytest.mark.parametrize("name", [*names_of(REFUSED), *names_of(REFUSED_IN_TREES)])
def test_refused_flag_is_named(name):
    with pytest.raises(InputError, match=f"^--{name} is not supported: ") as error:
        arguments(**{name: other_value(name)})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", names_of(REFUSED_IN_TREES))
def test_flag_refused_in_trees_works_padded(name):
    assert getattr(arguments(**{name: other_value(name)}, batching="padded"), name) == other_value(name)


@pytest.mark.parametrize("name", names_of(NO_EFFECT))
def test_flag_without_effect_is_named_and_gets_its_default(name, caplog):
    assert getattr(arguments(**{name: other_value(name)}), name) == getattr(arguments(), name)
    assert caplog.text.count(f"--{name} has no effect: ") == 1


@pytest.mark.parametrize("name", [name for name in names_of(RANGES) if name not in ("max_length", "beta")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -2])
def test_number_that_is_not_finite_or_too_small_is_refused(name, value):
    if name == "lm_score_thresh" and value == -2:
        return
    with pytest.raises(InputError, match=f"^--{name} .*: expected .* or more, at most "):
        arguments(**{name: [value] if name == "calibration_bins" else value}, batching="padded")


@pytest.mark.parametrize(
    "flags",
    [{"max_steps": 0}, {"num_train_epochs": 0}, {"save_steps": 0}, {"adam_beta2": 1}, {"seed": 2**32}],
    ids=str,
)
def test_number_at_the_wrong_side_of_the_border_is_refused(flags):
    with pytest.raises(InputError, match=f"^--{next(iter(flags))} "):
        arguments(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"report_to": ["no_such_tracker"]},
        {"do_train": True, "optim": "adamw_bnb_8bit"},
        {"do_train": True, "activation_checkpointing_kwargs": {"no_such": 1}},
        {"do_train": True, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"no_such": 1}},
    ],
    ids=str,
)
def test_what_transformers_could_not_build_is_refused_before_the_model_loads(flags):
    message = r"--(report_to no_such_tracker|optim \w+, --lr_scheduler_type \w+ or their kwargs): "
    with pytest.raises(InputError, match=message) as error:
        arguments(**flags)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ training

BASE = {"model_name_or_path": CHECKPOINT, "do_train": True, "train_data_path": [E2E / "train.json", E2E / "apo.json"]}
BASE |= {"task_type": "apo", "apo_loss_coeff": 0.5, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
BASE |= {"max_length": 64, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True}
BASE |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}


def losses_of(tmp_path, batching: str, **flags: object) -> list[float]:
    run_main(**BASE | flags, batching=batching, output_dir=tmp_path / batching)
    torch.use_deterministic_algorithms(False)  # --full_determinism sets it for the whole process
    return training_losses(tmp_path / batching)


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory) -> list[float]:
    return losses_of(tmp_path_factory.mktemp("plain"), "tree")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, changes",
    [
        ({"optim": "sgd", "learning_rate": 0.1}, True),
        ({"optim": "adafactor"}, True),
        ({"weight_decay": 50.0}, True),
        ({"adam_beta1": 0.1}, True),
        ({"adam_beta2": 0.1}, True),
        ({"adam_epsilon": 0.1}, True),
        ({"max_grad_norm": 1e-9}, True),
        ({"gradient_accumulation_steps": 2}, True),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, True),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 2}'}, True),
        ({"bf16": True}, True),
        ({"gradient_checkpointing": True}, False),
        ({"activation_checkpointing": True}, False),
        ({"torch_empty_cache_steps": 1}, False),
        ({"seed": 7}, True),
        ({"data_seed": 7}, True),
        ({"full_determinism": True}, False),
        ({"train_sampling_strategy": "group_by_length"}, True),
        ({"train_sampling_strategy": "batch_rebalance"}, False),
        ({"train_sampling_strategy": "sequential"}, True),
        ({"dataloader_drop_last": True}, False),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True}, False),
        ({"eval_data_path": E2E / "eval_a.json", "eval_on_start": True, "eval_accumulation_steps": 1}, False),
        ({"eval_data_path": E2E / "eval_a.json", "bf16_full_eval": True}, False),
        ({"include_num_input_tokens_seen": "all", "skip_memory_metrics": False}, False),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_flag_works_in_both_batchings(tmp_path, plain_losses, flags, changes):
    """The same losses in trees and padded; other ones than without the flag where it is meant to change them."""
    tree, padded = (losses_of(tmp_path, batching, **flags) for batching in ("tree", "padded"))
    assert tree == pytest.approx(padded, abs=5e-3 if flags.get("bf16") else 1e-4)
    assert (tree != pytest.approx(plain_losses, abs=1e-5)) == changes


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"warmup_steps": 3}, "--warmup_steps 3: too many, the run ends after 3 steps"),
        ({"task_type": "training", "apo_loss_coeff": 0}, 'training records are "type": "apo", but human pairs'),
        (
            {"train_data_path": E2E / "train.json"},
            '--task_type apo has no effect: no training record is "type": "apo"',
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_flags_that_do_not_fit_the_data_are_named(tmp_path, caplog, flags, message):
    run_main(**BASE | {"lr_scheduler_type": "linear"} | flags, output_dir=tmp_path)
    assert caplog.text.count(message) == 1


def test_run_without_one_whole_batch_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_main(
            **BASE | {"dataloader_drop_last": True, "per_device_train_batch_size": 999}, output_dir=tmp_path / "o"
        )
    assert "records, expected at least 999, one batch" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
