"""The converter: the reference's pairs exactly, and nothing that cannot be trained on."""

import json
from pathlib import Path

import pytest
from conftest import PARITY, read_json, run_tool, write_records

from apo.cli import InputError
from apo.prompts import GOLDEN_STOP_STRINGS, SAMPLE_STOP_STRINGS
from tools.apo_data_converter import convert, cut_next_turn, read_golden, read_samples

TOOL = "apo_data_converter.py"
RECORDED = read_json(PARITY / "converter.json")
QUERY = "\n\nHuman: Why?\n\nAssistant:"


def golden(query_id: int | str = 1, answer: str = " Because.", query: str = QUERY) -> dict:
    return {"query_id": query_id, "query": query, "golden": answer}


def sampled(query_id: int | str = 1, *answers: str, query: str = QUERY) -> dict:
    return {"query_id": query_id, "query": query, **{f"sample_{i}": answer for i, answer in enumerate(answers)}}


@pytest.fixture
def files(tmp_path):
    """Writes a golden and a samples file, returns their paths."""

    def write(golden_records: list, sample_records: list) -> tuple[Path, Path]:
        golden_path = write_records(tmp_path / "golden.json", golden_records)
        return golden_path, write_records(tmp_path / "samples.json", sample_records)

    return write


def convert_files(paths, **options):
    return convert(read_golden(paths[0]), read_samples(paths[1]), **options)


def test_pairs_are_those_of_the_reference(files):
    items = convert_files(files(RECORDED["golden"], RECORDED["samples"])).items
    assert items == RECORDED["text_scores"]
    assert [list(item) for item in items] == [["text", "scores", "type"]] * len(items)


def test_command_line_writes_the_reference_file_and_one_line(files, tmp_path):
    golden_path, sample_path = files(RECORDED["golden"], RECORDED["samples"])
    flags = ["--golden_data_path", golden_path, "--sample_data_path", sample_path]
    done = run_tool(TOOL, *flags, "--output_dir", tmp_path / "new" / "apo_data", "--apo_data_name", "rm_v0")
    path = tmp_path / "new" / "apo_data" / "rm_v0_text_scores.json"
    assert read_json(path) == RECORDED["text_scores"]
    assert done.stdout == (f"12 prompts matched, 48 pairs written, 0 ids unmatched, 0 answers skipped: {path}\n")


