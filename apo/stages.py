"""A stage of the game: one command in a folder of its own, what is recorded of it, and the checks of what it wrote.

    round_1/train_rm.partial/   while it runs, and between its attempts: outputs, command.txt, started.json, logs/
    round_1/train_rm/           when it is done: the same files, and done.json instead of started.json

A done stage counts only as long as its command, the files that it read and those that it wrote are the recorded ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.cli import InputError, read_json, sha256_of_file, write_json
from apo.records import find_response_keys, iter_records, load_prompts, load_rewards
from apo.resume import MODEL_FILES
from apo.run_state import STATE, WEIGHTS, describe_changes, find_fault

DONE, STARTED = "done.json", "started.json"
NOT_COMPARED = ("base_url",)  # where a server runs changes no response
INPUTS = ("reference_model", "deepspeed", "config")  # flags that name inputs, besides those that end with "_path"
NOT_OUTPUTS = ("logs/", "checkpoint-", "command.txt", STARTED, DONE)
MOST_EMPTY = 1 / 20  # share of empty responses that stops the game if it is exceeded
LEAST_USABLE = 1 / 10  # share of possible pairs below which it stops

FileRecord = dict[str, Any]  # "sha256", "size" in bytes, "mtime_ns"


@dataclass(frozen=True)
class Stage:
    """One command of the game.

    Args:
        flags: those of the program, without dashes, each with its values; none for a switch.
        slurm: options of sbatch; None: the stage runs on this machine.
        with_server: whether a server of the user's gives the responses.
    """

    round: int
    name: str
    folder: Path  # when it is done
    launcher: tuple[str, ...]
    program: str
    flags: dict[str, list[str]]
    slurm: str | None = None
    with_server: bool = False

    @property
    def label(self) -> str:
        """The name in messages and flags: "1/train_rm"."""
        return f"{self.round}/{self.name}"

    @property
    def working(self) -> Path:
        """The folder until the stage is done; its attempts share it."""
        return working_folder(self.folder)

    @property
    def command(self) -> list[str]:
        """The words of the command line."""
        words = [*self.launcher, self.program]
        for name, values in self.flags.items():
            words += [f"--{name}", *values]
        return words

    @property
    def settings(self) -> dict[str, str]:
        """What two runs of the stage have to agree on."""
        flags = {name: " ".join(values or ["given"]) for name, values in self.flags.items()}
        flags = {name: value for name, value in flags.items() if name not in NOT_COMPARED}
        return {"program": " ".join((*self.launcher, self.program)), **flags}

    @property
    def paths(self) -> list[str]:
        """The files and models that the command reads."""
        flags = [values for name, values in self.flags.items() if name.endswith("_path") or name in INPUTS]
        return [value for values in flags for value in values if not value.startswith(str(self.working))]


def working_folder(folder: Path) -> Path:
    """Returns where the stage of a folder works until it is done."""
    return folder.with_name(folder.name + ".partial")


# ------------------------------------------------------------------------------------------------ records


class Records:
    """The stages of a plan and what is recorded of those that are done, by label; `done` grows during the game."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.done: dict[str, dict[str, Any]] = {}
        self.folders = {str(stage.folder): stage for stage in stages}
        self.known: dict[str, FileRecord] = {}

    def owner(self, path: str) -> Stage | None:
        """Returns the stage in whose folder a path lies, if it is one of this game."""
        return next((self.folders[str(p)] for p in (Path(path), *Path(path).parents) if str(p) in self.folders), None)

    def parents(self, stage: Stage) -> list[Stage]:
        """Returns the stages whose files a stage reads."""
        owners = {owner.label: owner for path in stage.paths if (owner := self.owner(path))}
        return list(owners.values())

    def made_from(self, label: str) -> list[Stage]:
        """Returns a stage and all that were made from its files, in the order of the plan."""
        found = {label}
        for stage in self.stages:
            if any(parent.label in found for parent in self.parents(stage)):
                found.add(stage.label)
        return [stage for stage in self.stages if stage.label in found]

    def load(self) -> None:
        """Reads and checks all records, before anything runs.

        Raises:
            InputError: a stage, done or half done, does not fit its command, its inputs or its outputs of now.
        """
        for stage in self.stages:
            if (stage.working / DONE).is_file() and not stage.folder.exists():
                os.replace(stage.working, stage.folder)  # the run was killed between the two
            started = read_json(stage.working / STARTED)
            if self._load_done(stage):
                continue
            if stage.folder.exists():
                raise InputError(f"{stage.folder}: found no {DONE}; {redo(stage)}")
            if started and written_files(stage.working):
                self._know_inputs(started)
                self._check_fit(stage, started)

    def load_done(self) -> None:
        """Reads and checks the records of what is done, and changes nothing: the game may be running.

        Raises:
            InputError: see `load`.
        """
        for stage in self.stages:
            self._load_done(stage)

    def _load_done(self, stage: Stage) -> bool:
        """Reads and checks the record of a stage; says whether there is one."""
        if recorded := read_json(stage.folder / DONE):
            self._know_inputs(recorded)
            self._check_fit(stage, recorded)
            self._check_outputs(stage, recorded)
            self.done[stage.label] = recorded
        return bool(recorded)

    def _know_inputs(self, recorded: Mapping[str, Any]) -> None:
        for path, file in recorded.get("inputs", {}).items():
            self.known.setdefault(path, file)

    def _check_fit(self, stage: Stage, recorded: Mapping[str, Any]) -> None:
        """Raises an InputError that names the first difference between what was run and what would be run now."""
        if changes := describe_changes(recorded["settings"], stage.settings):
            raise InputError(f"{stage.label} was run with {changes}; give the same again, or {redo(stage)}")
        for parent in self.parents(stage):
            if parent.label not in self.done:
                found = f"{stage.label} was made from {parent.label}, which is not done"
                raise InputError(f"{found}; restore {parent.folder}, or {redo(stage)}")
        inputs, before = self.inputs(stage), recorded["inputs"]
        for path in {**before, **inputs}:
            if path not in inputs or path not in before or inputs[path]["sha256"] != before[path]["sha256"]:
                raise InputError(f"{stage.label}: {path} is not what it was made from; restore it, or {redo(stage)}")

    def _check_outputs(self, stage: Stage, recorded: Mapping[str, Any]) -> None:
        for name, file in recorded["outputs"].items():
            path = stage.folder / name
            if not path.is_file():
                if name in read_json(stage.folder / DONE).get("deleted", []):  # maybe only now, by a running game
                    continue
                raise InputError(f"{stage.label}: {path} is missing; restore it, or {redo(stage)}")
            if identify(path, file)["sha256"] != file["sha256"]:
                raise InputError(f"{stage.label}: {path} was changed; restore it, or {redo(stage)}")

    def inputs(self, stage: Stage) -> dict[str, FileRecord]:
        """Returns the files that a stage reads: values of flags that are files, and the files of models.

        For those of another stage its record counts, which was checked; so the weights may be deleted by then.
        """
        found: dict[str, FileRecord] = {}
        for word in stage.paths:
            path, owner = Path(word), self.owner(word)
            if owner:
                outputs = self.done[owner.label]["outputs"]
                names = [name for name in outputs if path in (owner.folder / name, owner.folder)]
                is_model = path == owner.folder
                names = [name for name in names if not is_model or any(map(Path(name).match, MODEL_FILES))]
                found |= {str(owner.folder / name): outputs[name] for name in names}
            elif path.is_file():
                found[word] = identify(path, self.known.get(word, {}))
            elif path.is_dir():
                files = sorted(file for pattern in MODEL_FILES for file in path.glob(pattern))
                found |= {str(file): identify(file, self.known.get(str(file), {})) for file in files}
        return found

    def finish(self, stage: Stage, record: dict[str, Any]) -> None:
        """Writes the record of a stage whose outputs were checked, and gives the folder its name."""
        outputs = {name: identify(path, {}) for name, path in written_files(stage.working).items()}
        record = {**record, "parents": [parent.label for parent in self.parents(stage)], "outputs": outputs}
        write_json(stage.working / DONE, record)
        (stage.working / STARTED).unlink(missing_ok=True)
        os.replace(stage.working, stage.folder)
        self.done[stage.label] = record

    def delete_weights(self, stage: Stage) -> int:
        """Deletes the weights of a model that no stage will read again; its record says so first.

        Returns:
            the number of files.
        """
        names = [name for name in self.done[stage.label]["outputs"] if any(map(Path(name).match, WEIGHTS))]
        self.done[stage.label] |= {"deleted": names}
        write_json(stage.folder / DONE, self.done[stage.label])
        paths = [path for name in names if (path := stage.folder / name).exists()]
        for path in paths:
            path.unlink()
        return len(paths)


