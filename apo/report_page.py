"""The page of a game: its report as one HTML file, with figures as SVG inside; it needs nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.cli import replacing, write_json
from apo.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report_page.html")
COLORS = {"own": "#c44e52", "testing": "#2a6f97", "judge": "#3a7d44", "grey": "#777777"}
NONE = "–"

# ------------------------------------------------------------------------------------------------ numbers


def number(value: float | None, digits: int = 0, scale: float = 1, sign: str = "") -> str:
    """Returns a number with thousands separated; with `sign` "+" also that of positive ones; a dash for None."""
    return NONE if value is None else f"{scale * value:{sign},.{digits}f}".replace("-", "−")


def interval(figure: Mapping[str, Any], *form: Any) -> str:
    """Returns "2.10 to 2.41"; an empty text without an interval. `form` is that of `number`."""
    return " to ".join(number(bound, *form) for bound in figure["interval_95"] or [])


# ------------------------------------------------------------------------------------------------ figures


def to_svg(name: str, draw: Callable[[], Figure], description: str) -> str:
    """Returns a figure as an SVG element, the same text each time; its ids begin with `name`."""
    import matplotlib

    buffer = io.StringIO()
    style = {
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        draw().savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def plot_rounds(
    axis: Axes, rows: Sequence[tuple[int, Mapping[str, Any]]], label: str, color: str, **more: Any
) -> None:
    """Plots figures with their intervals over the rounds."""
    scale = more.pop("scale", 1)
    rounds, means = [k for k, _ in rows], [scale * figure["mean"] for _, figure in rows]
    bounds = [figure["interval_95"] or (figure["mean"], figure["mean"]) for _, figure in rows]
    errors = [
        [mean - scale * low for mean, (low, _) in zip(means, bounds, strict=True)],
        [scale * high - mean for mean, (_, high) in zip(means, bounds, strict=True)],
    ]
    axis.errorbar(rounds, means, yerr=errors, marker="o", markersize=4, capsize=3, color=color, label=label)


def finish_rounds(axis: Axes, title: str, ylabel: str, rounds: int, first: int = 0) -> None:
    """Labels an axis of rounds."""
    axis.set(title=title, xlabel="round", ylabel=ylabel, xticks=range(first, rounds + 1))
    axis.set_xlim(first - 0.3, rounds + 0.3)


def draw_llms(report: Mapping[str, Any]) -> Figure:
    """Reward by the testing RM, and share of flawless responses if there is a judge."""
    rows = report["llm"]
    judged = [(row["round"], row["judge"]["flawless"]) for row in rows if row["judge"]]
    figure, axes = new_figure(1 + bool(judged), width=4, height=2.7)
    rewards = [(row["round"], row["testing_reward"]) for row in rows if row["testing_reward"]]
    plot_rounds(axes[0], rewards, "testing RM", COLORS["testing"])
    finish_rounds(axes[0], "Reward by the testing RM", "mean over prompts", report["rounds"])
    if judged:
        plot_rounds(axes[1], judged, "judge", COLORS["judge"], scale=100)
        finish_rounds(axes[1], "Flawless responses, by rule", "share in %", report["rounds"])
    return figure


def draw_gains(report: Mapping[str, Any]) -> Figure:
    """Gain by the RMs that the LLM learnt from against the gain by the testing RM."""
    rows = report["gains_in_sd"]
    start = (0, {"mean": 0.0, "interval_95": None})
    figure, [axis] = new_figure(1, width=4.8, height=2.8)
    for name, label in (("own", "RMs of the rounds (they train the LLM)"), ("testing", "testing RM")):
        plot_rounds(axis, [start, *((row["round"], row[name]) for row in rows)], label, COLORS[name])
    axis.axhline(0, color=COLORS["grey"], linewidth=0.8)
    finish_rounds(axis, "Gain since LLM 0", "standard deviations", report["rounds"])
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_rms(report: Mapping[str, Any]) -> Figure:
    """Accuracy of each round's RM on each file of pairs."""
    figure, [axis] = new_figure(1, width=4.8, height=2.8)
    names = dict.fromkeys(row["data"] for rm in report["rm"] for row in rm["evaluations"])
    for color, name in enumerate(names):
        rows = [(rm["round"], row) for rm in report["rm"] for row in rm["evaluations"] if row["data"] == name]
        plot_rounds(axis, [(k, row["accuracy"]) for k, row in rows], name, f"C{color}", scale=100)
    axis.axhline(50, color=COLORS["grey"], linestyle=":", linewidth=1)
    finish_rounds(axis, "Accuracy of the RMs; 50 % is chance", "accuracy in %", report["rounds"], first=1)
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_best_of_n(report: Mapping[str, Any]) -> Figure:
    """Expected reward of the best of n responses against the KL divergence of taking it."""
    figure, [axis] = new_figure(1, width=4.8, height=2.8)
    for row in report["selection"]:
        curve, color = row["best_of_n"], f"C{row['round'] - 1}"
        kl, means = [point["kl"] for point in curve], [point["mean"] for point in curve]
        low, high = zip(*(point["interval_95"] or (point["mean"], point["mean"]) for point in curve), strict=True)
        axis.fill_between(kl, low, high, alpha=0.15, color=color)
        axis.plot(kl, means, marker="o", markersize=4, color=color, label=f"round {row['round']}")
        for point in curve:
            axis.annotate(f"n={point['n']}", (point["kl"], point["mean"]), (3, -9), textcoords="offset points", size=7)
    axis.set(title="Best of n, by the RM of the round", xlabel="log n − (n − 1)/n, in nats", ylabel="expected reward")
    axis.legend(frameon=False, fontsize=8)
    return figure


FIGURES = {
    "llm": (draw_llms, "Reward by the testing RM over the rounds"),
    "gains_in_sd": (draw_gains, "Gains by own RMs and by the testing RM over the rounds"),
    "rm": (draw_rms, "Accuracy of the RMs over the rounds"),
    "selection": (draw_best_of_n, "Expected reward of best of n"),
}

# ------------------------------------------------------------------------------------------------ page


def render_page(report: Mapping[str, Any]) -> str:
    """Returns the HTML of a report; all texts in it are escaped."""
    import jinja2

    figures = {
        name: to_svg(name, lambda draw=draw: draw(report), description)
        for name, (draw, description) in FIGURES.items()
        if report[name]
    }
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Environment(**options).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, figures=figures, number=number, interval=interval)


def write_page(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes `report.json` and `index.html`, each whole or not at all; returns the path of the page."""
    write_json(folder / "report.json", report)
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(render_page(report), encoding="utf-8")
    return folder / "index.html"
