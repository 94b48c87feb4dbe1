"""A run whose numbers are not finite ends, and leaves nothing that looks like a result."""

import math

import pytest
import torch
from conftest import CHECKPOINT, E2E, copy_checkpoint, read_json, run_main, run_train
from safetensors.torch import load_file, save_file

from trainer import RewardModelTrainer

RUN = {"model_name_or_path": CHECKPOINT, "do_train": True, "train_data_path": E2E / "train.json", "use_cpu": True}
RUN |= {"report_to": "none", "max_length": 64, "max_steps": 4, "logging_steps": 1, "disable_tqdm": True, "seed": 3}
RUN |= {"per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-3}
DIVERGES = RUN | {"learning_rate": 1e30, "max_grad_norm": 0}


@pytest.fixture
def error_of(capsys):
    """Runs the command, which must end with status 2 and one line; returns it."""

    def run(**flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_main(**flags)
        assert exit_.value.code == 2
        [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return error

    return run


def spoil(monkeypatch, number: int, change) -> list[list[str]]:
    """Changes the loss of one micro-batch, counted from 0; returns the query ids of all micro-batches seen so far."""
    seen = []
    compute_loss = RewardModelTrainer.compute_loss

    def compute(self, model, inputs, *args, **kwargs):
        seen.append(inputs["query_ids"])
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        return change(loss) if len(seen) == number + 1 else loss

    monkeypatch.setattr(RewardModelTrainer, "compute_loss", compute)
    return seen


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_diverged_run_ends_at_its_step_and_saves_no_bad_weight(error_of, tmp_path, strategy):
    error = error_of(**DIVERGES | {"save_strategy": strategy, "save_steps": 1}, output_dir=tmp_path)
    saves = strategy == "steps"  # a checkpoint's rewards are looked at before the loss of the next step is
    assert f"step {1 if saves else 2}: the run diverged ({'a reward is NaN' if saves else 'loss nan'}" in error
    assert not [path for name in ("model.safetensors", "*_results.json") for path in tmp_path.glob(name)]
    for path in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())


def test_only_the_records_of_the_bad_micro_batch_are_named(error_of, tmp_path, monkeypatch):
    """Four micro-batches a step; the second of the second step is spoilt."""
    seen = spoil(monkeypatch, 5, lambda loss: loss * math.nan)
    error = error_of(**RUN, gradient_accumulation_steps=4, output_dir=tmp_path)
    assert "step 2: " in error and "query ids " + "; ".join(f'"{name}"' for name in seen[5]) + ")" in error


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(error_of, tmp_path, monkeypatch):
    spoil(monkeypatch, 1, InfiniteGradient.apply)
    assert "step 2: the run diverged (loss 0." in error_of(**RUN, output_dir=tmp_path)


def test_step_that_the_loss_scaling_of_fp16_skips_is_no_divergence(tmp_path, monkeypatch):
    """Its norm is not finite, and is left out of the log: JSON has no infinity."""
    create = RewardModelTrainer.create_accelerator_and_postprocess

    def with_loss_scaling(self) -> None:
        create(self)
        self.accelerator.scaler, self.accelerator.state._mixed_precision = torch.amp.GradScaler("cpu"), "fp16"

    monkeypatch.setattr(RewardModelTrainer, "create_accelerator_and_postprocess", with_loss_scaling)
    spoil(monkeypatch, 1, InfiniteGradient.apply)
    run_main(**RUN, output_dir=tmp_path)
    logs = [log for log in read_json(tmp_path / "trainer_state.json")["log_history"] if "loss" in log]
    assert ["grad_norm" in log for log in logs] == [True, False, True, True]
    assert all(math.isfinite(log["loss"]) for log in logs)


def test_weights_that_became_infinite_in_the_last_step_are_not_saved(error_of, tmp_path, monkeypatch):
    """Also of a token that no reward of `PROBES` depends on."""
    train = RewardModelTrainer.train

    def break_weights(self, *args, **kwargs):
        output = train(self, *args, **kwargs)
        torch.nn.init.constant_(self.model.get_input_embeddings().weight[-1], math.inf)
        return output

    monkeypatch.setattr(RewardModelTrainer, "train", break_weights)
    assert "not saved: 1 of" in error_of(**RUN, output_dir=tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("flags, few", [({"dtype": "bfloat16", "learning_rate": 1e-6}, True), ({}, False)])
def test_run_that_changes_few_weights_is_a_warning(tmp_path, caplog, flags, few):
    run_main(**RUN | flags, output_dir=tmp_path)
    changed = read_json(tmp_path / "train_results.json")["weights_changed"]
    assert (changed < 0.1, changed > 0.9) == (few, not few)
    assert ("of the weights changed: steps of --learning_rate 1e-06 are lost in bfloat16" in caplog.text) == few


@pytest.mark.parametrize("task", ["training", "inference"])
def test_record_whose_reward_is_not_finite_is_named(error_of, tmp_path, task):
    """A weight of 1e38 is finite, but what it computes is not."""
    folder = copy_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][weights["model.embed_tokens.weight"].shape[0] // 2] = 3e38
    weights["reward_head.weight"] *= 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    flags = {"use_cpu": True, "report_to": "none", "eval_data_path": E2E / "eval_b.json", "task_type": task}
    error = error_of(**flags, model_name_or_path=folder, output_dir=tmp_path / "out")
    assert "records (1; 2; 3; 4; 5; and 22 more, counted from 1) got a reward that is not finite" in error
    assert not list(tmp_path.glob("out/*results.json"))


def test_evaluation_with_a_random_head_is_marked_until_it_is_trained(base_llama, tmp_path, caplog):
    flags = {"model_name_or_path": base_llama, "use_cpu": True, "eval_data_path": E2E / "eval_a.json", "seed": 3}
    run_main(**flags, report_to="none", output_dir=tmp_path)
    assert "the reward head is random" in caplog.text
    for name in ("eval_results.json", "all_results.json"):
        assert read_json(tmp_path / name)["reward_head"] == "initialised (seed 3)"
    caplog.clear()
    run_main(**RUN | flags, output_dir=tmp_path)
    assert "the reward head is random" not in caplog.text
    assert not any("reward_head" in read_json(tmp_path / f"{name}_results.json") for name in ("eval", "all"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"deepspeed": "configs/zero2.json"}], ids=["ddp", "zero2"])
def test_all_processes_of_a_diverged_run_end(tmp_path, flags):
    done = run_train(**DIVERGES | flags, num_processes=2, output_dir=tmp_path, exit_status=1, timeout=300)
    assert "step 2: the run diverged" in done.stderr and "Traceback (most recent call last):\n  File" in done.stderr
    assert not (tmp_path / "model.safetensors").exists()
