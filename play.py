"""Plays the game between reward model and LLM: K rounds of the other command lines, started again after any kill.

    python play.py --config configs/game_sample.yaml
    python play.py --config configs/game_hh_7b.yaml --dry_run > game.sh

The same command starts a game and goes on with it. It prints who starts from whom. `docs/game.md` has the keys of the
file, the folders of a game and what is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error, locked, read_json, suggest, write_json
from apo.game import CHOICES, Game, describe_game, plan_game, read_game, server_command, shell_script
from apo.launch import setup_logging
from apo.processes import find_reason, lock_of_processes, run_command, serving
from apo.run_files import PACKAGES, git_commit
from apo.stages import DONE, STARTED, Records, Stage, check_outputs, redo


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--config", required=True, help="YAML file of the game: configs/game_*.yaml")
    add("--until", metavar="K/STAGE", help="the last stage to run, such as 2/score")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--redo", metavar="K/STAGE", help="move a stage, and all that were made from it, aside, and end")
    add("--dry_run", action="store_true", help="print all commands as a shell script, and end")
    add("--status", action="store_true", help="print the state of each stage, and end")
    add("--report", action="store_true", help="write the page of what is done, and end; the game may be running")
    add = parser.add_argument_group("these win over the file").add_argument
    add("--rounds", type=at_least(1))
    add("--align_type", choices=CHOICES["align_type"])
    add("--apo", choices=("true", "false"))
    add("--seed", type=at_least(1))
    add("--output_dir")
    return parser.parse_args()


def find_stage(stages: list[Stage], label: str, flag: str) -> Stage:
    """Returns the stage that a flag names."""
    labels = {stage.label: stage for stage in stages}
    if label not in labels:
        raise InputError(f"{flag} {label}: no such stage; {suggest(label, labels) or 'see --status'}")
    return labels[label]


# ------------------------------------------------------------------------------------------------ state


def print_status(stages: list[Stage]) -> None:
    """Prints the state of each stage, as its files say."""
    for stage in stages:
        record = read_json(stage.folder / DONE)
        attempts = len(list(stage.working.glob("logs/attempt_*.log")))
        state = f"done in {record['seconds']:.0f} s" if record else f"{attempts} attempts" if attempts else "open"
        counts = ", ".join(f"{name} {value:g}" for name, value in record.get("counts", {}).items())
        print(f"{stage.label:20} {state:16} {counts}".rstrip())


def write_report(game: Game, stages: list[Stage]) -> None:
    """Writes the page of what is done, and prints its path and its verdict."""
    from apo.report import make_report  # takes time that a dry run saves
    from apo.report_page import write_page

    if not Path(game.output_dir, "game.json").is_file():
        raise InputError(f"{game.output_dir}: no game has begun here; the same command without --report starts it")
    report = make_report(game, stages)
    print(write_page(Path(game.output_dir, "report"), report), *report["verdict"], sep="\n")


def move_aside(game: Game, stages: list[Stage]) -> None:
    """Moves stages out of the game; nothing is deleted."""
    numbers = [int(path.name[4:]) for path in Path(game.output_dir).glob("old_*") if path.name[4:].isdecimal()]
    old = Path(game.output_dir, f"old_{max(numbers, default=0) + 1}")
    folders = [(stage, folder) for stage in stages for folder in (stage.folder, stage.working) if folder.exists()]
    for stage, folder in reversed(folders):  # a stage before those that it was made from
        target = old / f"round_{stage.round}" / folder.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, target)
    moved = ", ".join(stage.label for stage, _ in folders)
    print(f"moved to {old}, which you may delete: {moved}" if moved else "nothing to move", end="")
    print("; the same command without --redo plays on")


def check_flags(stages: list[Stage]) -> None:
    """Refuses a flag that the program of a stage does not have, hours before the stage would."""
    known: dict[str, list[str]] = {}
    for stage in stages:
        if stage.program not in known:
            words = [sys.executable, stage.program, "--help"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(f"{stage.program} --help: {find_reason(done.stderr)}")
            known[stage.program] = re.findall(r"(?<!\S)--(\w+)", done.stdout)
        for flag in stage.flags.keys() - known[stage.program]:
            hint = suggest(flag, known[stage.program]) or "see its --help"
            raise InputError(f"{stage.name}: {stage.program} has no flag --{flag}; {hint}")


def delete_old_models(records: Records) -> None:
    """Deletes the weights that no stage of the plan will read, but not those of the last RM and the last LLM."""
    models = [stage for stage in records.stages if stage.round and stage.name in ("train_rm", "align")]
    last = {stage.name: stage.label for stage in models}
    read_later = {p.label for s in records.stages if s.label not in records.done for p in records.parents(s)}
    for stage in models:
        if stage.label in records.done and stage.label not in read_later | set(last.values()):
            checkpoints = list(stage.folder.glob("checkpoint-*"))
            for checkpoint in checkpoints:
                shutil.rmtree(checkpoint)
            if records.delete_weights(stage) or checkpoints:
                print(f"{stage.label}: weights and checkpoints deleted (keep_models: last)", flush=True)


# ------------------------------------------------------------------------------------------------ stages


def run_stage(game: Game, stage: Stage, records: Records, lock: int) -> None:
    """Runs a stage in its working folder, checks what it wrote, and records it as done."""
    for parent in records.parents(stage):
        if records.done[parent.label].get("deleted"):
            found = f"the weights of {parent.label} were deleted (keep_models: last)"
            raise InputError(f"{stage.label}: {found}; {redo(parent)}")
    logs = stage.working / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = {"settings": stage.settings, "inputs": records.inputs(stage), "command": shlex.join(stage.command)}
    write_json(stage.working / STARTED, started)
    (stage.working / "command.txt").write_text(started["command"] + "\n", encoding="utf-8")
    attempt = len(list(logs.glob("attempt_*.log"))) + 1
    log_path = logs / f"attempt_{attempt}.log"
    print(f"{datetime.now():%H:%M:%S} {stage.label}: attempt {attempt}, log: {log_path}", flush=True)
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        if stage.with_server:
            model, url = stage.flags["model_name_or_path"][0], game.server["base_url"]
            server = serving(server_command(game, model), url, model, logs / f"server_{attempt}.log", lock)
            stack.enter_context(server)
        run_command(stage, log_path, lock)
    counts = check_outputs(stage)
    run: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1), "attempts": attempt, "counts": counts}
    run |= {"seed": game.seed, "commit": git_commit(), "versions": {name: version(name) for name in PACKAGES}}
    run |= {"host": socket.gethostname(), "finished": datetime.now().astimezone().isoformat(timespec="seconds")}
    records.finish(stage, started | run)
    words = "; ".join(f"{name} {value:g}" for name, value in counts.items())
    print(f"{datetime.now():%H:%M:%S} {stage.label}: done in {run['seconds']:.0f} s; {words}", flush=True)


def play(game: Game, stages: list[Stage], wanted: list[Stage], lock: int) -> None:
    """Checks what is done, and runs the rest of the stages that are wanted."""
    print(describe_game(game))
    game.check_files()
    records = Records(stages)
    records.load()
    todo = [stage for stage in wanted if stage.label not in records.done]
    print(f"  {len(stages)} stages, {len(records.done)} of them done, {len(todo)} to run", flush=True)
    settings_path = Path(game.output_dir, "game.json")
    if read_json(settings_path) != asdict(game):
        check_flags([stage for stage in stages if stage.label not in records.done])
        write_json(settings_path, asdict(game))
    for stage in todo:
        run_stage(game, stage, records, lock)
        if game.keep_models == "last":
            delete_old_models(records)
    print(f"{len(records.done)} of {len(stages)} stages are done: {game.output_dir}")


@exit_on_input_error
def main() -> None:
    """Parse -> plan -> print, move or play."""
    setup_logging()
    args = parse_args()
    changes = {name: getattr(args, name) for name in ("rounds", "align_type", "seed", "output_dir")}
    changes["apo"] = args.apo and args.apo == "true"
    game = read_game(args.config, {name: value for name, value in changes.items() if value is not None})
    stages = plan_game(game)
    wanted = stages[: stages.index(find_stage(stages, args.until, "--until")) + 1] if args.until else stages
    if args.dry_run:
        print(shell_script(game, wanted))
        return
    if args.status:
        print_status(stages)
        return
    if args.report:
        write_report(game, stages)
        return
    folder = Path(game.output_dir)
    with locked(folder / "play", wait=False), lock_of_processes(folder / "processes.lock") as lock:
        if args.redo:
            move_aside(game, Records(stages).made_from(find_stage(stages, args.redo, "--redo").label))
        else:
            play(game, stages, wanted, lock)
            write_report(game, stages)


if __name__ == "__main__":
    main()
