"""The files of a run beside the model, and Markdown tables."""

import hashlib
import subprocess

import pytest
from conftest import E2E, REPO_ROOT, read_json

from apo import run_files
from apo.cli import InputError
from apo.run_files import format_table, git_commit, write_manifest, write_model_card, write_results


def test_manifest_names_inputs_versions_commit_and_seed(tmp_path):
    path = str(E2E / "eval_a.json")
    write_manifest(str(tmp_path), {"seed": 7, "world_size": 2, "learning_rate": 1e-6}, [path])
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["data"] == {path: hashlib.sha256((E2E / "eval_a.json").read_bytes()).hexdigest()}
    assert (manifest["seed"], manifest["num_processes"]) == (7, 2)
    assert {"torch", "transformers", "deepspeed", "datasets"} <= manifest["packages"].keys()
    assert manifest["commit"] == git_commit()
    assert read_json(tmp_path / "arguments.json")["learning_rate"] == 1e-6


def test_manifest_keeps_the_history(tmp_path):
    """The first one is of a version that kept none."""
    path = tmp_path / "manifest.json"
    path.write_text('{"seed": 0}', encoding="utf-8")
    for seed in (1, 2):
        write_manifest(str(tmp_path), {"seed": seed, "world_size": 1, "task_type": "apo"}, [])
    manifest = read_json(path)
    assert [run["seed"] for run in manifest["runs"]] == [0, 1, 2]
    assert {**manifest["runs"][-1], "runs": manifest["runs"]} == manifest
    for text in ("{", "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"manifest.json: found no JSON object"):
            write_manifest(str(tmp_path), {"seed": 3, "world_size": 1}, [])


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


def test_model_card_shows_settings_and_metrics(tmp_path):
    values = {"accuracy": 0.625, "pairs": 8, "margin": 0.5, "ties": 1}
    results = {"b.json": {f"eval_b.json_{name}": value for name, value in values.items()}}
    write_model_card(str(tmp_path), "base/llama", {"pooling_type": "last", "max_length": 512}, results)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    assert card.startswith("---\n") and "trained from base/llama with" in card
    assert ["pooling_type", "last"] in cells and ["max_length", "512"] in cells
    assert ["b.json", "this model", "62.5", "30.6 to 86.3", "8", "1", "0.500", "-"] in cells


def test_model_card_shows_names_as_they_are(tmp_path):
    name = "a|b<i>`c`\nd.json"
    metrics = {f"eval_{name}_{key}": 0 for key in ("accuracy", "pairs", "margin", "loss")}
    write_model_card(str(tmp_path), name, {"pooling_type": name}, {name: metrics})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count(r"a\|b&lt;i>\`c\` d.json") == 3 and "<i>" not in card


def test_table_is_markdown_aligned_by_column():
    table = format_table(("set", "run", "pairs"), [("a.json", "x", "1"), ("b.json", "y", "1000")], num_text_columns=2)
    lines = table.splitlines()
    assert lines[1:] == ["| ------ | --- | ----: |", "| a.json | x   |     1 |", "| b.json | y   |  1000 |"]
