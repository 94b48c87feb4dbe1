"""tools/rejection_sampling.py: the reference's choice exactly, and the files that are written."""

import sys
from pathlib import Path

import pytest
from conftest import E2E, read_json, run_tool, write_records

from apo.records import load_preference_data
from tools import rejection_sampling
from tools.rejection_sampling import name_outputs

REFERENCE = read_json(E2E / "reference.json")


def sampled(query_id: str, *responses: str) -> dict:
    return {"query_id": query_id, "query": "Why?", **{f"sample_{i}": text for i, text in enumerate(responses)}}


@pytest.fixture
def files(tmp_path):
    """Writes responses and rewards as `train.py` names them, returns their paths."""

    def write(records: list[dict], rewards: list[dict]) -> tuple[Path, Path]:
        data = write_records(tmp_path / "samples.json", records)
        return data, write_records(tmp_path / "scores" / "samples_pred_rm_results.json", rewards)

    return write


@pytest.fixture
def run_main(monkeypatch):
    """Runs the tool in this process; returns its exit status."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        try:
            rejection_sampling.main()
        except SystemExit as error:
            return error.code
        return 0

    return run


def test_command_line_chooses_what_the_reference_chose(files, run_main, tmp_path):
    """The recorded entries hold id and target only; records keep their fields and gain "target" and "scores"."""
    data, rewards = files(read_json(E2E / "samples.json"), REFERENCE["inference"]["scores"])
    flags = [
        "--data_path",
        data,
        "--score_path",
        rewards,
        "--rm_scorer",
        "rm",
        "--output_dir",
        tmp_path / "new" / "out",
    ]
    done = run_tool("rejection_sampling.py", *flags, "--output_file_name", "best.json", "--to_pairs")
    assert done.stderr.splitlines() == [
        f"WARNING: {rewards}: no settings file records of which data these are the rewards",
    ]
    folder = tmp_path / "new" / "out"
    records = read_json(folder / "best.json")
    assert [{k: r[k] for k in ("query_id", "target")} for r in records] == REFERENCE["rejection_sampling"]
    assert [{k: v for k, v in r.items() if k not in ("target", "scores")} for r in records] == read_json(data)
    assert [list(r)[-2:] for r in records] == [["target", "scores"]] * len(records)
    flat = [{f"{r['query_id']}:{key}": reward} for r in records for key, reward in r["scores"].items()]
    assert flat == REFERENCE["inference"]["scores"]

    names = {"best.json", "best_report.json", "best_report.png", "best_pairs.json", "best_text_scores.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "best_report.png").read_bytes().startswith(b"\x89PNG")
    assert [row["n"] for row in read_json(folder / "best_report.json")["best_of_n"]] == [1, 2, 3, 4]
    assert "best of 4: expected reward -0.0072 [-1.0952, 1.0808], 14 prompts" in done.stdout
    for name in ("best_pairs.json", "best_text_scores.json"):
        assert len(load_preference_data(folder / name, "comparison_pair", add_sep_token=True)) == 14

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_main(*flags, "--output_file_name", "best.json", "--to_pairs") == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_outputs_are_named_as_in_the_reference():
    """Without a name, after the rewards; a name with a folder is a path of its own; pairs only with the flag."""
    scores = Path("scores/s_pred_rm_results.json")
    assert name_outputs(Path("out"), None, scores, False)["target"] == Path("out/s_pred_rm_results.json_sft.json")
    assert name_outputs(Path("out"), "a/b.json", scores, True) == {
        "target": Path("a/b.json"),
        "report": Path("a/b_report.json"),
        "figure": Path("a/b_report.png"),
        "pairs": Path("a/b_pairs.json"),
        "text_scores": Path("a/b_text_scores.json"),
    }


def test_prompt_with_empty_responses_only_is_left_out_and_reported(files, run_main, tmp_path, caplog, capsys):
    data, rewards = files(
        [sampled("q:0", " ", "\n"), sampled("q:1", " a", " b")],
        [{"q:0:sample_0": 1}, {"q:0:sample_1": 2}, {"q:1:sample_0": 1}, {"q:1:sample_1": 1}],
    )
    assert run_main("--data_path", data, "--score_path", rewards, "--output_dir", tmp_path, "--to_pairs") == 0
    assert "1 prompts left out, all responses are empty: q:0" in caplog.text
    stem = "samples_pred_rm_results.json_sft"
    assert [record["target"] for record in read_json(tmp_path / f"{stem}.json")] == [" a"]
    assert "0 pairs of best over worst" in capsys.readouterr().out
    report = read_json(tmp_path / f"{stem}_report.json")
    assert report["prompts_left_out"] == ["q:0"]
    assert (report["prompts"], report["ties"], report["pairs"]) == (1, 1.0, 0)
    assert read_json(tmp_path / f"{stem}_pairs.json") == []


def test_data_without_any_response_is_refused_and_nothing_is_written(files, run_main, tmp_path, capsys):
    data, rewards = files([sampled("a\nb", " ")], [{"a\nb:sample_0": 1}])
    assert run_main("--data_path", data, "--score_path", rewards, "--output_dir", tmp_path / "out") == 2
    assert "all responses to all 1 prompts are empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rewards_of_other_data_are_refused_unless_allowed(files, run_main, tmp_path, capsys):
    data, rewards = files([sampled("a", " a")], [{"a:sample_0": 1}])
    write_records(rewards.with_suffix(".settings.json"), {"data_sha256": "0"})
    flags = ["--data_path", data, "--score_path", rewards, "--output_dir", tmp_path / "out"]
    assert run_main(*flags) == 2 and not (tmp_path / "out").exists()
    assert "recorded is 0; score it again, or accept it with --allow_changes" in capsys.readouterr().err
    assert run_main(*flags, "--allow_changes") == 0


def test_input_is_never_replaced(files, run_main, capsys):
    data, rewards = files([sampled("a", " a")], [{"a:sample_0": 1}])
    before = data.read_bytes()
    assert run_main("--data_path", data, "--score_path", rewards, "--output_file_name", data) == 2
    assert data.read_bytes() == before
    assert f"{data}: found the data to read" in capsys.readouterr().err
