"""Checks data files before a run spends hours on them: reports faults and statistics.

example:
    python tools/check_data.py --train_data_path data/sample/rm_data/hh_split_rm.train.json \\
        --eval_data_path data/sample/eval_data/hh_cleaned_origin.test.json --model_name_or_path outputs/rm_base

It reads every format of the project: pairs, sampled responses, golden responses. It prints one block per file,
findings first, then what files share.

Bad records and unreadable files make the exit status 2, with `--strict` any finding does. Everything else is a
statistic: ties, length bias, lengths, truncated responses, padding. Prompts that a training file shares with an
evaluation file are a finding; two training files share prompts on purpose (golden and sampled responses, the parts of
a whole).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from apo.batches import count_tokens
from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error, first_few
from apo.prompts import DOUBTS, normalize_space
from apo.records import PreferenceRecord, iter_valid, parse_record, record_kind
from reward_datasets import Encoded, build_sequence, encode_records, preferred_pairs

if TYPE_CHECKING:
    from apo.tokenizer import RewardTokenizer

BATCH_SIZE = 8  # items that are padded to the longest one
QUANTILES = {"min": 0, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "max": 100}

Findings = defaultdict[str, list[str]]  # what is wrong -> each case with its place


@dataclass
class FileCheck:
    """The findings and statistics of a file; of each record it keeps hashes and numbers, to save memory."""

    path: str
    role: str  # train or eval
    kind: str = ""  # see `apo.records.record_kind`
    findings: Findings = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)  # the statistics, under the names of the report
    contents: dict[int, str] = field(default_factory=dict)  # hash of prompt and responses, of a pair -> first place
    prompts: dict[int, str] = field(default_factory=dict)  # hash of the prompt -> first place
    ids: dict[str, str] = field(default_factory=dict)  # query id -> first place; not of pairs, whose ids may repeat
    lengths: array[int] = field(default_factory=lambda: array("q"))  # tokens of each sequence before truncation


def check_records(check: FileCheck, add_sep_token: bool, response_keys: Sequence[str]) -> Iterator[PreferenceRecord]:
    """Checks the texts of each good record, also after a bad one, and yields it."""

    def parse(raw: dict[str, Any], default_id: str) -> PreferenceRecord:
        check.kind = check.kind or record_kind(raw)  # that of the first record
        return parse_record(raw, default_id, kind=check.kind, add_sep_token=add_sep_token, response_keys=response_keys)

    try:
        for place, record in iter_valid(check.path, parse, problems=check.findings["bad records"]):
            record.place = place
            check_texts(check, record)
            yield record
    except InputError as error:
        check.findings["unreadable"].append(str(error).removeprefix(f"{check.path}: "))


def check_texts(check: FileCheck, record: PreferenceRecord) -> None:
    """Adds the findings and counts of a record's texts, scores and id."""
    place, texts = record.place, list(zip(record.prompts, record.responses, strict=True))
    first = check.contents.setdefault(hash(frozenset(texts)), place)
    if first != place:
        check.findings["duplicates"].append(f"{place} is {first} again")
    for prompt in filter(None, map(normalize_space, dict.fromkeys(record.prompts))):
        check.prompts.setdefault(hash(prompt), place)
    for remark in record.remarks:
        if remark in DOUBTS and remark != "no_prompt":  # a statistic: whole dialogues are common
            check.findings[f"records in which {DOUBTS[remark]}"].append(place)
        else:
            check.counts[remark] += 1
    check.counts.update(records=1, responses=len(texts))
    if check.kind == "comparison_pair":
        check_pairs(check, record, texts)
    elif check.ids.setdefault(record.query_id, place) != place:
        check.findings["repeated ids"].append(f"{place} and {check.ids[record.query_id]}: id {record.query_id}")


