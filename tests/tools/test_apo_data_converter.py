"""The converter: the reference's pairs exactly, and only what can be trained on."""

import sys
from pathlib import Path

import pytest
from conftest import PARITY, read_json, run_tool, write_records

from apo.cli import InputError
from apo.prompts import GOLDEN_STOP_STRINGS, SAMPLE_STOP_STRINGS
from tools import apo_data_converter
from tools.apo_data_converter import convert, cut_next_turn, load_responses

RECORDED = read_json(PARITY / "converter.json")
QUERY = "\n\nHuman: Why?\n\nAssistant:"


def golden(query_id: int | str = 1, response: str = " Because.", query: str = QUERY) -> dict:
    return {"query_id": query_id, "query": query, "golden": response}


def sampled(query_id: int | str = 1, *responses: str, query: str = QUERY) -> dict:
    return {"query_id": query_id, "query": query, **{f"sample_{i}": text for i, text in enumerate(responses)}}


@pytest.fixture
def files(tmp_path):
    """Writes a file of golden and a file of sampled responses, returns their paths."""

    def write(golden_records: list, sample_records: list) -> tuple[Path, Path]:
        golden_path = write_records(tmp_path / "golden.json", golden_records)
        return golden_path, write_records(tmp_path / "samples.json", sample_records)

    return write


def convert_files(paths, **options):
    return convert(load_responses(paths[0], "golden"), load_responses(paths[1], "sampled"), **options)


