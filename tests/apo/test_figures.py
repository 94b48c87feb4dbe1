"""The plots: what they show, and the numbers beside them."""

import numpy as np
import pytest
from conftest import read_json

from apo import figures
from apo.figures import plot_bars, plot_training_curves, save_calibration

PNG = b"\x89PNG\r\n"


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list:
    """The panels of the figures that are saved; no file is written."""
    panels = []
    monkeypatch.setattr(figures, "save_figure", lambda path, figure: panels.extend(figure.axes))
    return panels


def test_curves_show_training_and_each_evaluation_set(panels):
    log_history = [
        {"step": 0, "eval_b.json_loss": 0.7, "eval_b.json_accuracy": 0.5, "eval_b.json_margin": 0.0},
        {"step": 1, "loss": 0.6, "accuracy": 0.75, "margin": 0.1},
        {"step": 2, "loss": 0.5, "accuracy": 1.0, "margin": 0.2},
        {"step": 2, "eval_b.json_loss": 0.4, "eval_b.json_accuracy": 1.0, "eval_b.json_margin": 0.3},
    ]
    plot_training_curves("unused", log_history)
    loss, accuracy, margin = (
        {line.get_label(): [line.get_xdata().tolist(), line.get_ydata().tolist()] for line in axis.get_lines()}
        for axis in panels
    )
    assert loss == {"training": [[1, 2], [0.6, 0.5]], "b.json": [[0, 2], [0.7, 0.4]]}
    assert accuracy == {"training": [[1, 2], [0.75, 1.0]], "b.json": [[0, 2], [0.5, 1.0]]}
    assert margin["b.json"] == [[0, 2], [0.0, 0.3]]


def test_curves_of_a_run_too_short_to_log_are_empty(tmp_path):
    plot_training_curves(str(tmp_path), [{"step": 1, "train_loss": 0.5}])
    assert (tmp_path / "training_curves.png").read_bytes().startswith(PNG)


def test_reliability_diagram_is_saved_with_its_numbers(tmp_path):
    curve = {"count": np.array([3, 1]), "confidence": np.array([0.25, 0.75]), "accuracy": np.array([0.0, 1.0])}
    save_calibration(str(tmp_path), "b/eval.json", {5: curve, 10: curve})
    numbers = read_json(tmp_path / "calibration_b_eval.json")
    assert numbers["5"] == numbers["10"] == {"count": [3, 1], "confidence": [0.25, 0.75], "accuracy": [0.0, 1.0]}
    assert (tmp_path / "calibration_b_eval.png").read_bytes().startswith(PNG)


def test_bars_are_one_panel_per_title(panels):
    plot_bars("unused", {"hh_pairs": {"tree": 4.0, "padded": 1.5}, "apo_groups": {"tree": 5.0}}, "items/s")
    assert [axis.get_title() for axis in panels] == ["hh_pairs", "apo_groups"]
    assert [[bar.get_width() for bar in axis.patches] for axis in panels] == [[4.0, 1.5], [5.0]]
    assert {axis.get_xlabel() for axis in panels} == {"items/s"}
