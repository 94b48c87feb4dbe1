"""What a run leaves beside the model: results, manifest, curves, reliability diagrams, model card."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preference_records import replacing, sha256_of_file, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "sentencepiece", "numpy")
Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share that was observed in `count` independent trials.

    Returns:
        (low, high) within [0, 1].
    """
    assert 0 <= share <= 1 and count > 0, (share, count)
    spread = Z_95**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def git_commit() -> str:
    """The commit of this checkout, with "-dirty" when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_manifest(output_dir: str, arguments: dict[str, Any], data_paths: list[str]) -> None:
    """Writes `arguments.json` (every resolved flag) and `manifest.json` (inputs, versions, commit, seed)."""
    write_json(Path(output_dir) / "arguments.json", arguments)
    manifest = {
        "data": {path: sha256_of_file(path) for path in data_paths},
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": git_commit(),
        "seed": arguments["seed"],
        "num_processes": arguments["world_size"],
    }
    write_json(Path(output_dir) / "manifest.json", manifest)


def write_results(output_dir: str, split: str, metrics: dict[str, Any]) -> None:
    """Writes `<split>_results.json` and merges it into `all_results.json`."""
    write_json(Path(output_dir) / f"{split}_results.json", metrics)
    combined = Path(output_dir) / "all_results.json"
    earlier = json.loads(combined.read_text(encoding="utf-8")) if combined.is_file() else {}
    write_json(combined, {**earlier, **metrics})


def new_figure(num_panels: int, width: float = 4.5, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, side by side, each of so many inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def save_figure(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_training_curves(output_dir: str, log_history: list[dict[str, float]]) -> None:
    """Draws loss, accuracy and margin over the steps, training and each evaluation set, to `training_curves.png`."""
    names = ("loss", "accuracy", "margin")
    losses = {key for log in log_history for key in log if key.startswith("eval_") and key.endswith("_loss")}
    eval_sets = sorted(key.removeprefix("eval_").removesuffix("_loss") for key in losses)
    figure, axes = new_figure(len(names))
    for name, axis in zip(names, axes, strict=True):
        curves = {"training": name, **{eval_set: f"eval_{eval_set}_{name}" for eval_set in eval_sets}}
        for color, (label, key) in enumerate(curves.items()):
            points = [(log["step"], log[key]) for log in log_history if key in log]
            axis.plot(*np.transpose(points or [(np.nan, np.nan)]), marker=".", color=f"C{color % 10}", label=label)
        axis.set(xlabel="step", title=name)
    axes[0].legend(fontsize=7)
    save_figure(Path(output_dir) / "training_curves.png", figure)


def save_calibration(output_dir: str, name: str, curves: dict[int, dict[str, np.ndarray]]) -> None:
    """Writes the reliability diagram of one evaluation set, per number of bins: numbers as JSON, and a PNG."""
    stem = Path(output_dir) / f"calibration_{name.replace('/', '_').removesuffix('.json')}"
    numbers = {bins: {key: values.tolist() for key, values in curve.items()} for bins, curve in curves.items()}
    write_json(stem.with_name(stem.name + ".json"), numbers)
    figure, axes = new_figure(len(curves))
    for (bins, curve), axis in zip(curves.items(), axes, strict=True):
        axis.plot([0, 1], [0, 1], linestyle=":", color="grey")
        axis.plot(curve["confidence"], curve["accuracy"], marker="o")
        axis.set(xlabel="predicted probability", ylabel="share preferred", title=f"{name}, {bins} bins")
    save_figure(stem.with_name(stem.name + ".png"), figure)


def write_model_card(output_dir: str, base_model: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes `README.md`: what the model is, how to score with it, its settings and its metrics."""
    rows = [
        f"| {name} | {metrics[f'eval_{name}_accuracy']:.4f} | {metrics[f'eval_{name}_pairs']} "
        f"| {metrics[f'eval_{name}_margin']:.4f} | {metrics[f'eval_{name}_loss']:.4f} |"
        for name, metrics in results.items()
        if f"eval_{name}_accuracy" in metrics
    ]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [reward-model, preference-learning, adversarial-preference-optimization]",
        "---",
        "",
        f"Reward model, trained from `{base_model}` with the preference losses of arXiv:2311.08045.",
        "A reward is an unbounded scalar; only differences between answers to the same prompt carry meaning.",
        "",
        "Scoring: `python train.py --task_type inference --model_name_or_path <this folder> --data_type reject_sample "
        "--eval_data_path <file> --output_dir <folder>`; the settings below are read from `config.json`.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "| evaluation set | accuracy | pairs | margin | loss |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    (Path(output_dir) / "README.md").write_text("\n".join(lines), encoding="utf-8")
