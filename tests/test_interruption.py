"""Runs that are interrupted, killed, resumed or started again: weights, log and results are those of a whole run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, E2E, ON_CPU, REPO_ROOT, command_line, log_history, read_json, run_main, training
from safetensors.torch import load_file

from apo.resumable import ResumableTrainer
from apo.run_state import exclusive


def whole_run(tmp_path: Path, **flags) -> dict:
    """40 steps, two epochs and a part, saved every 10 and evaluated every 15."""
    run = training(tmp_path, eval_data_path=E2E / "eval_b.json", save_strategy="steps", save_steps=10, max_steps=40)
    run |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": 64, "logging_steps": 3}
    return run | {"eval_strategy": "steps", "eval_steps": 15, "eval_at_start": True} | flags


def without_times(values: dict) -> dict:
    return {name: value for name, value in values.items() if "runtime" not in name and "_per_second" not in name}


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path, signum, status):
    """Weights, log and results, bit by bit; the signal comes in the middle of an epoch and of a logging window."""
    flags = whole_run(tmp_path)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, str(REPO_ROOT / "train.py"), *command_line(**ON_CPU, **flags | {"output_dir": stopped})]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (stopped / "checkpoint-10" / "contents.json").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signum)
        stderr = process.communicate()[1]
    assert process.returncode == status
    assert not (stopped / "model.safetensors").exists()
    state = read_json(stopped / "run_state.json")
    if signum != signal.SIGKILL:
        assert state["state"] == "interrupted" and "Traceback" not in stderr
        assert stderr.splitlines()[-1] == f"interrupted: {state['error']}"
        assert "--resume_from_checkpoint true resumes" in state["error"]

    run_main(**ON_CPU, **flags | {"output_dir": whole})
    run_main(**ON_CPU, **flags | {"output_dir": stopped, "resume_from_checkpoint": True})
    expected, weights = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    logs = [[without_times(log) for log in log_history(folder)] for folder in (whole, stopped)]
    assert logs[0] == logs[1]
    for name in ("train_results.json", "eval_results.json", "all_results.json", "final_eval_results.json"):
        results = [read_json(folder / name) for folder in (whole, stopped)]
        results = results if name.startswith("final") else list(map(without_times, results))
        assert results[0].keys() == results[1].keys()
        assert name.startswith("final") or results[0] == results[1], name


@pytest.fixture
def stop_at(monkeypatch):
    """Runs the command until SIGTERM at the end of a step; it saves and ends."""

    def run(step: int, **flags) -> None:
        on_step_end = ResumableTrainer.on_step_end

        def stop(self, args, state, control, **kwargs):
            self._signum = signal.SIGTERM * (state.global_step == step)
            on_step_end(self, args, state, control, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
            patch.setattr(ResumableTrainer, "on_step_end", stop)
            run_main(**ON_CPU, **flags)

    return run


def best_run(tmp_path: Path, **flags) -> dict:
    """8 steps in two epochs; the first checkpoint, whose loss is higher, is the best and loaded at the end."""
    run = training(tmp_path, eval_data_path=E2E / "eval_b.json", save_strategy="epoch", eval_strategy="epoch")
    run |= {"per_device_train_batch_size": 16, "num_train_epochs": 2, "max_length": 64, "load_best_model_at_end": True}
    run |= {"metric_for_best_model": "loss", "greater_is_better": True, "resume_from_checkpoint": True}
    return run | {"logging_steps": 3} | flags


@pytest.mark.parametrize("step", [2, 4, 8], ids=["within an epoch", "at its end", "at the end"])
def test_run_stopped_at_any_step_of_an_epoch_keeps_log_and_best_checkpoint(tmp_path, stop_at, step):
    run_main(**ON_CPU, **best_run(tmp_path, output_dir=tmp_path / "whole"))
    stop_at(step, **best_run(tmp_path))
    run_main(**ON_CPU, **best_run(tmp_path))
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logs = [list(map(without_times, log_history(tmp_path / name))) for name in ("out", "whole")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_run_with_lora_that_was_stopped_equals_a_whole_one(tmp_path, stop_at, dropout):
    """Within the second epoch; the best checkpoint is that of the first, and training has drawn what to drop."""
    flags = best_run(tmp_path, use_peft=True, lora_dropout=dropout, learning_rate=1e-2, greater_is_better=not dropout)
    run_main(**ON_CPU, **flags | {"output_dir": tmp_path / "whole"})
    stop_at(6, **flags)
    run_main(**ON_CPU, **flags)
    for place in ("", "checkpoint-8"):
        weights, expected = (load_file(tmp_path / n / place / "adapter_model.safetensors") for n in ("out", "whole"))
        assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in expected)
    logs = [list(map(without_times, log_history(tmp_path / name))) for name in ("out", "whole")]
    assert logs[0] == logs[1]
    best, last = (tmp_path / "out" / f"checkpoint-{n}" / "adapter_model.safetensors" for n in (4, 8))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == best.read_bytes() != last.read_bytes()


def test_damaged_best_checkpoint_is_not_taken_for_the_result(tmp_path, stop_at, capsys):
    stop_at(6, **best_run(tmp_path))
    path = tmp_path / "out" / "checkpoint-4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(SystemExit, match="2"):
        run_main(**ON_CPU, **best_run(tmp_path))
    assert (
        "checkpoint-4, the best checkpoint, cannot be loaded: model.safetensors is damaged" in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_best_checkpoint_without_an_optimizer_is_loaded_at_the_end(tmp_path):
    run_main(**ON_CPU, **best_run(tmp_path, save_only_model=True))
    weights, expected = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("", "checkpoint-4"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_checkpoint_without_an_optimizer_is_not_resumed(tmp_path, stop_at, caplog):
    flags = whole_run(tmp_path, save_only_model=True, resume_from_checkpoint=True, max_steps=6)
    stop_at(3, **flags)
    run_main(**ON_CPU, **flags)
    assert "checkpoint-3 is skipped: it has no state of the optimizer (--save_only_model)" in caplog.text


def test_results_of_a_finished_run_stay_those_of_its_model(tmp_path, refused):
    """Other evaluation data are no reason to say that all is done, and no other model is evaluated into its folder."""
    run_main(**ON_CPU, **whole_run(tmp_path, max_steps=3))
    other = whole_run(tmp_path, max_steps=3, eval_data_path=E2E / "eval_a.json")
    assert "this run has finished, with other evaluation data; evaluate its model" in refused(**other)
    evaluation = {"model_name_or_path": CHECKPOINT, "eval_data_path": E2E / "eval_a.json"}
    error = refused(**evaluation, output_dir=tmp_path / "out")
    assert f"out holds a training run; evaluate {CHECKPOINT} into another --output_dir" in error
    with exclusive(tmp_path / "new"):
        assert "run.lock, held by process" in refused(**evaluation, output_dir=tmp_path / "new")


KILL_AT = """
import os, runpy, signal, sys
def kill(event, args):
    if event == EVENT and args and str(args[EVENT == "os.rename"]).endswith(NAME):
        os.kill(os.getpid(), signal.SIGKILL)