def check_pairs(check: FileCheck, record: PreferenceRecord, texts: list[tuple[str, str]]) -> None:
    """Adds the findings and counts of a record's pairs; `texts` are (prompt, response)."""
    pairs = preferred_pairs(record.scores)
    for i, j in pairs:
        check.contents.setdefault(hash((texts[i], texts[j])), record.place)
        if texts[i] == texts[j]:
            check.findings["pairs of equal texts"].append(f"{record.place}: responses {i + 1} and {j + 1}")
        elif opposite := check.contents.get(hash((texts[j], texts[i]))):
            check.findings["contradictions"].append(f"{record.place} prefers the opposite of {opposite}")
    sizes = [len(response) for response in record.responses]
    check.counts.update(
        pairs=len(pairs),
        tied_pairs=math.comb(len(texts), 2) - len(pairs),
        tied_items=not pairs,
        longer_preferred=sum(sizes[i] > sizes[j] for i, j in pairs),
        shorter_preferred=sum(sizes[i] < sizes[j] for i, j in pairs),
    )


def check_tokens(check: FileCheck, batch: list[Encoded], tokenizer: RewardTokenizer, settings: dict[str, Any]) -> None:
    """Adds the findings and counts of the tokens of records that are padded together."""
    num_rows, width, max_length = 0, 0, settings["max_length"]
    for record, pairs_ids in batch:
        sequences = [build_sequence(*ids, tokenizer, **settings) for ids in pairs_ids]
        for number, (prompt, response) in enumerate(pairs_ids, start=1):
            after_prompt = len(response) + settings["add_sep_token"] + 1  # [sep] response eos
            check.lengths.append(1 + len(prompt) + after_prompt)  # with bos
            check.counts["truncated_responses"] += check.lengths[-1] > max_length
            if prompt and settings["truncation_side"] == "left" and after_prompt >= max_length:
                check.findings["prompts cut away"].append(f"{record.place}: response {number}")
        for i, j in preferred_pairs(record.scores):
            if sequences[i] == sequences[j]:
                check.findings["pairs of equal tokens"].append(f"{record.place}: responses {i + 1} and {j + 1}")
        tokens = count_tokens(sequences)
        check.counts.update(tokens=tokens["num_tokens"], tokens_as_trees=tokens["length"])
        num_rows, width = num_rows + len(sequences), max(width, tokens["longest"])
    check.counts["tokens_padded"] += num_rows * width


def check_file(
    path: str,
    role: str,
    settings: dict[str, Any],
    tokenizer: RewardTokenizer | None = None,
    response_keys: Sequence[str] = (),
) -> FileCheck:
    """Reads a file and finds its faults and statistics; without a tokenizer, none that need tokens.

    Args:
        role: `train` or `eval`.
        settings: the arguments of `reward_datasets.build_sequence`; without a tokenizer only `add_sep_token`.
        response_keys: see `apo.records.find_response_keys`.
    """
    check = FileCheck(path, role)
    records = check_records(check, settings["add_sep_token"], response_keys)
    items = encode_records(records, tokenizer) if tokenizer else records
    while batch := list(itertools.islice(items, BATCH_SIZE)):
        if tokenizer:
            check_tokens(check, batch, tokenizer, settings)
    return check


def compare_files(checks: list[FileCheck]) -> Findings:
    """Finds ids without a golden or a sampled response, if there are files of both kinds, and shared prompts."""
    findings: Findings = defaultdict(list)
    unmatched = {"golden": "golden responses without samples", "reject_sample": "samples without a golden response"}
    responses = [check for check in checks if check.kind in unmatched]
    for check in responses:
        known = {query_id for other in responses if other.kind != check.kind for query_id in other.ids}
        for query_id in (query_id for query_id in check.ids if known and query_id not in known):
            findings[unmatched[check.kind]].append(f"{check.path}: {check.ids[query_id]}: id {query_id}")
    train, evaluation = ([check for check in checks if check.role == role] for role in ("train", "eval"))
    for one, other in itertools.product(train, evaluation):
        for prompt in (prompt for prompt in one.prompts if prompt in other.prompts):
            places = f"{one.prompts[prompt]} of {one.path} and {other.prompts[prompt]} of {other.path}"
            findings["training prompts in evaluation files"].append(places)
    return findings