@pytest.fixture
def run_main(files, tmp_path, monkeypatch):
    """Writes two files and runs the tool on them in this process; the result is `tmp_path / "out"`."""

    def run(golden_records: list, sample_records: list, *flags: str) -> None:
        paths = files(golden_records, sample_records)
        words = ["--golden_data_path", paths[0], "--sample_data_path", paths[1], "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words), "--apo_data_name", "rm_v0", *flags])
        apo_data_converter.main()

    return run


def test_pairs_are_those_of_the_reference(files):
    items = convert_files(files(RECORDED["golden"], RECORDED["samples"])).items
    assert items == RECORDED["text_scores"]
    assert [list(item) for item in items] == [["text", "scores", "type"]] * len(items)


def test_command_line_writes_the_reference_file_and_one_line(files, tmp_path):
    golden_path, sample_path = files(RECORDED["golden"], RECORDED["samples"])
    flags = ["--golden_data_path", golden_path, "--sample_data_path", sample_path]
    done = run_tool(
        "apo_data_converter.py", *flags, "--output_dir", tmp_path / "new" / "apo_data", "--apo_data_name", "rm_v0"
    )
    path = tmp_path / "new" / "apo_data" / "rm_v0_text_scores.json"
    assert read_json(path) == RECORDED["text_scores"]
    assert done.stdout == f"12 prompts matched, 48 pairs written, 0 ids unmatched, 0 responses skipped: {path}\n"


def test_sampling_keeps_one_pair_per_prompt_and_has_its_own_file_name(run_main, tmp_path):
    run_main(RECORDED["golden"], RECORDED["samples"], "--sampling")
    items = read_json(tmp_path / "out" / "rm_v0_sampled_text_scores.json")
    assert len({item["text"][0] for item in items}) == len(items) == len(RECORDED["samples"])
    assert all(item in RECORDED["text_scores"] for item in items)


def test_seed_determines_the_sampling(files):
    paths = files([golden(i) for i in range(20)], [sampled(i, *map(str, range(8))) for i in range(20)])
    first, again, other = (convert_files(paths, sampling=True, seed=seed).items for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_group_holds_the_same_pairs_as_one_record_per_prompt(files):
    paths = files(RECORDED["golden"], RECORDED["samples"])
    groups = convert_files(paths, group=True).items
    assert len(groups) == len(RECORDED["samples"])
    assert [group["query_id"] for group in groups] == [str(record["query_id"]) for record in RECORDED["samples"]]
    assert all(group["scores"] == [1.0] + [0.0] * (len(group["text"]) - 1) for group in groups)
    assert all(group["type"] == "apo" for group in groups)
    pairs = [[group["text"][0], text] for group in groups for text in group["text"][1:]]
    assert pairs == [item["text"] for item in RECORDED["text_scores"]]


def test_sampled_responses_are_in_numeric_order(files):
    record = {"query_id": 1, "query": QUERY, "sample_10": " ten", "sample_2": " two", "sample_0": " zero"}
    items = convert_files(files([golden()], [record])).items
    assert [item["text"][1] for item in items] == [f"{QUERY}<sep> {word}" for word in ("zero", "two", "ten")]


def test_response_is_stripped_only_where_it_is_cut():
    for stop_strings in (GOLDEN_STOP_STRINGS, SAMPLE_STOP_STRINGS):
        assert cut_next_turn(" Yes. \n\nHuman: And?\n\nHuman: Hm", stop_strings) == "Yes."
        assert cut_next_turn("  Yes.\n", stop_strings) == "  Yes.\n"


def test_lines_about_humans_are_cut_from_sampled_responses_only_and_cuts_are_counted(run_main, tmp_path, caplog):
    response = " Yes:\nHumans need water."
    golden_records = [golden(1, response), golden(2, "Yes.\nHuman: And?")]
    with caplog.at_level("INFO"):
        run_main(golden_records, [sampled(i, response, " No.") for i in (1, 2)])
    assert "cut where they continue as the user: 1 golden, 2 sampled responses" in caplog.text
    items = read_json(tmp_path / "out" / "rm_v0_text_scores.json")
    assert items[0]["text"] == [f"{QUERY}<sep>{response}", f"{QUERY}<sep>Yes:"]


def test_unmatched_ids_are_counted_and_reported(run_main, caplog, capsys):
    run_main([golden(i) for i in range(8)], [sampled(1, " No."), sampled("x", " No.")])
    assert "7 ids with golden responses only, left out: 0; 2; 3; 4; 5; and 2 more" in caplog.text
    assert "1 ids with sampled responses only, left out: x" in caplog.text
    assert capsys.readouterr().out.startswith("1 prompts matched, 1 pairs written, 8 ids unmatched, 0 responses")


def test_responses_that_make_no_pair_are_skipped_and_counted(files):
    """Of prompt 1 only " No." is left; the cut empties the third response; prompt 2 has no golden response left."""
    responses = sampled(1, " ", " No.", "\n\nHuman: me", " Because.", "Because.\n\nHuman: me", " a<sep>b")
    paths = files([golden(1), golden(2, " ")], [responses, sampled(2, " No.")])
    result = convert_files(paths)
    assert [item["text"] for item in result.items] == [[f"{QUERY}<sep> Because.", f"{QUERY}<sep> No."]]
    assert result.skipped == {
        "golden empty": 1,
        "sampled empty": 2,
        "sampled same as golden": 2,
        "sampled with <sep>": 1,
    }


@pytest.mark.parametrize(
    ("golden_records", "sample_records", "message"),
    [
        ([golden(1)], [sampled(2, "a")], r"found no id in both files, .*--golden_data_path has 1; --sample.* has 2"),
        ([golden()], [sampled(1, " Because.")], r"1 prompts matched, but no pair is left.*1 sampled same as golden"),
        (
            [golden(query="\n\nHuman: Why not?")],
            [sampled(1, "a", query="\n\nHuman: Why so?")],
            r'id 1: .*character 14 on, the string "so\?", expected the string "not\?" as in record 1 of --golden_data',
        ),
        ([golden()], [sampled(1)], r"samples.json: record 1: field \"sample_0\": found no response"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(files, golden_records, sample_records, message):
    with pytest.raises(InputError, match=message):
        convert_files(files(golden_records, sample_records))
