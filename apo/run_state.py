"""The state of a training run: finished, interrupted or failed; what it depends on; which checkpoints are whole.

`run_state.json` in the output folder records the state and all that the weights depend on. `contents.json` in a
checkpoint is written last: it holds the sha256 of every other file, so that a checkpoint is whole or none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.cli import InputError, first_few, locked, mask_secrets, read_json, refuse, sha256_of_file, write_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

STATE, CONTENTS = "run_state.json", "contents.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# How the flags begin on which no weight depends: what is logged, evaluated, saved, and how data reach the device.
# LoRA's are recorded as one.
NO_WEIGHT_DEPENDS_ON = (
    *("output_dir", "log", "disable_tqdm", "report_to", "run_name", "project", "trackio", "eval", "per_device_eval"),
    *("include_", "save_", "do_", "resume_", "local_rank", "rm_calibration", "calibration_bins", "skip_memory"),
    *("dataloader_num_workers", "dataloader_p", "dataloader_multi", "ddp_timeout", "torch_empty_cache", "use_cpu"),
    *("allow_changes", "use_peft", "lora_"),
)


def weights_depend_on(
    arguments: Mapping[str, Any], data_paths: list[str], eval_paths: list[str], **more: Any
) -> dict[str, Any]:
    """Returns all that the weights at the end of a run depend on, by name, as JSON holds it.

    Args:
        arguments: all resolved training arguments.
        data_paths: the training files, in order.
        eval_paths: the evaluation files; they count where the best checkpoint is loaded at the end.
        more: other things, such as the version of the base model, and the flags of LoRA.
    """
    flags = {name: value for name, value in arguments.items() if not name.startswith(NO_WEIGHT_DEPENDS_ON)}
    flags["train_data"] = [sha256_of_file(path) for path in data_paths]
    if arguments["deepspeed"]:  # only its content counts
        flags["deepspeed"] = json.loads(Path(arguments["deepspeed"]).read_text(encoding="utf-8"))
    if arguments["load_best_model_at_end"]:
        flags |= {name: arguments[name] for name in arguments if name.startswith(("eval_", "save_st"))}
        flags["eval_data"] = [sha256_of_file(path) for path in eval_paths]
    return json.loads(json.dumps({**flags, **more}, default=str))


def describe_changes(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Names what differs, with both values: "learning_rate 0.001, now 0.01"; an empty string if nothing does."""
    changed = [name for name in {**recorded, **current} if recorded.get(name) != current.get(name)]
    return first_few([f"{name} {recorded.get(name)}, now {current.get(name)}" for name in changed])


