"""Every plot: training curves, reliability diagrams, and those of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apo.cli import replacing, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(num_panels: int, width: float = 4.5, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, side by side, each `width` x `height` inches."""
    from matplotlib.figure import Figure  # takes time that a command line without plots saves

    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def save_figure(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG; see `replacing`."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_training_curves(output_dir: str, log_history: list[dict[str, float]]) -> None:
    """Plots loss, accuracy and margin of training and each evaluation set over the steps: `training_curves.png`."""
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
    """Writes the reliability diagrams of one evaluation set to `calibration_<name>.json` and `.png`.

    Args:
        name: of the evaluation set; `/` becomes `_`.
        curves: {number of bins: `trainer.calibration_curve`}.
    """
    stem = f"{output_dir}/calibration_{name.replace('/', '_').removesuffix('.json')}"
    numbers = {bins: {key: values.tolist() for key, values in curve.items()} for bins, curve in curves.items()}
    write_json(f"{stem}.json", numbers)
    figure, axes = new_figure(len(curves))
    for (bins, curve), axis in zip(curves.items(), axes, strict=True):
        axis.plot([0, 1], [0, 1], linestyle=":", color="grey")
        axis.plot(curve["confidence"], curve["accuracy"], marker="o")
        axis.set(xlabel="predicted probability", ylabel="share preferred", title=f"{name}, {bins} bins")
    save_figure(f"{stem}.png", figure)


def plot_bars(path: str | Path, panels: dict[str, dict[str, float]], label: str) -> None:
    """Plots horizontal bars, one panel per title: `panels` is {title: {bar: value}}, `label` names the values."""
    figure, axes = new_figure(len(panels), width=4, height=3)
    for (title, bars), axis in zip(panels.items(), axes, strict=True):
        drawn = axis.barh(list(bars), list(bars.values()), color=[f"C{i}" for i in range(len(bars))])
        axis.bar_label(drawn, fmt="%.3g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set(title=title, xlabel=label)
    save_figure(path, figure)


def plot_best_of_n(path: Path, rows: list[dict[str, Any]], pairs: list[dict[str, str]]) -> None:
    """Plots the rows of `apo.selection.best_of_n`, and the lengths of "chosen" and "rejected" in `pairs`."""
    figure, (curve, histogram) = new_figure(2)
    counts, means = [row["n"] for row in rows], [row["mean"] for row in rows]
    low, high = zip(*(row["interval_95"] or (row["mean"], row["mean"]) for row in rows), strict=True)
    curve.fill_between(counts, low, high, alpha=0.3, label="95 % interval over prompts")
    curve.plot(counts, means, marker=".")
    curve.set(xlabel="responses per prompt", ylabel="expected reward of the best", title="best of n")
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend()
    sizes = [[len(pair[side]) for pair in pairs] for side in ("chosen", "rejected")]
    histogram.hist(sizes, bins=20, label=["chosen", "rejected"])
    histogram.set(xlabel="characters", ylabel="pairs", title="length")
    histogram.legend()
    save_figure(path, figure)
