"""Cutting a part out of a data file."""

from conftest import read_json, run_tool, write_records

from tools.select_records import query_ids, select_records

RECORDS = [{"query_id": i} for i in range(6)]


def test_ids_are_left_out_before_positions_are_counted(tmp_path):
    """Without 0 and 2 the rest is 1, 3, 4, 5; skip one, take two. Ids are compared as strings."""
    path = write_records(tmp_path / "a.json", [{"query_id": "0"}, {"query_id": 2}, {"text": []}])
    assert query_ids(str(path)) == {"0", "2"}
    assert select_records(RECORDS, 1, 2, {"0", "2"}) == [{"query_id": 3}, {"query_id": 4}]
    assert select_records(RECORDS, 4, None, set()) == RECORDS[4:]


def test_file_with_too_few_records_is_refused_and_nothing_written(tmp_path):
    path, out = write_records(tmp_path / "a.json", RECORDS), tmp_path / "out.json"
    command = ["select_records.py", "--data_path", path, "--output_path", out]
    done = run_tool(*command, "--count", 7, exit_status=2)
    assert done.stderr == f"error: {path}: found 6 such records, expected 7\n"
    assert not out.exists()
    run_tool(*command, "--count", 3)
    assert read_json(out) == RECORDS[:3]
