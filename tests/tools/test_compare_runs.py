"""tools/compare_runs.py: the rows of the table, and what it refuses."""

import sys
from pathlib import Path

import pytest
from conftest import run_tool, write_records

from apo.cli import InputError
from apo.run_files import format_results
from tools.compare_runs import main, read_results


def metrics_of(name: str, accuracy: float, pairs: int, **extra: float) -> dict[str, float]:
    values = {"accuracy": accuracy, "pairs": pairs, "ties": 0, "margin": 0.5, **extra}
    return {f"eval_{name}_{key}": value for key, value in values.items()}


def write_run(folder: Path, results: object) -> Path:
    write_records(folder / "final_eval_results.json", results)
    return folder


def cells_of(results: dict, bins: int = 10) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in format_results(results, bins).splitlines()[2:]
    ]


def test_runs_are_grouped_by_evaluation_set():
    """Set a was evaluated by both runs, b by the second only."""
    results = {
        "base": {"a.json": metrics_of("a.json", 0.5, 10)},
        "apo": {"a.json": metrics_of("a.json", 0.6, 10), "b.json": metrics_of("b.json", 0.7, 10)},
    }
    assert [row[:3] for row in cells_of(results)] == [
        ["a.json", "base", "50.0"],
        ["a.json", "apo", "60.0"],
        ["b.json", "apo", "70.0"],
    ]


def test_ece_of_the_chosen_bins_is_shown_if_it_was_measured():
    run = {"base": {"a.json": metrics_of("a.json", 0.5, 10, calibration_ECE_bin5=0.04321, calibration_ECE_bin10=0.1)}}
    assert [cells_of(run, bins)[0][-1] for bins in (5, 20)] == ["0.043", "-"]


def test_set_without_a_pair_has_no_accuracy():
    [row] = cells_of({"base": {"a.json": {"eval_a.json_pairs": 0, "eval_a.json_mean_reward": 0.1}}})
    assert row[2:4] == ["-", "-"]


def test_runs_of_the_same_name_get_different_labels(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / seed / "rm" for seed in ("seed_1", "seed_2")]
    for folder in folders:
        write_run(folder, {"a.json": metrics_of("a.json", 0.5, 10)})
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, folders)])
    main()
    output = capsys.readouterr().out
    assert "ECE, 10 bins" in output and "seed_1/rm" in output and "seed_2/rm" in output


def test_run_with_a_random_head_is_marked(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "base", {"a.json": metrics_of("a.json", 0.5, 10)})
    write_records(folder / "eval_results.json", {"reward_head": "initialised (seed 42)"})
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(folder)])
    main()
    assert "base, head initialised (seed 42)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hashes", "status", "line"),
    [
        (["0", "0"], 0, ""),
        (["0", "1"], 2, "a.json: expected the same data in all runs, found sha256 0 in run_0; sha256 1 in run_1, or"),
        (["0", None], 0, "found sha256 0 in run_0; sha256 not in the manifest in run_1"),
    ],
)
def test_sets_of_one_name_are_the_same_data(tmp_path, hashes, status, line):
    """The last run that read the file counts; others in the same folder, before and after it, do not."""
    for i, sha256 in enumerate(hashes):
        folder = write_run(tmp_path / f"run_{i}", {"a.json": metrics_of("a.json", 0.5, 10)})
        runs = [{"data": {"x/a.json": "old"}}, {"data": {"train/a.json": "no", "x/a.json": sha256}}, {"data": {}}]
        if sha256:
            write_records(folder / "manifest.json", {"data": {}, "runs": runs})
    folders = sorted(tmp_path.iterdir())
    done = run_tool("compare_runs.py", *folders, exit_status=status)
    assert line in done.stderr and len(done.stderr.splitlines()) == (1 if line else 0)
    assert "a.json" in run_tool("compare_runs.py", *folders, "--allow_changes").stdout


def test_missing_results_end_in_one_line(tmp_path):
    done = run_tool("compare_runs.py", tmp_path, exit_status=2)
    assert done.stderr.startswith("error: ") and "final_eval_results.json: no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ["[1]", "{", '{"a.json": 0.5}'])
def test_other_and_broken_json_is_refused(tmp_path, content):
    (tmp_path / "final_eval_results.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"not of train\.py"):
        read_results(tmp_path)
