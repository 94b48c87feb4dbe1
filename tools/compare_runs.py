"""Prints the evaluation results of several runs side by side, with confidence intervals.

    python tools/compare_runs.py outputs/rm_base outputs/rm_apo

Intervals are Wilson's, at 95 %. They assume independent pairs; pairs of several samples for one prompt are not quite.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from apo.cli import InputError, OneLineParser, exit_on_input_error, read_json, refuse
from apo.run_files import format_results
from reward_datasets import name_datasets


def read_results(run_dir: str) -> dict[str, dict[str, float]]:
    """Reads the metrics of a run on each evaluation set, {set: {metric: value}}."""
    path = Path(run_dir, "final_eval_results.json")
    results = read_json(path)
    if not results or not all(isinstance(metrics, dict) for metrics in results.values()):
        raise InputError(f"{path}: no such file, or not of train.py; give the --output_dir of a run that evaluated")
    return results


def head_mark(run_dir: str) -> str:
    """Says that the rewards of a run were random: its model had no reward head and was not trained."""
    head = read_json(Path(run_dir, "eval_results.json")).get("reward_head")
    return f", head {head}" if head else ""


def find_hash(run_dir: str, name: str) -> str | None:
    """Returns the sha256 of an evaluation set, as the manifest has it for the last run that read it."""
    manifest = read_json(Path(run_dir, "manifest.json"))
    files = [file for run in manifest.get("runs", [manifest]) for file in run.get("data", {}).items()]
    return next((sha256 for path, sha256 in reversed(files) if f"/{path}".endswith(f"/{name}")), None)


def check_same_data(name: str, hashes: dict[str, str | None], allow_changes: bool) -> None:
    """Refuses results of one name on different files, and warns of results whose files are not known."""
    known = {*hashes.values()} - {None}
    if len(known) > 1 or (None in hashes.values() and len(hashes) > 1):
        found = "; ".join(f"sha256 {sha256 or 'not in the manifest'} in {run}" for run, sha256 in hashes.items())
        refuse(f"{name}: expected the same data in all runs, found {found}", allow_changes or len(known) < 2)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", help="output folders of runs that evaluated")
    parser.add_argument("--allow_changes", action="store_true", help="compare sets of one name on different data")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads the results of each run and prints one table."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse_args()
    run_dirs = name_datasets(args.run_dirs)
    results = {run: read_results(path) for run, path in run_dirs.items()}
    for name in dict.fromkeys(name for sets in results.values() for name in sets):
        hashes = {run: find_hash(run_dirs[run], name) for run in results if name in results[run]}
        check_same_data(name, hashes, args.allow_changes)
    print(format_results({run + head_mark(run_dirs[run]): sets for run, sets in results.items()}))


if __name__ == "__main__":
    main()