def record_checkpoint(folder: Path, depends_on: Mapping[str, Any]) -> None:
    """Writes what makes a checkpoint whole: the sha256 of each file, once all are on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CONTENTS)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    hashes = {str(path.relative_to(folder)): sha256_of_file(path) for path in files}
    write_json(folder / CONTENTS, {"depends_on": depends_on, "files": hashes})


def find_fault(folder: str | Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """Returns why the files of a checkpoint or a finished run are not those that were recorded; "" if they are.

    Args:
        patterns: of the names to compare. A folder without a record has no fault, unless all files are asked for.
    """
    files = (read_json(Path(folder, CONTENTS)) or read_json(Path(folder, STATE))).get("files")
    if not isinstance(files, dict):
        return f"it is incomplete (no {CONTENTS})" if patterns == ("*",) else ""
    for name, sha256 in files.items():
        path = Path(folder, name)
        if any(path.match(pattern) for pattern in patterns):
            if not path.is_file():
                return f"{name} is missing"
            if sha256_of_file(path) != sha256:
                return f"{name} is damaged or was changed"
    return ""


def check_weights(folder: str | Path) -> None:
    """Refuses weights whose bytes are not those that were saved; warns of those of a run that has not finished."""
    if fault := find_fault(folder, WEIGHTS):
        raise InputError(f"{folder}: {fault}; restore the file, or train again")
    recorded = read_json(Path(folder, STATE))
    state = recorded.get("state", "finished")
    if state != "finished" and recorded.get("pid") != os.getpid():
        logger.warning("%s: the run that writes here has not finished (%s)", folder, state)


def choose_start(
    output_dir: str | Path, resume: str | None, depends_on: Mapping[str, Any], allow_changes: bool = False
) -> str | None:
    """Settles where training starts: from the beginning (None), or from a checkpoint (its path).

    Args:
        resume: value of `--resume_from_checkpoint`: true for the newest whole checkpoint, else a path, or none.
        depends_on: of `weights_depend_on`.
        allow_changes: whether a checkpoint may come from other data or flags.

    Raises:
        InputError: a new run into the checkpoints of another, a damaged checkpoint, or one of other data or flags.
    """
    checkpoints = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    # Newest first; those of another run, which this one left with --allow_changes, come last.
    origins = {path: read_json(path / CONTENTS).get("depends_on") for path in checkpoints}
    checkpoints.sort(key=lambda path: (origins[path] in (None, depends_on), int(path.name[11:])), reverse=True)
    resume = str(resume or "false")
    if resume.lower() == "false":
        if not checkpoints:
            return None
        advice = "choose another --output_dir, delete them, or resume with --resume_from_checkpoint true"
        raise InputError(f"{output_dir} holds checkpoints of an earlier run ({checkpoints[0].name}); {advice}")
    for checkpoint in checkpoints if resume.lower() == "true" else [Path(resume)]:
        fault = find_fault(checkpoint)
        if not any(path.name.startswith(("optimizer", "global_step")) for path in checkpoint.glob("*")):
            fault = fault or "it has no state of the optimizer (--save_only_model)"
        if not fault:
            if changes := describe_changes(read_json(checkpoint / CONTENTS)["depends_on"], depends_on):
                refuse(f"{checkpoint} was trained with {changes}; give the same, or another folder", allow_changes)
            return str(checkpoint)
        if resume.lower() != "true":
            raise InputError(f"--resume_from_checkpoint {resume}: {fault}; expected a checkpoint-N of this run")
        logger.warning("%s is skipped: %s", checkpoint, fault)
    logger.info("%s has no whole checkpoint: training starts from the beginning", output_dir)
    return None


def is_finished(output_dir: str | Path, depends_on: Mapping[str, Any], eval_data: list[str]) -> bool:
    """Whether a run with the same data and flags has finished there, and its model is whole.

    Args:
        eval_data: the sha256 of each evaluation file.

    Raises:
        InputError: a run with other data or flags has.
    """
    recorded = read_json(Path(output_dir, STATE))
    if recorded.get("state") != "finished":
        return False
    if changes := describe_changes(recorded["depends_on"], depends_on):
        raise InputError(f"{output_dir} holds a finished run with {changes}; choose another --output_dir")
    if recorded.get("eval_data", eval_data) != eval_data:
        how = "give it as --model_name_or_path, without --do_train, and another --output_dir"
        raise InputError(f"{output_dir}: this run has finished, with other evaluation data; evaluate its model: {how}")
    fault = find_fault(output_dir, WEIGHTS)
    if eval_data and not Path(output_dir, "final_eval_results.json").is_file():
        fault = fault or "final_eval_results.json is missing"
    if fault:
        logger.warning("%s: %s; the end of the run is repeated", output_dir, fault)
    return not fault


@contextlib.contextmanager
def recorded_run(output_dir: str | Path, depends_on: Mapping[str, Any], eval_data: list[str]) -> Iterator[None]:
    """Records that a run is running, and at its end that it is finished, interrupted or failed."""

    def record(state: str, **more: Any) -> None:
        write_json(Path(output_dir, STATE), {"state": state, "depends_on": depends_on, **more})

    record("running", pid=os.getpid())
    try:
        yield
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        line = f"{error}the same command with --resume_from_checkpoint true resumes" if is_interrupt else str(error)
        with contextlib.suppress(InputError):  # the disk is full
            record("interrupted" if is_interrupt else "failed", error=mask_secrets(line))
        if is_interrupt:
            raise type(error)(line) from None
        raise
    weights = sorted(path for pattern in WEIGHTS for path in Path(output_dir).glob(pattern))
    record("finished", eval_data=eval_data, files={path.name: sha256_of_file(path) for path in weights})


@contextlib.contextmanager
def exclusive(output_dir: str | Path) -> Iterator[None]:
    """Keeps other runs out of an output folder, and deletes the temporary files of a run that was killed there."""
    with locked(Path(output_dir, "run"), wait=False):
        for temporary in Path(output_dir).glob(".*.tmp"):
            temporary.unlink()
        yield


def start_training(
    args: TrainingArguments, depends_on: dict[str, Any], eval_paths: list[str], stack: contextlib.ExitStack
) -> bool:
    """Locks the output folder and settles where training starts; says so and returns False if it has finished before.

    All processes get the same decision, that of the main one.
    """
    from accelerate.utils import broadcast_object_list

    has_finished = start = None
    if args.process_index == 0:
        stack.enter_context(exclusive(args.output_dir))
        eval_data = [sha256_of_file(path) for path in eval_paths]
        has_finished = is_finished(args.output_dir, depends_on, eval_data)
        if not has_finished:
            start = choose_start(args.output_dir, args.resume_from_checkpoint, depends_on, args.allow_changes)
            stack.enter_context(recorded_run(args.output_dir, depends_on, eval_data))
        else:
            print(f"{args.output_dir}: this run has finished before; nothing is left to do")
    has_finished, args.resume_from_checkpoint = broadcast_object_list([has_finished, start])
    args.eval_on_start &= args.resume_from_checkpoint is None
    return not has_finished


def start_evaluation(args: TrainingArguments, model_path: str, stack: contextlib.ExitStack) -> None:
    """Locks the output folder for the results of a model; raises an InputError for the folder of another one."""
    folder, model = Path(args.output_dir).resolve(), Path(model_path).resolve()
    if (folder / STATE).is_file() and folder not in (model, *model.parents):
        raise InputError(f"{args.output_dir} holds a training run; evaluate {model_path} into another --output_dir")
    if args.process_index == 0:
        stack.enter_context(exclusive(args.output_dir))


@contextlib.contextmanager
def saving(folder: str | Path) -> Iterator[None]:
    """Turns any error of a library that saves a model into one line; an incomplete checkpoint is deleted."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors, tokenizers and torch raise each their own, for a full disk too
        free = shutil.disk_usage(Path(folder).parent).free
        if Path(folder).name.startswith("checkpoint-"):
            shutil.rmtree(folder, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: cannot be saved, {free / 1e6:,.1f} MB of disk are free ({reason})") from error