def format_findings(findings: Findings) -> list[str]:
    """Returns a line for each finding: its count, and the first five cases."""
    lines = [f"  FOUND {len(cases)} {name}: {first_few(cases)}" for name, cases in findings.items() if cases]
    return lines or ["  nothing found"]


def format_file(check: FileCheck) -> list[str]:
    """Returns the lines of one file: its findings, then its statistics."""
    lines = [f"{check.path} ({check.role}): {check.kind or 'unknown'}, {check.counts['records']} good records"]
    lines += format_findings(check.findings)
    lines += [f"  {name:<22} {count}" for name, count in check.counts.items()]
    if check.lengths:
        quantiles = zip(QUANTILES, np.percentile(check.lengths, list(QUANTILES.values())), strict=True)
        text = ", ".join(f"{name} {value:g}" for name, value in quantiles)
        lines.append(f"  {'before truncation':<22} {text} tokens a sequence")
    return lines


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    add = (parser := OneLineParser(description=__doc__)).add_argument
    add("--train_data_path", nargs="+", default=[], help="files used in training, of any kind")
    add("--eval_data_path", nargs="+", default=[], help="files for evaluation, of any kind")
    add("--model_name_or_path", help="model whose tokenizer counts; without it nothing is tokenised")
    add("--max_length", type=at_least(8), help="longest sequence in tokens (default: the checkpoint's, or 256)")
    add("--truncation_side", choices=("left", "right"), help="side that is cut (default: the checkpoint's, or left)")
    sep_help = "separator between prompt and response (default: as the checkpoint, or false)"
    add("--add_sep_token", nargs="?", const="true", type=str.lower, choices=("true", "false"), help=sep_help)
    add("--response_keys", nargs="+", default=[], help="fields with responses besides sample_<n> and ans_<n>")
    add("--strict", action="store_true", help="exit status 2 for any finding, not only for bad records")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Checks each file, compares them, prints."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args()
    files = [("train", path) for path in args.train_data_path] + [("eval", path) for path in args.eval_data_path]
    if not files:
        raise InputError("nothing to check: give --train_data_path, --eval_data_path, or both")
    add_sep_token = {"true": True, "false": False, None: None}[args.add_sep_token]
    tokenizer, settings = None, {"add_sep_token": bool(add_sep_token)}
    if args.model_name_or_path:
        from apo.tokenizer import load_reward_tokenizer
        from models import load_config, resolve_settings

        config = load_config(args.model_name_or_path)
        lengths = {"max_length": args.max_length, "truncation_side": args.truncation_side}
        resolved = resolve_settings(config, **lengths, add_sep_token=add_sep_token)  # as train.py does
        settings = resolved.sequence_settings
        tokenizer = load_reward_tokenizer(args.model_name_or_path, config, resolved.tokenizer_backend)

    checks = [check_file(path, role, settings, tokenizer, args.response_keys) for role, path in dict.fromkeys(files)]
    shared = compare_files(checks)
    num_findings = sum(len(cases) for found in (shared, *(c.findings for c in checks)) for cases in found.values())
    left_out = "left out without --model_name_or_path: truncation, lengths in tokens, padding"
    tokens = f"settings: {settings}, {BATCH_SIZE} items a batch" if tokenizer else left_out
    blocks = [*map(format_file, checks), ["across files", *format_findings(shared)], [tokens]]
    report = "\n\n".join("\n".join(block) for block in [*blocks, [f"findings in total: {num_findings}"]])
    print(report.encode(errors="replace").decode())  # no unpaired surrogate of a record
    is_unusable = any(check.findings["unreadable"] + check.findings["bad records"] for check in checks)
    if is_unusable or (args.strict and num_findings):
        sys.exit(2)


if __name__ == "__main__":
    main()