def test_wrong_input_on_the_command_line_is_one_line_and_status_2(files, tmp_path):
    _, sample_path = files([golden()], [sampled(1, " No.")])
    flags = ["--golden_data_path", tmp_path / "absent.json", "--sample_data_path", sample_path]
    done = run_tool(TOOL, *flags, "--output_dir", tmp_path, "--apo_data_name", "x", exit_status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "absent.json" in done.stderr


def test_sampling_keeps_one_pair_per_prompt_and_has_its_own_file_name(files, tmp_path):
    golden_path, sample_path = files(RECORDED["golden"], RECORDED["samples"])
    flags = ["--golden_data_path", golden_path, "--sample_data_path", sample_path]
    run_tool(TOOL, *flags, "--output_dir", tmp_path, "--apo_data_name", "rm_v0", "--sampling")
    items = read_json(tmp_path / "rm_v0_sampled_text_scores.json")
    assert len({item["text"][0] for item in items}) == len(items) == len(RECORDED["samples"])
    assert all(item in RECORDED["text_scores"] for item in items)


def test_sampling_is_decided_by_the_seed(files):
    paths = files([golden(i) for i in range(20)], [sampled(i, *map(str, range(8))) for i in range(20)])
    first, again, other = (convert_files(paths, sampling=True, seed=seed).items for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_group_holds_the_same_pairs_as_one_item_per_prompt(files):
    paths = files(RECORDED["golden"], RECORDED["samples"])
    groups = convert_files(paths, group=True).items
    assert len(groups) == len(RECORDED["samples"])
    assert [group["query_id"] for group in groups] == [str(record["query_id"]) for record in RECORDED["samples"]]
    assert all(group["scores"] == [1.0] + [0.0] * (len(group["text"]) - 1) for group in groups)
    assert all(group["type"] == "apo" for group in groups)
    pairs = [[group["text"][0], text] for group in groups for text in group["text"][1:]]
    assert pairs == [item["text"] for item in RECORDED["text_scores"]]


def test_samples_come_in_numeric_order_whatever_their_number(files):
    record = {"query_id": 1, "query": QUERY, "sample_10": " ten", "sample_2": " two", "sample_0": " zero"}
    items = convert_files(files([golden()], [record])).items
    assert [item["text"][1] for item in items] == [f"{QUERY}<sep> {word}" for word in ("zero", "two", "ten")]


def test_answer_is_stripped_only_where_it_is_cut():
    for stop_strings in (GOLDEN_STOP_STRINGS, SAMPLE_STOP_STRINGS):
        assert cut_next_turn(" Yes. \n\nHuman: And?\n\nHuman: Hm", stop_strings) == "Yes."
        assert cut_next_turn("  Yes.\n", stop_strings) == "  Yes.\n"


def test_lines_about_humans_are_cut_from_samples_only_and_cuts_are_counted(files, tmp_path):
    answer = " Yes:\nHumans need water."
    paths = files([golden(1, answer), golden(2, "Yes.\nHuman: And?")], [sampled(i, answer, " No.") for i in (1, 2)])
    flags = ["--golden_data_path", paths[0], "--sample_data_path", paths[1], "--output_dir", tmp_path]
    done = run_tool(TOOL, *flags, "--apo_data_name", "x")
    assert "cut where they go on to play the user: 1 golden, 2 sampled answers" in done.stderr
    items = read_json(tmp_path / "x_text_scores.json")
    assert items[0]["text"] == [f"{QUERY}<sep>{answer}", f"{QUERY}<sep>Yes:"]


def test_unmatched_ids_are_counted_and_named(files, tmp_path):
    paths = files([golden(i) for i in range(8)], [sampled(1, " No."), sampled("x", " No.")])
    flags = ["--golden_data_path", paths[0], "--sample_data_path", paths[1], "--output_dir", tmp_path]
    done = run_tool(TOOL, *flags, "--apo_data_name", "x")
    assert "7 golden answers without samples, left out: 0; 2; 3; 4; 5; and 2 more" in done.stderr
    assert "1 samples without a golden answer, left out: x" in done.stderr
    assert done.stdout.startswith("1 prompts matched, 1 pairs written, 8 ids unmatched, 0 answers skipped: ")


def test_answers_that_make_no_pair_are_skipped_and_counted(files):
    """Of prompt 1 only " No." is left; the cut empties the third sample; prompt 2 has no golden answer left."""
    samples = sampled(1, " ", " No.", "\n\nHuman: me", " Because.", "Because.\n\nHuman: me", " a<sep>b")
    paths = files([golden(1), golden(2, " ")], [samples, sampled(2, " No.")])
    result = convert_files(paths)
    assert [item["text"] for item in result.items] == [[f"{QUERY}<sep> Because.", f"{QUERY}<sep> No."]]
    assert result.skipped == {"golden empty": 1, "sample empty": 2, "sample same as golden": 2, "sample with <sep>": 1}
    assert (result.num_matched, result.num_pairs) == (2, 1)


@pytest.mark.parametrize(
    ("golden_records", "sample_records", "message"),
    [
        (
            [{"query_id": 1, "query": QUERY}],
            [sampled(1, "a")],
            r'golden.json: record 1: field "golden": found no such field',
        ),
        (
            [golden(), golden("1")],
            [sampled(1, "a")],
            r"record 2: .*\"query_id\": found 1, .*record 1 has it too",
        ),
        ([golden(), {}, {}], [sampled(1, "a")], r'golden.json: 2 bad records: record 2: field "query_id": .*record 3'),
        (
            [golden(True)],
            [sampled(1, "a")],
            r'field "query_id": found true, expected a non-empty string or an integer',
        ),
        ([golden(query=" ")], [sampled(1, "a")], r"field \"query\": found the string \" \", expected a non-empty"),
        ([golden(query="a<sep>b")], [sampled(1, "a")], r"found a text with <sep>, expected one without"),
        ([golden(answer=7)], [sampled(1, "a")], r'field "golden": found the number 7, expected a string'),
        (
            [golden()],
            [sampled(1)],
            r'samples.json: record 1: field "sample_0": found no sample .*expected fields sample_0',
        ),
        (
            [golden()],
            [sampled(1, "a", None)],
            r'samples.json: record 1: field "sample_1": found null, expected a string',
        ),
        ([golden()], [{**sampled(1, "a"), "sample_b": "c"}], r'field "sample_b": found no number after sample_'),
        ([golden()], [sampled(1, "a"), "text"], r"samples.json: record 2: "),
        ([golden(1)], [sampled(2, "a")], r"found no id in both files, .*golden.json has 1; .*samples.json has 2"),
        ([golden()], [sampled(1, " Because.")], r"no pair is left of 1 matched prompts.*1 sample same as golden"),
        (
            [golden(query="\n\nHuman: Why not?")],
            [sampled(1, "a", query="\n\nHuman: Why so?")],
            r'.*character 14 on, the string "so\?", expected the string "not\?" as in .*golden',
        ),
    ],
)
def test_wrong_input_names_file_record_field_found_and_expected(files, golden_records, sample_records, message):
    with pytest.raises(InputError, match=message):
        convert_files(files(golden_records, sample_records))


def test_half_a_surrogate_pair_in_an_answer_is_named(files):
    """JSON can write it, and no file can hold it."""
    paths = files([golden()], [])
    paths[1].write_text(json.dumps([sampled(1, " a \ud83d")]), encoding="utf-8")
    with pytest.raises(InputError, match=r'samples.json: record 1: field "sample_0": found half a surrogate pair'):
        convert_files(paths)