def written_files(folder: Path) -> dict[str, Path]:
    """Returns the outputs in the folder of a stage by name, without logs, records and checkpoints."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not name.startswith(NOT_OUTPUTS) and path.suffix != ".lock"}


def redo(stage: Stage) -> str:
    """What to do about a stage that does not fit."""
    return f"--redo {stage.label} moves it aside with all that was made from it"


def identify(path: Path, recorded: Mapping[str, Any]) -> FileRecord:
    """Returns hash, size and time of a file; the recorded hash, where size and time are the recorded ones."""
    status = path.stat()
    found = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if found.items() <= recorded.items():
        return dict(recorded)
    return {"sha256": sha256_of_file(path), **found}


# ------------------------------------------------------------------------------------------------ checks


def check_outputs(stage: Stage) -> dict[str, float]:
    """Checks what a stage has written, before it counts as done.

    Returns:
        counts for the record.

    Raises:
        InputError: it is not complete, or the game has come to a state in which going on makes no sense.
    """
    return CHECKS[stage.program.rpartition("/")[2]](stage)


def check_samples(stage: Stage) -> dict[str, float]:
    """All prompts have responses, few of them empty."""
    data_type = stage.flags.get("data_type", [None])[0]
    ids = [prompt.query_id for prompt in load_prompts(stage.flags["data_path"][0], data_type)]
    records = _read(next(stage.working.glob("*_results.json"), stage.working / "..._results.json"))
    found = {record["query_id"] for record in records}
    missing = [query_id for query_id in ids if query_id not in found]
    if missing and "skip_refused" not in stage.flags:
        raise _stop(stage, f"{len(missing)} of {len(ids)} prompts have no response, such as {missing[0]}")
    texts = [record[key] for record in records for key in find_response_keys(record)]
    num_empty = sum(not text.strip() for text in texts)
    if num_empty > MOST_EMPTY * len(texts):
        raise _stop(stage, f"{num_empty} of {len(texts)} responses are empty, more than a twentieth")
    return {"prompts": len(records), "responses": len(texts), "empty": num_empty}


def check_pairs(stage: Stage) -> dict[str, float]:
    """Enough responses make a pair with the golden one."""
    samples = [record for _, record in iter_records(stage.flags["sample_data_path"][0])]
    num_responses = sum(len(find_response_keys(record)) for record in samples)
    items = _read(next(stage.working.glob("*_text_scores.json"), stage.working / "..._text_scores.json"))
    num_pairs = sum(len(item["scores"]) - 1 for item in items)
    possible = len(samples) if "sampling" in stage.flags else num_responses
    if num_pairs < LEAST_USABLE * possible:
        raise _stop(stage, f"{num_pairs} pairs of {possible} possible ones are usable, less than a tenth")
    return {"pairs": num_pairs, "responses": num_responses}


def check_training(stage: Stage) -> dict[str, float]:
    """A trained model is whole, or the results of an evaluation are there; all numbers are finite."""
    if stage.flags.get("task_type") == ["inference"]:
        return check_scores(stage)
    results = _read(stage.working / "all_results.json")
    if broken := [name for name, value in results.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise _stop(stage, f"{broken[0]} is {results[broken[0]]}")
    if "do_train" in stage.flags:
        check_model(stage)
        return {name: value for name, value in results.items() if name in ("train_loss", "epoch")}
    found, wanted = len(_read(stage.working / "final_eval_results.json")), len(stage.flags["eval_data_path"])
    if found != wanted:
        raise _stop(stage, f"found results of {found} evaluation files, expected {wanted}")
    return {"pairs": sum(value for name, value in results.items() if name.endswith("_pairs"))}


def check_model(stage: Stage) -> None:
    """The training has finished, and the folder holds all that loading the model takes."""
    fault = find_fault(stage.working, WEIGHTS)
    if read_json(stage.working / STATE).get("state") != "finished":
        fault = f"{STATE} does not say that the training has finished"
    configurations = ("config.json", "adapter_config.json")
    needed = {"weights": WEIGHTS, "configuration": configurations, "tokenizer": ("tokenizer*",)}
    for what, patterns in needed.items():
        if not any(file for pattern in patterns for file in stage.working.glob(pattern)):
            fault = f"{what} missing"
    if fault:
        raise _stop(stage, f"the model is not whole: {fault}")


def check_scores(stage: Stage) -> dict[str, float]:
    """Every response has a reward, and the rewards differ."""
    num_rewards = 0
    for data_path in stage.flags["eval_data_path"]:
        stem = Path(data_path).name.split(".json")[0]
        rewards = load_rewards(stage.working / f"{stem}_pred_{stage.flags['data_suffix'][0]}_results.json")
        records = [record for _, record in iter_records(data_path)]
        of_prompts = [
            [rewards.get(f"{record['query_id']}:{key}") for key in find_response_keys(record)] for record in records
        ]
        if missing := sum(reward is None for values in of_prompts for reward in values):
            raise _stop(stage, f"{missing} responses of {data_path} have no reward")
        several = [values for values in of_prompts if len(values) > 1] or [list(rewards.values())]
        if len(rewards) > 1 and all(len(set(values)) == 1 for values in several):
            raise _stop(stage, f"all rewards of a prompt are equal, for each prompt of {data_path}: no best response")
        num_rewards += len(rewards)
    return {"rewards": num_rewards}


def check_selection(stage: Stage) -> dict[str, float]:
    """Enough prompts have a best and a worst response."""
    report = _read(stage.working / "best_report.json")
    if report["pairs"] < LEAST_USABLE * report["prompts"]:
        raise _stop(stage, f"{report['pairs']} of {report['prompts']} prompts make a pair, less than a tenth")
    return {"prompts": len(_read(stage.working / "best_text_scores.json")), "pairs": report["pairs"]}


def check_verdicts(stage: Stage) -> dict[str, float]:
    """The judge has written its verdicts."""
    return {"responses": len(_read(stage.working / "verdicts.json").get("verdicts", []))}


CHECKS: dict[str, Callable[[Stage], dict[str, float]]] = {
    "inference_llm.py": check_samples,
    "apo_data_converter.py": check_pairs,
    "train.py": check_training,
    "train_llm.py": check_training,
    "rejection_sampling.py": check_selection,
    "judge_sample.py": check_verdicts,
}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: not written, although the command ended well; see the log beside it")
    return json.loads(path.read_text(encoding="utf-8"))


def _stop(stage: Stage, why: str) -> InputError:
    log = stage.working / "logs"
    return InputError(f"the game stops after {stage.label}: {why}; see {log}; change the game, then {redo(stage)}")
