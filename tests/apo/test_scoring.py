"""Scores: every response once, in file order, the same to the bit after any number of kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHECKPOINT, E2E, REPO_ROOT, command_line, read_json, run_main, write_records

from apo import scoring
from apo.cli import InputError, locked
from apo.scoring import name_score_files
from trainer import RewardModelTrainer

NUM_RECORDS = 40


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Records of one to four responses, some of the ids with colons and Unicode."""
    templates = read_json(E2E / "samples.json")
    records = []
    for number in range(NUM_RECORDS):
        record = dict(templates[number % len(templates)], query_id=f"é:{number}:{'x' * (number % 3)}")
        for key in ("sample_1", "sample_2", "sample_3")[: number % 4]:
            del record[key]
        records.append(record)
    return write_records(tmp_path_factory.mktemp("samples") / "samples.json", records)


def flags(samples: Path, output_dir: Path, **others: object) -> dict[str, object]:
    """One record a batch: 40 batches, ten parts."""
    return {
        "task_type": "inference",
        "data_type": "reject_sample",
        "model_name_or_path": CHECKPOINT,
        "add_sep_token": True,
        "pooling_type": "last",
        "eval_data_path": samples,
        "data_suffix": "rm",
        "eval_token_budget": 1,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": output_dir,
    } | others


def scores_file(output_dir: Path) -> Path:
    return output_dir / "samples_pred_rm_results.json"


