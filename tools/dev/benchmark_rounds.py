"""What all modes of `benchmark.py` share: the files of the data, the rounds, their medians and ratios, the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from apo.cli import InputError
from apo.run_files import format_table

RATIOS = {  # of times to those of the first contestant
    "seconds": "first_is_faster",
    "step_seconds": "first_is_faster_in_steps",
    "cpu_seconds": "first_uses_less_cpu",
}
Row = dict[str, Any]


def find_files(data_dir: str) -> tuple[Path, Path, Path]:
    """The files of an hh-split folder: human pairs, golden responses, sampled responses."""
    folder = Path(data_dir, "rm_data")
    sampled = sorted(folder.glob("hh_split_rm_*.sample.json"))
    if not sampled:
        raise InputError(f"{data_dir}: found no rm_data/hh_split_rm_*.sample.json; expected the hh-split layout")
    return folder / "hh_split_rm.train.json", folder / "hh_split_rm.golden.json", sampled[0]


def draw_rounds(rows: Iterable[Row], num_rounds: int, num_items: int) -> list[list[Row]]:
    """Divides rows into rounds of `num_items`; rows are repeated only if there are too few."""
    drawn = list(itertools.islice(rows, num_rounds * num_items))
    if len(drawn) < num_items:
        raise InputError(f"--batch_size, --num_batches: found {len(drawn)} items, expected {num_items}; lower one")
    endless = itertools.cycle(drawn)
    return [list(itertools.islice(endless, num_items)) for _ in range(num_rounds)]


def summarize(results: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and the ratios of the times to those of the first contestant, within each round."""
    base, *_ = results.values()
    summary = {}
    for name, rounds in results.items():
        values: dict[str, Any] = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
        for key, ratio in RATIOS.items():
            if key in rounds[0]:
                ratios = [r[key] / b[key] for r, b in zip(rounds, base, strict=True)]
                values |= {ratio: float(np.median(ratios)), f"{ratio}_range": [min(ratios), max(ratios)]}
        summary[name] = {**values, "rounds": rounds}
    return summary


def format_race(summary: dict[str, dict[str, Any]]) -> str:
    """The table of one workload; the ranges and rounds are in the file only."""
    keys = [key for key, value in next(iter(summary.values())).items() if isinstance(value, float)]
    rows = [(name, *(f"{values[key]:.5g}" for key in keys)) for name, values in summary.items()]
    return format_table(("contestant", *keys), rows)
