"""The files of a run beside the model: arguments, manifest, results, model card; and Markdown tables."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apo.cli import InputError, read_json, replacing, sha256_of_file, write_json
from apo.statistics import wilson_interval

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy")
MARKDOWN_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", "\n": " ", "\r": " "} | {c: f"\\{c}" for c in "\\`|*["})


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int = 1) -> str:
    """Returns a Markdown table that is also aligned in a terminal: text to the left, numbers to the right."""
    columns = []
    for i, column in enumerate(zip(header, *rows, strict=True)):
        cells = [cell.translate(MARKDOWN_ESCAPES) for cell in column]
        width = max(3, *map(len, cells))
        is_text = i < num_text_columns
        rule = "-" * width if is_text else "-" * (width - 1) + ":"
        columns.append([f"{cell:{'<' if is_text else '>'}{width}}" for cell in (cells[0], rule, *cells[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def format_results(results: dict[str, dict[str, dict[str, float]]], bins: int = 10) -> str:
    """Returns the table of {run: {evaluation set: {metric: value}}}: one set after another, each with all its runs."""
    columns = ("evaluation set", "run", "accuracy %", "95 % interval", "pairs", "ties", "margin", f"ECE, {bins} bins")
    names = dict.fromkeys(name for sets in results.values() for name in sets)
    of_sets = [(name, run, sets[name]) for name in names for run, sets in results.items() if name in sets]
    return format_table(columns, [_format_row(*row, bins) for row in of_sets], num_text_columns=2)


def _format_row(name: str, run: str, metrics: dict[str, float], bins: int) -> tuple[str, ...]:
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


def git_commit() -> str:
    """Returns the commit of this checkout, with "-dirty" when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_manifest(output_dir: str, arguments: dict[str, Any], data_paths: list[str]) -> None:
    """Writes `arguments.json` (every flag) and `manifest.json` (inputs, versions, commit, seed, all `runs`)."""
    write_json(Path(output_dir) / "arguments.json", arguments)
    manifest = {
        "data": {path: sha256_of_file(path) for path in data_paths},
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": git_commit(),
        "seed": arguments["seed"],
        "num_processes": arguments["world_size"],
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **{name: arguments.get(name) for name in ("task_type", "model_name_or_path")},
    }
    path = Path(output_dir) / "manifest.json"
    earlier = read_json(path)
    if path.is_file() and not earlier:
        raise InputError(f"{path}: found no JSON object; restore it, or delete it and the history of the folder")
    write_json(path, {**manifest, "runs": [*earlier.get("runs", [earlier] if earlier else []), manifest]})


def write_results(output_dir: str, split: str, metrics: dict[str, Any]) -> None:
    """Writes `<split>_results.json` and merges it into `all_results.json`."""
    write_json(Path(output_dir) / f"{split}_results.json", metrics)
    combined = Path(output_dir) / "all_results.json"
    earlier = read_json(combined)
    earlier.pop("reward_head", None)  # a mark on the results of an earlier model
    write_json(combined, {**earlier, **metrics})


def write_model_card(output_dir: str, base_model: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes `README.md`: what the model is, how to score with it, its settings and its metrics."""
    settings_table = format_table(("setting", "value"), [(name, str(settings[name])) for name in settings], 2)
    card = f"""---
library_name: transformers
tags: [reward-model, preference-learning, adversarial-preference-optimization]
---

Reward model, trained from {base_model.translate(MARKDOWN_ESCAPES)} with the preference losses of arXiv:2311.08045.
A reward is an unbounded scalar; only differences between responses to the same prompt have a meaning.

Scoring: `python train.py --task_type inference --model_name_or_path MODEL_FOLDER --data_type reject_sample \
--eval_data_path samples.json --output_dir scores`; the settings below are read from `config.json`.

{settings_table}

{format_results({"this model": results})}
"""
    with replacing(Path(output_dir) / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