def partial_lines(output_dir: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output_dir.glob("*.partial.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(samples, tmp_path_factory) -> bytes:
    output_dir = tmp_path_factory.mktemp("undisturbed")
    run_main(**flags(samples, output_dir))
    assert partial_lines(output_dir) == 0
    return scores_file(output_dir).read_bytes()


def test_every_response_is_scored_once_in_file_order(samples, undisturbed, tmp_path):
    expected = [
        f"{record['query_id']}:{key}" for record in read_json(samples) for key in record if key.startswith("sample_")
    ]
    path = tmp_path / "scores.json"
    path.write_bytes(undisturbed)
    assert [key for row in read_json(path) for key in row] == expected


@pytest.mark.parametrize("others", [{"eval_token_budget": 700}, {"batching": "padded", "eval_token_budget": 900}])
def test_rewards_do_not_depend_on_batches(samples, undisturbed, tmp_path, others):
    run_main(**flags(samples, tmp_path, **others))
    (tmp_path / "undisturbed.json").write_bytes(undisturbed)
    rewards = [
        [reward for row in read_json(path) for reward in row.values()]
        for path in (scores_file(tmp_path), tmp_path / "undisturbed.json")
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def interrupt_after(monkeypatch, num_parts: int) -> list[int]:
    """Interrupts scoring after some parts; returns a list that grows by the batches of each part."""
    seen: list[int] = []
    predict = RewardModelTrainer.predict_batches

    def predict_or_interrupt(self, dataset, batches):
        if num_parts == 0 or len(seen) == num_parts:
            raise KeyboardInterrupt
        seen.append(len(batches))
        return predict(self, dataset, batches)

    monkeypatch.setattr(RewardModelTrainer, "predict_batches", predict_or_interrupt)
    return seen


@pytest.mark.parametrize("num_parts", [0, 4])
def test_interrupted_run_resumes_and_computes_nothing_twice(samples, undisturbed, tmp_path, monkeypatch, num_parts):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(patch, num_parts)
        run_main(**flags(samples, tmp_path))
    assert not scores_file(tmp_path).exists()
    assert partial_lines(tmp_path) == num_parts * scoring.BATCHES_PER_PART
    seen = interrupt_after(monkeypatch, 99)
    run_main(**flags(samples, tmp_path))
    assert sum(seen) == NUM_RECORDS - num_parts * scoring.BATCHES_PER_PART
    assert scores_file(tmp_path).read_bytes() == undisturbed
    assert partial_lines(tmp_path) == 0


@pytest.mark.parametrize("name", ["samples_pred_rm_results.settings.json", "samples_pred_rm_results.json"])
def test_run_interrupted_before_it_names_a_file_goes_on(samples, undisturbed, tmp_path, monkeypatch, name):
    """The rewards that it has written by then are known as its own."""
    replace = os.replace

    def replace_or_interrupt(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", replace_or_interrupt)
        run_main(**flags(samples, tmp_path))
    assert partial_lines(tmp_path) == NUM_RECORDS
    run_main(**flags(samples, tmp_path))
    assert scores_file(tmp_path).read_bytes() == undisturbed
    assert partial_lines(tmp_path) == 0


def test_rewards_of_other_settings_are_not_used(samples, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(patch, 3)
        run_main(**flags(samples, tmp_path, pooling_type="eos"))
    seen = interrupt_after(monkeypatch, 99)
    run_main(**flags(samples, tmp_path))
    assert sum(seen) == NUM_RECORDS


def test_rewards_of_an_unknown_model_are_replaced_if_it_is_allowed(samples, undisturbed, tmp_path, capsys):
    scores_file(tmp_path).write_text("[]")
    with pytest.raises(SystemExit, match="2"):
        run_main(**flags(samples, tmp_path))
    assert "found the rewards of another model, unknown, expected" in capsys.readouterr().err
    run_main(**flags(samples, tmp_path), allow_changes=True)
    assert scores_file(tmp_path).read_bytes() == undisturbed


def test_rewards_of_another_model_are_not_replaced(samples, undisturbed, tmp_path, capsys):
    scores_file(tmp_path).write_bytes(undisturbed)
    write_records(scores_file(tmp_path).with_suffix(".settings.json"), {"model": "other"})
    with pytest.raises(SystemExit, match="2"):
        run_main(**flags(samples, tmp_path))
    assert "found the rewards of another model, other, expected those of" in capsys.readouterr().err
    assert scores_file(tmp_path).read_bytes() == undisturbed
    run_main(**flags(samples, tmp_path), allow_changes=True)
    assert read_json(scores_file(tmp_path).with_suffix(".settings.json"))["model"] != "other"


def test_second_run_into_the_same_file_is_refused(samples, tmp_path, capsys):
    with locked(tmp_path / "samples_pred_rm_results.rank0", wait=False), pytest.raises(SystemExit, match="2"):
        run_main(**flags(samples, tmp_path))
    assert "rank0.lock, held by process" in capsys.readouterr().err


def test_responses_that_are_cut_away_are_a_warning(tmp_path, caplog):
    record = {"query": "A long prompt that fills all of the tokens and more.", "sample_0": " Yes.", "sample_1": " No."}
    records = [{"query_id": "1", **record}, {"query_id": "2", **record, "query": "?"}]
    cut = {"truncation_side": "right", "max_length": 12}
    run_main(**flags(write_records(tmp_path / "samples.json", records), tmp_path, **cut))
    assert "1 of 2 prompts have the same reward for all responses" in caplog.text


def test_repeated_query_ids_are_refused(tmp_path, capsys):
    record = read_json(E2E / "samples.json")[0]
    path = write_records(tmp_path / "twice.json", [record, record])
    with pytest.raises(SystemExit) as stop:
        run_main(**flags(path, tmp_path / "out"))
    assert stop.value.code == 2
    assert "which record 1 has too" in capsys.readouterr().err


def test_two_files_that_would_share_a_scores_file_are_refused():
    names = name_score_files("out", ["a/x.json", "b/x.json"], "rm")
    assert [str(path) for path in names.values()] == ["out/a_x_pred_rm_results.json", "out/b_x_pred_rm_results.json"]
    with pytest.raises(InputError, match="score them separately"):
        name_score_files("out", ["x.json", "x.jsonl"], "rm")


@pytest.mark.slow
@pytest.mark.parametrize("num_lines", [0, 12, 36])
def test_killed_run_ends_with_the_same_file(samples, undisturbed, tmp_path, num_lines):
    """SIGKILL as soon as so many batches are kept, the first time before any."""
    command = [sys.executable, str(REPO_ROOT / "train.py"), *command_line(**flags(samples, tmp_path))]
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while partial_lines(tmp_path) < num_lines or not (tmp_path / "manifest.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    run_main(**flags(samples, tmp_path))
    assert scores_file(tmp_path).read_bytes() == undisturbed
