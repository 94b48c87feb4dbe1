"""Prints the evaluation results of several runs side by side, with confidence intervals.

    python tools/compare_runs.py outputs/rm_base outputs/rm_apo

Intervals are Wilson's, at 95 %. They assume independent pairs; pairs of several samples for one prompt are not quite.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from apo.cli import InputError, OneLineParser, exit_on_input_error, refuse
from apo.run_files import format_table, read_json
from apo.statistics import wilson_interval
from reward_datasets import name_datasets

COLUMNS = ("evaluation set", "run", "accuracy %", "95 % interval", "pairs", "ties", "margin")


def read_results(run_dir: str) -> dict[str, dict[str, float]]:
    """Reads the metrics of a run on each evaluation set, {set: {metric: value}}."""
    path = Path(run_dir, "final_eval_results.json")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the --output_dir of a run that evaluated")
    results = read_json(path)
    if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
        raise InputError(f"{path}: found no object of evaluation sets; expected a file that train.py wrote")
    return results


def head_mark(run_dir: str) -> str:
    """Says that the rewards of a run were random: its model had no reward head and was not trained."""
    path = Path(run_dir, "eval_results.json")
    head = read_json(path).get("reward_head") if path.is_file() else None
    return f", head {head}" if head else ""


def find_hash(run_dir: str, name: str) -> str | None:
    """Returns the sha256 of an evaluation set, as the manifest has it for the last run that read it."""
    path = Path(run_dir, "manifest.json")
    manifest = read_json(path) if path.is_file() else {}
    files = [file for run in manifest.get("runs", [manifest]) for file in run.get("data", {}).items()]
    return next((sha256 for path, sha256 in reversed(files) if f"/{path}".endswith(f"/{name}")), None)


def check_same_data(name: str, hashes: dict[str, str | None], allow_changes: bool) -> None:
    """Refuses results of one name on different files, and warns of results whose files are not known."""
    known = {*hashes.values()} - {None}
    if len(known) > 1 or (None in hashes.values() and len(hashes) > 1):
        found = "; ".join(f"sha256 {sha256 or 'not in the manifest'} in {run}" for run, sha256 in hashes.items())
        refuse(f"{name}: expected the same data in all runs, found {found}", allow_changes or len(known) < 2)


def format_row(name: str, run: str, metrics: dict[str, float], bins: int) -> tuple[str, ...]:
    """One row of the table; "-" where the run did not measure a value."""
    found = {key.removeprefix(f"eval_{name}_"): value for key, value in metrics.items()}
    num_pairs = found.get("pairs", 0)
    if not num_pairs:
        return (name, run, "-", "-", "0", "-", "-", "-")
    accuracy = found["accuracy"]
    interval = "{:.1f} to {:.1f}".format(*(100 * bound for bound in wilson_interval(accuracy, num_pairs)))
    ece = found.get(f"calibration_ECE_bin{bins}")
    last = (f"{found['margin']:.3f}", "-" if ece is None else f"{ece:.3f}")
    return (name, run, f"{100 * accuracy:.1f}", interval, str(num_pairs), str(found["ties"]), *last)


def compare(results: dict[str, dict[str, dict[str, float]]], bins: int) -> list[tuple[str, ...]]:
    """Rows of the table, from {run: {set: {metric: value}}}: one set after another, each with all its runs."""
    names = dict.fromkeys(name for sets in results.values() for name in sets)
    return [format_row(name, run, sets[name], bins) for name in names for run, sets in results.items() if name in sets]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", help="output folders of runs that evaluated")
    parser.add_argument("--bins", type=int, default=10, help="bins of the calibration error (default: 10)")
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
    rows = compare({run + head_mark(run_dirs[run]): sets for run, sets in results.items()}, args.bins)
    print(format_table((*COLUMNS, f"ECE, {args.bins} bins"), rows, num_text_columns=2))


if __name__ == "__main__":
    main()
