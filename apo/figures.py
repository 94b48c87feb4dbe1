"""Every plot: training curves, reliability diagrams, and those of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apo.cli import replacing, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(num_panels: int, width: float = 4.5, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, side by side, each `width` x `height` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def save_figure(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
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
    """Writes the reliability diagrams of one evaluation set, one per number of bins, as JSON and as PNG.

    Args:
        output_dir: gets `calibration_<name>.json` and `.png`.
        name: of the evaluation set; `/` becomes `_`.
        curves: {number of bins: `trainer.calibration_curve`}.
    """
    stem = Path(output_dir) / f"calibration_{name.replace('/', '_').removesuffix('.json')}"
    numbers = {bins: {key: values.tolist() for key, values in curve.items()} for bins, curve in curves.items()}
    write_json(stem.with_name(stem.name + ".json"), numbers)
    figure, axes = new_figure(len(curves))
    for (bins, curve), axis in zip(curves.items(), axes, strict=True):
        axis.plot([0, 1], [0, 1], linestyle=":", color="grey")
        axis.plot(curve["confidence"], curve["accuracy"], marker="o")
        axis.set(xlabel="predicted probability", ylabel="share preferred", title=f"{name}, {bins} bins")
    save_figure(stem.with_name(stem.name + ".png"), figure)


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
