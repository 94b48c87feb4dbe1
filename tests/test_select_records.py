"""Cutting a part out of a data file."""

import subprocess
import sys

from conftest import REPO_ROOT, read_json, write_records

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
    command = [sys.executable, "tools/select_records.py", "--data_path", str(path), "--output_path", str(out)]
    done = subprocess.run([*command, "--count", "7"], cwd=REPO_ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {path}: found 6 such records, expected 7\n")
    assert not out.exists()
    subprocess.run([*command, "--count", "3"], cwd=REPO_ROOT, check=True, capture_output=True)
    assert read_json(out) == RECORDS[:3]
