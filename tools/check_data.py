"""Checks data files before a run spends hours on them: reports faults and statistics.

example:
    python tools/check_data.py --train_data_path data/sample/rm_data/hh_split_rm.train.json \\
        --eval_data_path data/sample/eval_data/hh_cleaned_origin.test.json \\
        --model_name_or_path outputs/rm_base --output_dir outputs/check_data

It reads every format of the project: pairs, sampled responses, golden responses. It prints one block per file,
findings first, then what files share, and with `--output_dir` writes `check_data.json` and, given a tokenizer,
`check_data.png`.

A *finding* is one of `FINDINGS`. Bad records and unreadable files make the exit status 2, with `--strict` any finding
does. Everything else is a statistic: ties, length bias, lengths, truncated responses, padding. Prompts that a training
file shares with an evaluation file are a finding; two training files share prompts on purpose (golden and sampled
responses, the parts of a whole).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apo.cli import NUM_SHOWN, BadField, InputError, OneLineParser, at_least, exit_on_input_error, write_json
from apo.figures import plot_lengths_and_batching
from apo.prompts import DOUBTS, normalize_space
from apo.records import PreferenceRecord, iter_parsed, parse_record, record_kind
from apo.statistics import wilson_interval
from reward_datasets import RewardDataCollator, build_sequence, encode_records, name_datasets, preferred_pairs

if TYPE_CHECKING:
    from apo.tokenizer import RewardTokenizer

# What the report calls each kind of `record_kind`.
KINDS = {"comparison_pair": "pairs", "reject_sample": "samples", "golden": "golden"}
FINDINGS = {
    "unreadable": "the file cannot be read to its end, or holds something that is not a record",
    "bad_records": "bad records",
    "duplicates": "records with the prompt and the responses of an earlier one",
    "contradictions": "pairs that an earlier record prefers the other way round",
    "duplicate_ids": "records with the query id of an earlier one",
    "identical_pairs": "pairs of two equal texts",
    "identical_after_truncation": "pairs of two texts that become the same tokens",
    "prompts_cut_away": "responses whose whole prompt is cut away",
    "golden_without_samples": "golden responses without sampled ones",
    "samples_without_golden": "sampled responses without a golden one",
    "overlap": "prompts of training files that are also in evaluation files",
    **{name: f"records: {text}" for name, text in DOUBTS.items()},
}
LENGTHS = ("prompt", "response", "sequence")  # in tokens, before truncation
QUANTILES = {"min": 0, "5%": 5, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "max": 100}


class Findings(dict[str, dict[str, Any]]):
    """{name in `FINDINGS`: {"count": how many, "first": the first few, each with its place}}."""

    def add(self, name: str, example: str) -> None:
        assert name in FINDINGS, name
        finding = self.setdefault(name, {"count": 0, "first": []})
        finding["count"] += 1
        if len(finding["first"]) < NUM_SHOWN:
            finding["first"].append(example.encode(errors="replace").decode())  # no unpaired surrogate


@dataclass
class FileCheck:
    """The findings and statistics of a file; of each record it keeps two hashes and numbers, to save memory."""

    path: str
    name: str
    role: str  # train or eval
    response_keys: list[str] = field(default_factory=list)  # see `apo.records.find_response_keys`
    kind: str = "unknown"  # or one of `KINDS`
    findings: Findings = field(default_factory=Findings)
    counts: Counter[str] = field(default_factory=Counter)
    contents: dict[bytes, str] = field(default_factory=dict)  # hash of prompt and responses, of a pair -> first place
    prompts: dict[bytes, str] = field(default_factory=dict)  # hash of the prompt -> first place
    ids: dict[str, str] = field(default_factory=dict)  # query id -> first place; not of pairs, whose ids may repeat
    lengths: dict[str, array] = field(default_factory=lambda: {name: array("q") for name in LENGTHS})
    tokens_run: Counter[str] = field(default_factory=Counter)  # way of batching -> tokens
    passed_over: Counter[str] = field(default_factory=Counter)  # field that nothing reads -> records


def check_records(check: FileCheck, add_sep_token: bool) -> Iterator[tuple[str, PreferenceRecord]]:
    """Checks the texts of each good record, also after a bad one, and yields it with its place."""
    kind = ""

    def parse(raw: dict[str, Any], default_id: str) -> PreferenceRecord:
        nonlocal kind
        kind = kind or record_kind(raw)  # that of the first record
        return parse_record(raw, default_id, kind=kind, add_sep_token=add_sep_token, response_keys=check.response_keys)

    try:
        for place, record in iter_parsed(check.path, parse):
            check.kind = KINDS[kind]
            if isinstance(record, BadField):
                check.findings.add("bad_records", f"{place}: {record}")
            else:
                check_texts(check, place, record)
                yield place, record
    except InputError as error:
        check.findings.add("unreadable", str(error).removeprefix(f"{check.path}: "))


def digest(value: Any) -> bytes:
    """Returns a short hash of a JSON value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def check_texts(check: FileCheck, place: str, record: PreferenceRecord) -> None:
    """Adds the findings and counts of a record's texts, scores and id."""
    texts = list(zip(record.prompts, record.responses, strict=True))
    first = check.contents.setdefault(digest(sorted(set(texts))), place)
    if first != place:
        check.findings.add("duplicates", f"{place} is {first} again")
    if check.kind != "pairs" and check.ids.setdefault(record.query_id, place) != place:
        example = f"{place} and {check.ids[record.query_id]}: id {json.dumps(record.query_id)}"
        check.findings.add("duplicate_ids", example)
    for prompt in filter(None, map(normalize_space, dict.fromkeys(record.prompts))):
        check.prompts.setdefault(digest(prompt), place)

    for name in (name for name in record.doubts if name != "no_prompt"):  # a statistic: whole dialogues are common
        check.findings.add(name, place)
    check.passed_over.update(record.passed_over)
    check.counts.update(records=1, responses=len(texts))
    check.counts["empty_responses"] += sum(not response.strip() for response in record.responses)
    check.counts["without_prompt"] += not any(prompt.strip() for prompt in record.prompts)
    if check.kind != "pairs":
        return
    pairs = preferred_pairs(record.scores)
    check.counts.update(pairs=len(pairs), tied_pairs=math.comb(len(texts), 2) - len(pairs), tied_items=not pairs)
    for i, j in pairs:
        check.contents.setdefault(digest([texts[i], texts[j], ">"]), place)
        if texts[i] == texts[j]:
            check.findings.add("identical_pairs", f"{place}: responses {i + 1} and {j + 1}")
        elif opposite := check.contents.get(digest([texts[j], texts[i], ">"])):
            check.findings.add("contradictions", f"{place} prefers the opposite of {opposite}")
        length, other = len(record.responses[i]), len(record.responses[j])
        check.counts["longer_preferred"] += length > other
        check.counts["shorter_preferred"] += length < other


