"""A Trainer that can be interrupted anywhere: after a resume, weights, log and results are those of the whole run."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from apo.cli import InputError, raise_interrupt, write_json
from apo.launch import process_rank
from apo.run_files import write_results
from apo.run_state import find_fault, read_json_object, record_checkpoint, saving

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ResumableTrainer(Trainer):
    """Saves checkpoints that are whole or none, saves one on SIGTERM and SIGINT, and resumes the training log too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depends_on: dict[str, Any] = {}  # what the weights depend on; recorded in checkpoints
        self._seconds_before = 0.0  # of training, before this process
        self._interruption = Interruption(self)
        self.add_callback(self._interruption)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go last
        with saving(folder):
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            write_json(self._progress_path(folder), self._progress())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                record_checkpoint(folder, self.depends_on)
            self.accelerator.wait_for_everyone()  # torchrun stops all when the first one ends
        self.args.save_total_limit = limit
        self._delete_old_checkpoints()
        if self._interruption.agreed:
            how = "the same command with --resume_from_checkpoint true resumes"
            step = f"step {self.state.global_step} of {self.state.max_steps}"
            raise_interrupt(self._interruption.agreed, line=f"after {step}, saved in {folder}; {how}")

    def _delete_old_checkpoints(self) -> None:
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, limit, best, use_mtime=True)

    def _progress_path(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint, f"progress_{self.args.process_index}.json")

    def _progress(self) -> dict[str, Any]:
        """The sums of this process that transformers starts anew when it resumes."""
        return {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": self._seconds_before + time.time() - self._start_time,
        }

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        self._tr_loss += progress["loss"]
        self._total_loss_scalar = progress["logged_loss"]
        self._globalstep_last_logged = progress["logged_step"]
        self._seconds_before = progress["seconds"]
        self._initial_global_step = self._initial_num_input_tokens_seen = 0

    def start_progress(self) -> None:
        """Continues the sums of the checkpoint that training resumes from, if it does."""
        self._start_time = time.time()
        if self.state.global_step and (progress := read_json_object(self._progress_path(self._resumed_from))):
            self._restore_progress(progress)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Trains; see `transformers.Trainer.train`."""
        self._resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> tuple[Any, Any]:
        try:
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        except (UnpicklingError, RuntimeError, ValueError, LookupError) as error:
            if checkpoint is None:
                raise
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{checkpoint}: cannot be resumed from ({reason}); expected one of this run") from error

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True  # resumed from the last step, within an epoch

    def _finalize_training(self, trial: None, num_train_samples: int, start_time: float) -> TrainOutput:
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            if fault := find_fault(best):
                raise InputError(f"{best}, the best checkpoint, cannot be loaded: {fault}; restore it, or train again")
            self.state.best_model_checkpoint = str(best)
        self._delete_old_checkpoints()  # of a run that was killed among them
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs speeds of the whole run."""
        super().log(logs, start_time and start_time - self._seconds_before)


class Interruption(TrainerCallback):
    """SIGTERM or SIGINT in training: all processes save a checkpoint after the same step, and end.

    More signals are ignored: with Ctrl-C, torchrun sends a second one to each process.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._signum = 0  # that reached this process
        self.agreed = 0  # that reached any, at the end of the step
        self._save_later = False

    def _handle(self, signum: int, frame: Any) -> None:
        if not self._signum and not process_rank():
            os.write(2, f"{signal.Signals(signum).name}: a checkpoint is saved after this step\n".encode())  # no lock
        self._signum = signum

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes over both signals."""
        self._trainer.start_progress()
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint if a signal has reached any process; at the end of an epoch, after its evaluation."""
        self.agreed = self._signum
        if args.world_size > 1:
            signum = torch.tensor(self._signum, device=args.device)
            self.agreed = int(self._trainer.accelerator.reduce(signum, "max"))
        is_last = control.should_training_stop or float(state.epoch).is_integer()
        should_save = control.should_save or bool(self.agreed)
        self._save_later, control.should_save = should_save and is_last, should_save and not is_last

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for the checkpoint of the last step of the epoch: before it, a resume would miss the evaluation."""
        control.should_save |= self._save_later
        self._save_later = False

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Gives both signals back; one that came after the last step ends the run now."""
        for signum in SIGNALS:
            signal.signal(signum, raise_interrupt)
        if self._signum:
            raise_interrupt(self._signum)


def train_and_save(trainer: ResumableTrainer) -> None:
    """Trains, from a checkpoint if the arguments name one, and saves model, state and results."""
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    with saving(trainer.args.output_dir):
        trainer.save_model()
        trainer.save_state()
    if trainer.is_world_process_zero():
        write_results(trainer.args.output_dir, "train", metrics)
