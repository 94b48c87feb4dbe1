"""What a run leaves beside the model."""

import hashlib
import subprocess

import numpy as np
import pytest
from conftest import E2E, REPO_ROOT, read_json

from apo import figures, run_files
from apo.figures import plot_training_curves, save_calibration
from apo.run_files import git_commit, write_manifest, write_model_card, write_results

PNG = b"\x89PNG\r\n"


def test_manifest_names_inputs_versions_commit_and_seed(tmp_path):
    path = str(E2E / "eval_a.json")
    write_manifest(str(tmp_path), {"seed": 7, "world_size": 2, "learning_rate": 1e-6}, [path])
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["data"] == {path: hashlib.sha256((E2E / "eval_a.json").read_bytes()).hexdigest()}
    assert (manifest["seed"], manifest["num_processes"]) == (7, 2)
    assert {"torch", "transformers", "deepspeed", "datasets"} <= manifest["packages"].keys()
    assert manifest["commit"] == git_commit()
    assert read_json(tmp_path / "arguments.json")["learning_rate"] == 1e-6


def test_commit_is_the_one_of_the_checkout(monkeypatch, tmp_path):
    if not (REPO_ROOT / ".git").exists():
        pytest.skip("no checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert git_commit().removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setattr(run_files, "__file__", str(tmp_path / "apo" / "run_files.py"))
    assert git_commit() == "unknown"


def test_results_of_several_splits_are_merged(tmp_path):
    write_results(str(tmp_path), "train", {"train_loss": 0.5, "epoch": 1.0})
    write_results(str(tmp_path), "eval", {"eval_loss": 0.25, "epoch": 2.0})
    assert read_json(tmp_path / "train_results.json") == {"train_loss": 0.5, "epoch": 1.0}
    assert read_json(tmp_path / "eval_results.json") == {"eval_loss": 0.25, "epoch": 2.0}
    assert read_json(tmp_path / "all_results.json") == {"train_loss": 0.5, "eval_loss": 0.25, "epoch": 2.0}


def drawn_curves(tmp_path, monkeypatch, log_history) -> list[dict[str, list]]:
    """{label: [steps, values]} of each panel."""
    panels = []
    new_figure = figures.new_figure

    def keep(num_panels):
        figure, axes = new_figure(num_panels)
        panels.extend(axes)
        return figure, axes

    monkeypatch.setattr(figures, "new_figure", keep)
    plot_training_curves(str(tmp_path), log_history)
    return [
        {line.get_label(): [line.get_xdata().tolist(), line.get_ydata().tolist()] for line in axis.get_lines()}
        for axis in panels
    ]


def test_curves_show_training_and_each_evaluation_set(tmp_path, monkeypatch):
    log_history = [
        {"step": 0, "eval_b.json_loss": 0.7, "eval_b.json_accuracy": 0.5, "eval_b.json_margin": 0.0},
        {"step": 1, "loss": 0.6, "accuracy": 0.75, "margin": 0.1},
        {"step": 2, "loss": 0.5, "accuracy": 1.0, "margin": 0.2},
        {"step": 2, "eval_b.json_loss": 0.4, "eval_b.json_accuracy": 1.0, "eval_b.json_margin": 0.3},
    ]
    loss, accuracy, margin = drawn_curves(tmp_path, monkeypatch, log_history)
    assert loss == {"training": [[1, 2], [0.6, 0.5]], "b.json": [[0, 2], [0.7, 0.4]]}
    assert accuracy == {"training": [[1, 2], [0.75, 1.0]], "b.json": [[0, 2], [0.5, 1.0]]}
    assert margin["b.json"] == [[0, 2], [0.0, 0.3]]
    assert (tmp_path / "training_curves.png").read_bytes().startswith(PNG)


def test_curves_of_a_run_too_short_to_log_are_empty(tmp_path):
    plot_training_curves(str(tmp_path), [{"step": 1, "train_loss": 0.5}])
    assert (tmp_path / "training_curves.png").read_bytes().startswith(PNG)


def test_reliability_diagram_is_saved_with_its_numbers(tmp_path):
    curve = {"count": np.array([3, 1]), "confidence": np.array([0.25, 0.75]), "accuracy": np.array([0.0, 1.0])}
    save_calibration(str(tmp_path), "b/eval.json", {5: curve, 10: curve})
    numbers = read_json(tmp_path / "calibration_b_eval.json")
    assert numbers["5"] == numbers["10"] == {"count": [3, 1], "confidence": [0.25, 0.75], "accuracy": [0.0, 1.0]}
    assert (tmp_path / "calibration_b_eval.png").read_bytes().startswith(PNG)


def test_model_card_shows_settings_and_metrics(tmp_path):
    metrics = {f"eval_b.json_{name}": value for name, value in [("accuracy", 0.625), ("pairs", 8), ("margin", 0.5)]}
    results = {"b.json": metrics | {"eval_b.json_loss": 0.25}, "no_pairs.json": {"eval_no_pairs.json_loss": 0.0}}
    write_model_card(str(tmp_path), "base/llama", {"pooling_type": "last", "max_length": 512}, results)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "`base/llama`" in card
    assert "| pooling_type | last |" in card and "| max_length | 512 |" in card
    assert "| b.json | 0.6250 | 8 | 0.5000 | 0.2500 |" in card
    assert "no_pairs" not in card