def tokenized_items(
    check: FileCheck,
    records: Iterator[tuple[str, PreferenceRecord]],
    tokenizer: RewardTokenizer,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Adds the findings and counts of each record's tokens, and yields items as `RewardDataCollator` takes them."""
    for place, record, ids in encode_records(records, tokenizer):
        sequences = [build_sequence(*pair, tokenizer, **settings) for pair in ids]
        different = dict(zip(record.prompts, (prompt for prompt, _ in ids), strict=True))
        check.lengths["prompt"].extend(map(len, different.values()))
        for number, (sequence, (prompt, response)) in enumerate(zip(sequences, ids, strict=True), start=1):
            after_prompt = len(response) + settings["add_sep_token"] + 1  # [sep] response eos
            whole = 1 + len(prompt) + after_prompt  # with bos
            check.lengths["response"].append(len(response))
            check.lengths["sequence"].append(whole)
            check.counts["truncated_responses"] += len(sequence) < whole
            if prompt and settings["truncation_side"] == "left" and len(sequence) <= after_prompt:
                check.findings.add("prompts_cut_away", f"{place}: response {number} ({len(response)} tokens)")
        texts = list(zip(record.prompts, record.responses, strict=True))
        for i, j in preferred_pairs(record.scores):
            if sequences[i] == sequences[j] and texts[i] != texts[j]:
                check.findings.add("identical_after_truncation", f"{place}: responses {i + 1} and {j + 1}")
        yield {"input_ids": sequences, "scores": [0.0] * len(sequences), "is_apo": record.is_apo}


def count_tokens_run(items: list[dict[str, Any]], pad_token_id: int, max_length: int) -> Counter[str]:
    """Counts the tokens of a batch: needed (its sequences), as a tree, padded, and as the reference pads it.

    The reference pads a batch of several items to `max_length`, and adds a dummy for each absent response.
    """
    collators = (RewardDataCollator(pad_token_id, batching=batching) for batching in ("padded", "tree"))
    padded, tree = (collator(items)["input_ids"].numel() for collator in collators)
    reference = len(items) * max(len(item["input_ids"]) for item in items) * max_length if len(items) > 1 else padded
    needed = sum(len(ids) for item in items for ids in item["input_ids"])
    return Counter(needed=needed, reference=reference, padded=padded, tree=tree)


def check_file(
    check: FileCheck, settings: dict[str, Any], tokenizer: RewardTokenizer | None = None, batch_size: int = 8
) -> FileCheck:
    """Reads a file and adds its findings and statistics to `check`; without a tokenizer, none that need tokens."""
    records = check_records(check, settings["add_sep_token"])
    items = tokenized_items(check, records, tokenizer, settings) if tokenizer else records
    while batch := list(itertools.islice(items, batch_size)):
        if tokenizer:
            check.tokens_run.update(count_tokens_run(batch, tokenizer.pad_token_id, settings["max_length"]))
    return check


def compare_ids(checks: list[FileCheck]) -> Findings:
    """Finds the ids without a golden or without a sampled response, if there are files of both kinds."""
    findings = Findings()
    others = {"golden": "samples", "samples": "golden"}
    for check in checks:
        other = others.get(check.kind)
        known = {query_id for check in checks if check.kind == other for query_id in check.ids}
        for query_id, place in check.ids.items() if known else ():
            if query_id not in known:
                findings.add(f"{check.kind}_without_{other}", f"{check.name}: {place}: id {json.dumps(query_id)}")
    return findings


def compare_prompts(checks: list[FileCheck]) -> list[dict[str, Any]]:
    """Counts the different prompts that two files share, ignoring white space, for every two files that share any."""
    rows = []
    for one, other in itertools.combinations(checks, 2):
        if shared := [key for key in one.prompts if key in other.prompts]:
            row = {"files": [one.name, other.name], "prompts": len(shared)}
            row["of"] = [len(one.prompts), len(other.prompts)]
            row["first"] = [f"{one.prompts[key]} and {other.prompts[key]}" for key in shared[:NUM_SHOWN]]
            rows.append({**row, "is_finding": one.role != other.role})
    return rows


def summarize(check: FileCheck) -> dict[str, Any]:
    """Returns the statistics of one file; lengths in tokens are those before truncation."""
    counts = check.counts
    names = ["records", "responses", "empty_responses", "without_prompt"]
    names += ["pairs", "tied_pairs", "tied_items"] * (check.kind == "pairs")
    result: dict[str, Any] = {name: counts[name] for name in names}
    result |= {"passed_over": dict(check.passed_over)} if check.passed_over else {}
    if num_compared := counts["pairs"] + counts["tied_pairs"]:
        result["share_of_tied_pairs"] = counts["tied_pairs"] / num_compared
        result["share_of_tied_items"] = counts["tied_items"] / counts["records"]
    if num_pairs := counts["longer_preferred"] + counts["shorter_preferred"]:
        share = counts["longer_preferred"] / num_pairs
        interval = list(wilson_interval(share, num_pairs))
        result["longer_preferred"] = {"share": share, "interval_95": interval, "pairs": num_pairs}
    if run := dict(check.tokens_run):
        result["truncated_responses"] = counts["truncated_responses"]
        points = {name: np.percentile(values, list(QUANTILES.values())) for name, values in check.lengths.items()}
        result["tokens"] = {name: dict(zip(QUANTILES, p.tolist(), strict=True)) for name, p in points.items()}
        if check.kind != "golden":  # the model never runs golden responses alone
            ratios = {name: run[name] / run["needed"] for name in ("reference", "padded", "tree")}
            result |= {"tokens_run": run, "tokens_run_per_needed": ratios}
    return result


def make_report(checks: list[FileCheck], settings: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the content of `check_data.json`; `num_findings` is the sum of all counts of findings."""
    files = [
        {"path": c.path, "role": c.role, "kind": c.kind, "findings": c.findings, "statistics": summarize(c)}
        for c in checks
    ]
    unmatched, overlap = compare_ids(checks), compare_prompts(checks)
    num_findings = sum(f["count"] for found in (unmatched, *(c.findings for c in checks)) for f in found.values())
    num_findings += sum(row["prompts"] for row in overlap if row["is_finding"])
    report = {"settings": settings, "num_findings": num_findings, "files": files}
    return {**report, "unmatched_ids": unmatched, "overlap": overlap}


def format_findings(findings: dict[str, dict[str, Any]]) -> list[str]:
    """Returns for each finding, in the order of `FINDINGS`, its count and its examples, one line each."""
    lines = []
    for name in filter(findings.__contains__, FINDINGS):
        count, first = findings[name]["count"], findings[name]["first"]
        more = [f"... and {count - NUM_SHOWN} more"] * (count > NUM_SHOWN)
        lines += [f"  FOUND {count} {FINDINGS[name]} ({name})", *(f"        {line}" for line in first + more)]
    return lines


def format_value(value: Any) -> str:
    """Returns a statistic as text: numbers with four digits, objects as "name value, name value"."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_file(entry: dict[str, Any]) -> list[str]:
    """Returns the lines of one file: its findings, then its statistics under the names of `check_data.json`."""
    stats = dict(entry["statistics"])
    stats |= {f"tokens per {name}": values for name, values in stats.pop("tokens", {}).items()}
    lines = [f"{entry['path']} ({entry['role']}): {entry['kind']}, {stats['records']} good records"]
    lines += format_findings(entry["findings"]) or ["  nothing found"]
    return lines + [f"  {name:<22} {format_value(value)}" for name, value in stats.items() if stats["records"]]


def format_report(report: dict[str, Any]) -> str:
    """Returns the report as text: one block per file, then what files share, then the total."""
    blocks = [format_file(entry) for entry in report["files"]]
    shared = format_findings(report["unmatched_ids"])
    for row in sorted(report["overlap"], key=lambda row: not row["is_finding"]):
        files = " and ".join(f"{name} (of {count})" for name, count in zip(row["files"], row["of"], strict=True))
        if row["is_finding"]:
            shared += format_findings({"overlap": {"count": row["prompts"], "first": [files, *row["first"]]}})
        else:
            shared.append(f"  {row['prompts']} prompts shared by {files}")
    if len(blocks) > 1:
        blocks.append(["across files", *(shared or ["  nothing found"])])
    left_out = "left out without --model_name_or_path: truncation, lengths in tokens, padding"
    blocks.append([f"settings: {format_value(report['settings'])}" if report["settings"] else left_out])
    blocks.append([f"findings in total: {report['num_findings']}"])
    return "\n\n".join("\n".join(block) for block in blocks)


def parse_bool(word: str) -> bool | str:
    """Reads true or false; argparse refuses any other word."""
    return {"true": True, "false": False}.get(word.lower(), word)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    add = (parser := OneLineParser(description=__doc__)).add_argument
    add("--train_data_path", nargs="+", default=[], help="files used in training, of any kind")
    add("--eval_data_path", nargs="+", default=[], help="files for evaluation, of any kind")
    add("--model_name_or_path", help="model whose tokenizer counts; without it nothing is tokenised")
    add("--max_length", type=at_least(8), help="longest sequence in tokens (default: the checkpoint's, or 256)")
    add("--truncation_side", choices=("left", "right"), help="side that is cut (default: the checkpoint's, or left)")
    sep_help = "separator between prompt and response (default: as the checkpoint, or false)"
    add("--add_sep_token", nargs="?", const=True, type=parse_bool, choices=(True, False), help=sep_help)
    add("--batch_size", type=at_least(1), default=8, help="items of a batch whose tokens are counted (default: 8)")
    add("--output_dir", type=Path, help="folder for check_data.json and check_data.png")
    add("--response_keys", nargs="+", default=[], help="fields with responses besides sample_<n> and ans_<n>")
    add("--strict", action="store_true", help="exit status 2 for any finding, not only for bad records")
    return parser.parse_args()


def load_tokenizer(path: str, flags: dict[str, Any]) -> tuple[RewardTokenizer, dict[str, Any]]:
    """Returns the tokenizer of a model, and the settings that `train.py` would use with these flags."""
    from apo.tokenizer import load_reward_tokenizer
    from models import load_config, resolve_settings

    config = load_config(path)
    settings = resolve_settings(config, **flags)
    return load_reward_tokenizer(path, config, settings.tokenizer_backend), settings.sequence_settings


@exit_on_input_error
def main() -> None:
    """Checks each file, compares them, prints, writes."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args()
    files = [("train", path) for path in args.train_data_path] + [("eval", path) for path in args.eval_data_path]
    if not files:
        raise InputError("nothing to check: give --train_data_path, --eval_data_path, or both")
    tokenizer, settings, recorded = None, {"add_sep_token": bool(args.add_sep_token)}, None
    if args.model_name_or_path:
        flags = {name: getattr(args, name) for name in ("max_length", "truncation_side", "add_sep_token")}
        tokenizer, settings = load_tokenizer(args.model_name_or_path, flags)
        recorded = {"tokenizer": args.model_name_or_path, **settings, "batch_size": args.batch_size}

    files = [(role, os.path.normpath(path)) for role, path in files]
    names = {path: name for name, path in name_datasets([path for _, path in files]).items()}
    checks = [
        check_file(FileCheck(path, names[path], role, args.response_keys), settings, tokenizer, args.batch_size)
        for role, path in dict.fromkeys(files)
    ]
    report = make_report(checks, recorded)
    print(format_report(report))
    if args.output_dir:
        write_json(args.output_dir / "check_data.json", report)
        if tokenizer:
            lengths = {check.name: check.lengths["sequence"] for check in checks if check.tokens_run}
            stats = {check.name: entry["statistics"] for check, entry in zip(checks, report["files"], strict=True)}
            ratios = {name: s["tokens_run_per_needed"] for name, s in stats.items() if "tokens_run_per_needed" in s}
            plot_lengths_and_batching(args.output_dir / "check_data.png", lengths, ratios, settings["max_length"])
    is_unusable = any(check.findings.keys() & {"unreadable", "bad_records"} for check in checks)
    if is_unusable or (args.strict and report["num_findings"]):
        sys.exit(2)


if __name__ == "__main__":
    main()
