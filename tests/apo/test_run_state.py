"""Which checkpoints are whole, where a run starts, and what a changed run is told."""

import json
import logging
import os

import pytest
from conftest import command_line

from apo.cli import InputError
from apo.run_state import (
    CONTENTS,
    STATE,
    check_weights,
    choose_start,
    describe_changes,
    exclusive,
    find_fault,
    is_finished,
    record_checkpoint,
    recorded_run,
    saving,
    weights_depend_on,
)
from arguments import build_arguments, parse_flags

MADE_FROM = {"learning_rate": 0.1, "train_data": ["a"]}


def make_checkpoint(folder, depends_on=MADE_FROM):
    (folder / "global_step2").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "global_step2/states.pt"):
        (folder / name).write_bytes(name.encode() * 9)
    record_checkpoint(folder, depends_on)
    return folder


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, 5),
    "empty": lambda path: os.truncate(path, 0),
    "one bit": flip_bit,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "global_step2/states.pt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_found(tmp_path, name, damage):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2")
    assert find_fault(checkpoint) == ""
    DAMAGES[damage](checkpoint / name)
    assert find_fault(checkpoint).startswith(name)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": 3}'])
def test_checkpoint_without_its_record_is_incomplete(tmp_path, content):
    checkpoint = make_checkpoint(tmp_path / "checkpoint-2")
    (checkpoint / CONTENTS).unlink()
    if content is not None:
        (checkpoint / CONTENTS).write_text(content)
    assert find_fault(checkpoint) == f"it is incomplete (no {CONTENTS})"


def test_new_run_into_the_checkpoints_of_another_is_refused(tmp_path):
    for step in (9, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    with pytest.raises(InputError, match=r"holds checkpoints of an earlier run \(checkpoint-10\)") as error:
        choose_start(tmp_path, None, MADE_FROM)
    assert "--resume_from_checkpoint true" in str(error.value)


def test_folder_that_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    """`checkpoint-best`, made by hand."""
    make_checkpoint(tmp_path / "checkpoint-best")
    assert choose_start(tmp_path, None, MADE_FROM) is None


@pytest.mark.parametrize(("resume", "step"), [("true", 10), ("True", 10), ("{}/checkpoint-9", 9)])
def test_resume_takes_the_newest_or_the_given_checkpoint(tmp_path, resume, step):
    for number in (9, 10):
        make_checkpoint(tmp_path / f"checkpoint-{number}")
    assert choose_start(tmp_path, resume.format(tmp_path), MADE_FROM) == str(tmp_path / f"checkpoint-{step}")


def test_resume_names_a_damaged_checkpoint_and_takes_the_one_before(tmp_path, caplog):
    for number in (8, 9, 10):
        make_checkpoint(tmp_path / f"checkpoint-{number}")
    flip_bit(tmp_path / "checkpoint-10" / "optimizer.pt")
    (tmp_path / "checkpoint-9" / CONTENTS).unlink()
    assert choose_start(tmp_path, "true", MADE_FROM) == str(tmp_path / "checkpoint-8")
    skipped = [record.getMessage().removeprefix(f"{tmp_path}/") for record in caplog.records]
    assert skipped[0] == "checkpoint-10 is skipped: optimizer.pt is damaged or was changed"
    assert skipped[1] == f"checkpoint-9 is skipped: it is incomplete (no {CONTENTS})"


def test_resume_without_a_whole_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    """So that a scheduler can repeat one command."""
    caplog.set_level(logging.INFO)
    assert choose_start(tmp_path, "true", MADE_FROM) is None
    assert "training starts from the beginning" in caplog.text


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-4"])
def test_given_checkpoint_that_is_missing_or_damaged_is_refused(tmp_path, name):
    os.truncate(make_checkpoint(tmp_path / "checkpoint-4") / "optimizer.pt", 3)
    with pytest.raises(InputError, match=rf"--resume_from_checkpoint .*{name}: .*expected a checkpoint-N"):
        choose_start(tmp_path, str(tmp_path / name), MADE_FROM)


def test_library_error_while_saving_is_one_line_and_leaves_no_part(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-2")
    message = r"checkpoint-2: cannot be saved, .* MB of disk are free \(unexpected pos 1\)"
    with pytest.raises(InputError, match=message), saving(folder):
        raise RuntimeError("unexpected\npos 1")
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ what changed


def dependencies(tmp_path, data="[]", **flags):
    words = {"model_name_or_path": "m", "do_train": True, "train_data_path": tmp_path / "a.json", "use_cpu": True}
    (tmp_path / "a.json").write_text(data)
    words |= {"output_dir": "o", "report_to": "none"}
    model_args, data_args, args = build_arguments(parse_flags(command_line(**words | flags)))
    more = {"max_length": model_args.max_length, "num_processes": 1, "model": model_args.model_name_or_path}
    return weights_depend_on(args.to_dict(), data_args.train_data_path, data_args.eval_data_path, **more)


@pytest.mark.parametrize(
    "change",
    [
        *({"data": "[1]"}, {"model_name_or_path": "n"}, {"max_length": 99}, {"seed": 7}, {"data_seed": 7}),
        *({"learning_rate": 0.1}, {"weight_decay": 0.1}, {"adam_beta1": 0.8}, {"max_grad_norm": 2}, {"optim": "sgd"}),
        *({"per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 2}, {"num_train_epochs": 4}),
        *({"max_steps": 9}, {"warmup_steps": 3}, {"lr_scheduler_type": "constant"}, {"lm_loss_coeff": 0.1}),
        *({"task_type": "apo", "apo_loss_coeff": 0.1}, {"debug_mode": True}, {"bf16": True}),
        *({"train_sampling_strategy": "sequential"}, {"dataloader_drop_last": True}, {"batching": "padded"}),
    ],
    ids=str,
)
def test_change_on_which_weights_depend_is_named_and_refused(tmp_path, caplog, change):
    name = {"data": "train_data", "model_name_or_path": "model"}.get(next(iter(change)), next(iter(change)))
    before, now = dependencies(tmp_path), dependencies(tmp_path, **change)
    make_checkpoint(tmp_path / "checkpoint-2", before)
    with pytest.raises(InputError, match=rf"checkpoint-2 was trained with .*{name} .*, now .*--allow_changes"):
        choose_start(tmp_path, "true", now)
    assert choose_start(tmp_path, "true", now, allow_changes=True) == str(tmp_path / "checkpoint-2")
    assert name in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"output_dir": "p"},
            {"logging_steps": 1},
            {"save_steps": 9},
            {"save_total_limit": 2},
            {"disable_tqdm": True},
        ),
        *({"per_device_eval_batch_size": 2}, {"rm_calibration": True}, {"dataloader_num_workers": 2}),
        *({"resume_from_checkpoint": True}, {"run_name": "x"}, {"eval_token_budget": 9}, {"allow_changes": True}),
    ],
    ids=str,
)
def test_change_on_which_no_weight_depends_is_none(tmp_path, change):
    assert describe_changes(dependencies(tmp_path), dependencies(tmp_path, **change)) == ""


