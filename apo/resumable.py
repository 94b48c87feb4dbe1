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
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from apo.cli import InputError, raise_interrupt, read_json, write_json
from apo.launch import process_rank
from apo.run_files import write_results
from apo.run_state import find_fault, record_checkpoint, saving

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ResumableTrainer(Trainer, TrainerCallback):
    """Saves checkpoints that are whole or none, and resumes the training log too. It is its own callback.

    On SIGTERM or SIGINT all processes save a checkpoint after the same step, and end. More signals are ignored: with
    Ctrl-C, torchrun sends a second one to each process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depends_on: dict[str, Any] = {}  # what the weights depend on; recorded in checkpoints
        self.window: dict[str, Tensor] = {}  # (2,) sums since the last log, which a subclass adds up and logs
        self._progress_name = f"progress_{self.args.process_index}.json"
        self._seconds_before = 0.0  # of training, before this process
        self._signum = 0  # of the signal that reached this process
        self._agreed_signum = 0  # of the one that reached any process, at the end of the step
        self._save_later = False
        self.add_callback(self)

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go last
        progress = {  # the sums of this process that transformers starts anew when it resumes
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": self._seconds_before + time.time() - self._start_time,
            "window": {name: value.tolist() for name, value in self.window.items()},
        }
        with saving(folder):
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            write_json(folder / self._progress_name, progress)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                record_checkpoint(folder, self.depends_on)
            self.accelerator.wait_for_everyone()  # torchrun stops all when the first one ends
        self.args.save_total_limit = limit
        self._delete_old_checkpoints()
        if self._agreed_signum:
            raise_interrupt(self._agreed_signum, line=f"after step {self.state.global_step}, saved in {folder}; ")

    def _delete_old_checkpoints(self) -> None:
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, limit, best, use_mtime=True)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> tuple[Any, Any]:
        try:
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        except (UnpicklingError, RuntimeError, ValueError, LookupError) as error:
            if checkpoint is None:
                raise
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{checkpoint}: cannot be resumed from ({reason}); expected one of this run") from error

    def _run_epoch(self, start_time: float, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(start_time=start_time - self._seconds_before, **kwargs)
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

    def _handle_signal(self, signum: int, frame: Any) -> None:
        if not self._signum and not process_rank():
            os.write(2, f"{signal.Signals(signum).name}: a checkpoint is saved after this step\n".encode())  # no lock
        self._signum = signum

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Continues the sums of the checkpoint that training resumes from, if it does; takes over both signals."""
        self._start_time = time.time()
        if state.global_step and (progress := read_json(Path(args.resume_from_checkpoint, self._progress_name))):
            self._tr_loss += progress["loss"]
            self._total_loss_scalar = progress["logged_loss"]
            self._globalstep_last_logged = progress["logged_step"]
            self._seconds_before = progress["seconds"]
            for name, sums in progress["window"].items():
                self.window[name] = torch.tensor(sums, dtype=torch.double, device=args.device)
            self._initial_global_step = self._initial_num_input_tokens_seen = 0
        for signum in SIGNALS:
            signal.signal(signum, self._handle_signal)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint if a signal has reached any process; at the end of an epoch, after its evaluation."""
        self._agreed_signum = self._signum
        if args.world_size > 1:
            self._agreed_signum = int(self.accelerator.reduce(torch.tensor(self._signum, device=args.device), "max"))
        is_last = control.should_training_stop or float(state.epoch).is_integer()
        should_save = control.should_save or bool(self._agreed_signum)
        self._save_later, control.should_save = should_save and is_last, should_save and not is_last

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for the checkpoint of the last step of the epoch: before it, a resume would miss the evaluation."""
        control.should_save |= self._save_later
        self._save_later = False

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
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