EVENT, NAME, sys.argv = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.addaudithook(kill)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "name"),
    [
        ("open", "checkpoint-20/trainer_state.json"),
        ("os.rename", "checkpoint-20/contents.json"),
        ("shutil.rmtree", "checkpoint-30"),
        ("open", "out/config.json"),
        ("os.rename", "out/final_eval_results.json"),
    ],
)
def test_run_killed_while_it_writes_ends_after_one_more_start(tmp_path, event, name):
    """Within a checkpoint, before its record, before the last old one goes, within the model, among the results."""
    flags = whole_run(tmp_path, resume_from_checkpoint=True, save_total_limit=1)
    command = [
        sys.executable,
        "-c",
        KILL_AT,
        event,
        name,
        str(REPO_ROOT / "train.py"),
        *command_line(**ON_CPU, **flags),
    ]
    killed = subprocess.run(
        command, cwd=REPO_ROOT, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_main(**ON_CPU, **flags)
    run_main(**ON_CPU, **flags | {"output_dir": tmp_path / "whole"})
    weights, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logs = [list(map(without_times, log_history(tmp_path / folder))) for folder in ("out", "whole")]
    assert logs[0] == logs[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_finished_run_started_again_does_nothing(tmp_path, capsys):
    """Its last step lies within an epoch, where transformers would train one step more."""
    flags = whole_run(tmp_path, max_steps=11, save_steps=11)
    run_main(**ON_CPU, **flags)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for resume in ({}, {"resume_from_checkpoint": True}):
        run_main(**ON_CPU, **flags, **resume)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files
    assert "this run has finished before" in capsys.readouterr().out


def test_run_killed_after_its_last_step_trains_no_further(tmp_path):
    flags = whole_run(tmp_path, max_steps=11, save_steps=11)
    run_main(**ON_CPU, **flags)
    weights, log = load_file(tmp_path / "out" / "model.safetensors"), log_history(tmp_path / "out")
    results = read_json(tmp_path / "out" / "train_results.json")
    for name in ("run_state.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    run_main(**ON_CPU, **flags, resume_from_checkpoint=True)
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert list(map(without_times, log_history(tmp_path / "out"))) == list(map(without_times, log))
    assert without_times(read_json(tmp_path / "out" / "train_results.json")) == without_times(results)
