"""tools/compare_runs.py: the interval by hand, the table, and what it refuses."""

import json
from pathlib import Path

import pytest
from conftest import run_tool

from apo.cli import InputError
from apo.statistics import wilson_interval
from tools.compare_runs import COLUMNS, compare, format_row, format_table, read_results


def metrics_of(name: str, accuracy: float, pairs: int, **extra: float) -> dict[str, float]:
    values = {"accuracy": accuracy, "pairs": pairs, "ties": 0, "margin": 0.5, **extra}
    return {f"eval_{name}_{key}": value for key, value in values.items()}


def write_run(folder: Path, results: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "final_eval_results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96: z^2/n = 0.38415; center (0.8 + 0.19207) / 1.38415 = 0.71674; half
    sqrt(0.38415 * (0.16 + 0.09604)) / 1.38415 = 0.31362 / 1.38415 = 0.22658; so 0.4902 to 0.9433."""
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@pytest.mark.parametrize("count", [1, 20, 4664])
def test_interval_stays_within_0_and_1_and_mirrors(count):
    low, high = wilson_interval(0.0, count)
    assert low == 0.0 and 0 < high < 1
    assert wilson_interval(1.0, count) == pytest.approx((1 - high, 1.0))


def test_rows_of_a_set_stand_below_one_another():
    """Set a was evaluated by both runs, b by the second only."""
    results = {
        "base": {"a.json": metrics_of("a.json", 0.5, 10)},
        "apo": {"a.json": metrics_of("a.json", 0.6, 10), "b.json": metrics_of("b.json", 0.7, 10)},
    }
    rows = compare(results, bins=10)
    assert [row[:3] for row in rows] == [
        ("a.json", "base", "50.0"),
        ("a.json", "apo", "60.0"),
        ("b.json", "apo", "70.0"),
    ]


def test_ece_of_the_chosen_bins_is_shown_and_its_absence_too():
    metrics = metrics_of("a.json", 0.5, 10, calibration_ECE_bin5=0.04321, calibration_ECE_bin10=0.1)
    assert format_row("a.json", "base", metrics, 5)[-1] == "0.043"
    assert format_row("a.json", "base", metrics, 20)[-1] == "-"


def test_set_without_a_pair_has_no_accuracy():
    row = format_row("a.json", "base", {"eval_a.json_pairs": 0, "eval_a.json_mean_reward": 0.1}, 10)
    assert row[2:4] == ("-", "-")


def test_table_is_aligned_markdown():
    lines = format_table(
        (*COLUMNS, "ECE"), compare({"run": {"a.json": metrics_of("a.json", 0.5, 10)}}, 10)
    ).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= set("|-: ")


def test_command_prints_runs_of_the_same_name_apart(tmp_path):
    for seed in ("seed_1", "seed_2"):
        write_run(tmp_path / seed / "rm", {"a.json": metrics_of("a.json", 0.5, 10)})
    done = run_tool("compare_runs.py", tmp_path / "seed_1" / "rm", tmp_path / "seed_2" / "rm")
    assert "ECE, 10 bins" in done.stdout and "seed_1/rm" in done.stdout and "seed_2/rm" in done.stdout


def test_missing_results_end_in_one_line(tmp_path):
    done = run_tool("compare_runs.py", tmp_path, exit_status=2)
    assert done.stderr.startswith("error: ") and "final_eval_results.json: no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("results", [[1], {"a.json": 0.5}])
def test_other_json_is_refused(tmp_path, results):
    with pytest.raises(InputError, match=r"expected what train\.py wrote"):
        read_results(write_run(tmp_path / "run", results))


def test_broken_json_is_refused(tmp_path):
    (tmp_path / "final_eval_results.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="broken JSON"):
        read_results(tmp_path)
