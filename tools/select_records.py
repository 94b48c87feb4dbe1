"""Cuts a part out of a data file: by position, and by the query ids of other files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preference_records import InputError, OneLineParser, exit_on_input_error, read_records, write_json


def query_ids(path: str) -> set[str]:
    """The query ids of a file, as strings."""
    return {str(record["query_id"]) for _, record in read_records(path) if "query_id" in record}


def select_records(
    records: list[dict[str, Any]], start: int, count: int | None, without_ids: set[str]
) -> list[dict[str, Any]]:
    """Drops the records with one of the given query ids, then returns `count` records (all if None) from `start`."""
    kept = [record for record in records if str(record.get("query_id")) not in without_ids]
    return kept[start : None if count is None else start + count]


def parse_args() -> argparse.Namespace:
    example = (
        "example:\n  python tools/select_records.py --data_path rm.train.json --count 320 "
        "--without_ids_of held_out.sample.json --output_path rm_320.json"
    )
    parser = OneLineParser(description=__doc__, epilog=example)
    parser.add_argument("--data_path", required=True, help="the file to cut from")
    parser.add_argument("--output_path", required=True, help="the file to write, a JSON list")
    parser.add_argument("--start", type=int, default=0, help="records to skip (default 0)")
    parser.add_argument("--count", type=int, help="records to take (default: all that follow)")
    parser.add_argument("--without_ids_of", nargs="*", default=[], help="files whose query ids are left out first")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    args = parse_args()
    without_ids = set().union(*(query_ids(path) for path in args.without_ids_of))
    records = [record for _, record in read_records(args.data_path)]
    selected = select_records(records, args.start, args.count, without_ids)
    if not selected or (args.count is not None and len(selected) < args.count):
        raise InputError(
            f"{args.data_path}: found {len(selected)} such records, expected {args.count or 'at least 1'}"
        )
    write_json(args.output_path, selected)
    print(f"{args.output_path}: {len(selected)} of {len(records)} records")


if __name__ == "__main__":
    main()
