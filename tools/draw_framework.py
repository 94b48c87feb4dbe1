"""Draws figures/apo_framework.png, the game between the reward model and the LLM, as the README shows it.

python tools/draw_framework.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

REPO_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO_ROOT))
from preference_records import OneLineParser, exit_on_input_error, replacing

WIDTH, HEIGHT = 12.0, 4.98  # inches; one unit of the drawing is one inch
BOX_WIDTH, BOX_HEIGHT, BOX_Y = 4.2, 2.4, 1.38  # of a player
LEFT_BOX, RIGHT_BOX = 0.3, WIDTH - 0.3 - BOX_WIDTH
INK, MUTED = "#1f2933", "#5f6c7b"
RM, LLM, GOLD, DATA = ("#2b6cb0", "#e8f1fb"), ("#b7561c", "#fdf0e6"), ("#8a6d0b", "#fdf7dc"), ("#52606d", "#f3f5f7")
BOLD, SMALL = {"fontweight": "bold"}, {"fontsize": 11, "color": MUTED}


def draw_box(axis: Any, corner: tuple[float, float], size: tuple[float, float], colors: tuple[str, str]) -> None:
    """A rounded box with its lower left corner at `corner`; colors are (edge, face)."""
    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=style, edgecolor=colors[0], facecolor=colors[1], linewidth=1.6)
    )


def draw_lines(axis: Any, center: float, top: float, lines: list[tuple[str, dict[str, Any]]]) -> None:
    """Lines of text below one another, centred, the first one at height `top`."""
    for text, style in lines:
        size = style.get("fontsize", 12.5)
        axis.text(center, top, text, ha="center", va="top", **{"fontsize": size, "color": INK, **style})
        top -= size * 1.74 / 72


def draw_arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], color: str = MUTED) -> None:
    """A straight arrow."""
    look = {"arrowstyle": "-|>", "mutation_scale": 15, "linewidth": 1.8, "color": color, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, **look))


def draw_objective(axis: Any) -> None:
    """The min-max game, on top."""
    objective = (
        r"$\min_{r}\ \max_{\pi}\ \ \mathbb{E}_{x,\ y\sim\pi}[\,r(x,y)\,]\ -\ "
        r"\mathbb{E}_{(x,y)\sim P_{\mathrm{gold}}}[\,r(x,y)\,]$"
    )
    rounds = (
        "round after round: the reward model holds the two apart, the LLM closes the gap, both near where they began"
    )
    draw_lines(axis, WIDTH / 2, HEIGHT - 0.16, [(objective, {"fontsize": 19}), (rounds, SMALL)])


def draw_players(axis: Any) -> None:
    """The two boxes: what each player does in its step."""
    rank_human = (
        r"$\mathcal{L}_{\mathrm{RM}}\ =\ \beta\ \mathcal{L}_{\mathrm{rank}}(\mathrm{chosen} \succ \mathrm{rejected})$"
    )
    rank_golden = r"$\qquad\ \ \,+\ \mathcal{L}_{\mathrm{rank}}(\mathrm{golden} \succ \mathrm{sampled})$"
    rank = r"$\mathcal{L}_{\mathrm{rank}}\ =\ -\log\,\sigma(\,r(x,y^{+}) - r(x,y^{-})\,)$"
    rm_lines = [
        ("RM step", {**BOLD, "fontsize": 16, "color": RM[0]}),
        (r"train the reward model  $r$", {}),
        (" ", {"fontsize": 2}),
        (rank_human, {"fontsize": 13}),
        (rank_golden, {"fontsize": 13}),
        (rank, {"fontsize": 13}),
        (" ", {"fontsize": 1}),
        ("each round anew from the pretrained model", SMALL),
    ]
    llm_lines = [
        ("LLM step", {**BOLD, "fontsize": 16, "color": LLM[0]}),
        (r"align the policy  $\pi$", {}),
        (" ", {"fontsize": 2}),
        ("sample 4 answers to each prompt,", {"fontsize": 12.5}),
        (r"score them with  $r$,  learn from the scores:", {"fontsize": 12.5}),
        ("best of 4 (RJS),  RRHF  or  DPO", {**BOLD, "fontsize": 12.5}),
        (" ", {"fontsize": 2}),
        ("each round on from the last one", SMALL),
    ]
    for x, colors, lines in ((LEFT_BOX, RM, rm_lines), (RIGHT_BOX, LLM, llm_lines)):
        draw_box(axis, (x, BOX_Y), (BOX_WIDTH, BOX_HEIGHT), colors)
        draw_lines(axis, x + BOX_WIDTH / 2, BOX_Y + BOX_HEIGHT - 0.22, lines)


def draw_game(axis: Any) -> None:
    """Between the boxes: what passes from player to player, and where each one pushes the answers."""
    start, end = LEFT_BOX + BOX_WIDTH + 0.06, RIGHT_BOX - 0.06
    middle = WIDTH / 2
    top, bottom = BOX_Y + BOX_HEIGHT - 0.4, BOX_Y + 0.4
    draw_arrow(axis, (start, top), (end, top), RM[0])
    draw_lines(axis, middle, top + 0.32, [(r"rewards  $r(x,y)$", {"color": RM[0], **BOLD})])
    draw_arrow(axis, (end, bottom), (start, bottom), LLM[0])
    draw_lines(axis, middle, bottom - 0.1, [(r"sampled answers  $y\sim\pi$", {"color": LLM[0], **BOLD})])

    # A reward axis: sampled answers on the left, golden ones on the right.
    line = (top + bottom) / 2 - 0.02
    draw_arrow(axis, (middle - 1.3, line), (middle + 1.38, line), MUTED)
    axis.plot([middle - 1.02, middle - 0.86, middle - 0.66], [line] * 3, "o", color=LLM[0], markersize=8.5)
    axis.plot([middle + 0.66, middle + 0.84, middle + 1.0], [line] * 3, "D", color=GOLD[0], markersize=7.5)
    labels = {"va": "center", "fontsize": 10.5}
    axis.text(middle - 0.84, line + 0.24, "sampled", ha="center", color=LLM[0], **labels)
    axis.text(middle + 0.83, line + 0.24, "golden", ha="center", color=GOLD[0], **labels)
    axis.text(middle + 1.4, line - 0.16, "reward", ha="right", color=MUTED, **{**labels, "fontsize": 9.5})
    draw_arrow(axis, (middle - 0.42, line + 0.17), (middle + 0.32, line + 0.17), LLM[0])
    axis.text(middle - 0.05, line + 0.34, "LLM", ha="center", color=LLM[0], **labels, **BOLD)
    draw_arrow(axis, (middle + 0.32, line - 0.17), (middle - 0.42, line - 0.17), RM[0])
    axis.text(middle - 0.05, line - 0.36, "RM", ha="center", color=RM[0], **labels, **BOLD)


def draw_data(axis: Any) -> None:
    """The data, below the player that reads it."""
    size = (1.98, 0.74)
    boxes = (
        (LEFT_BOX, DATA, "human pairs", "chosen, rejected"),
        (LEFT_BOX + BOX_WIDTH - size[0], GOLD, "golden answers", "annotated once"),
        (RIGHT_BOX + (BOX_WIDTH - size[0]) / 2, DATA, "prompts  x", "the LLM's share"),
    )
    for x, colors, name, note in boxes:
        draw_box(axis, (x, 0.22), size, colors)
        center = x + size[0] / 2
        draw_lines(axis, center, 0.22 + size[1] - 0.12, [(name, {**BOLD, "color": colors[0]}), (note, SMALL)])
        draw_arrow(axis, (center, 0.22 + size[1] + 0.05), (center, BOX_Y - 0.05))


def draw_framework() -> Any:
    """The drawing as a matplotlib figure."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axis.axis("off")
    draw_objective(axis)
    draw_players(axis)
    draw_game(axis)
    draw_data(axis)
    return figure


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    example = "example:\n  python tools/draw_framework.py --output_dir figures"
    parser = OneLineParser(description="Draws the framework of APO.", epilog=example)
    parser.add_argument("--output_dir", type=Path, default=REPO_ROOT / "figures", help="folder (default: figures)")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Draws the figure and saves it; the same matplotlib gives the same bytes."""
    path = parse_args().output_dir / "apo_framework.png"
    with replacing(path) as temporary:
        draw_framework().savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