# ------------------------------------------------------------------------------------------------ state


def test_finished_run_is_recorded_with_its_weights(tmp_path):
    with recorded_run(tmp_path, MADE_FROM, ["e"]):
        assert json.loads((tmp_path / STATE).read_text())["state"] == "running"
        assert not is_finished(tmp_path, MADE_FROM, ["e"])
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        (tmp_path / "final_eval_results.json").write_text("{}")
    assert is_finished(tmp_path, MADE_FROM, ["e"])
    with pytest.raises(InputError, match=r"holds a finished run with learning_rate 0.1, now 0.2; choose another"):
        is_finished(tmp_path, MADE_FROM | {"learning_rate": 0.2}, ["e"])
    (tmp_path / "final_eval_results.json").unlink()
    assert not is_finished(tmp_path, MADE_FROM, ["e"])
    (tmp_path / "final_eval_results.json").write_text("{}")
    flip_bit(tmp_path / "model.safetensors")
    assert not is_finished(tmp_path, MADE_FROM, ["e"])
    with pytest.raises(InputError, match=r"model.safetensors is damaged or was changed; restore the file"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt("step 4"), "interrupted"), (InputError("x"), "failed")]
)
def test_run_that_does_not_end_well_is_recorded_and_its_model_is_named(tmp_path, caplog, error, state):
    with pytest.raises(type(error)), recorded_run(tmp_path, MADE_FROM, ["e"]):
        raise error
    recorded = json.loads((tmp_path / STATE).read_text())
    assert recorded["state"] == state and str(error) in recorded["error"]
    check_weights(tmp_path)
    assert f"has not finished ({state})" in caplog.text


def test_second_run_into_a_folder_is_refused_while_the_first_runs(tmp_path):
    with exclusive(tmp_path), recorded_run(tmp_path, MADE_FROM, ["e"]):
        second = pytest.raises(InputError, match=rf"run.lock, held by process {os.getpid()}")
        with second, exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        pass


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "o").touch()
    refusal = pytest.raises(InputError, match=r"o/run.lock: cannot be written \(.*File exists.*\); give another place")
    with refusal, exclusive(tmp_path / "o"):
        pass
