"""Data doctor: what is wrong with data files, and what is in them, before a run spends hours on them.

    python tools/check_data.py --train_data_path data/sample/rm_data/hh_split_rm.train.json \\
        --eval_data_path data/sample/eval_data/hh_cleaned_origin.test.json \\
        --model_name_or_path outputs/rm_base --output_dir outputs/check_data

It reads every format of the project: pairs, samples, golden answers. It prints one block a file, findings first, then
what lies between the files, and with `--output_dir` writes `check_data.json` and, given a tokenizer, `check_data.png`.

A *finding* is one of `FINDINGS`; with `--strict` any of them makes the exit status 2. Everything else is a statistic:
ties, length bias, lengths, truncated responses, padding. Prompts that a training file shares with an evaluation file
are a finding; files of the same side share prompts on purpose (golden answers and samples, the parts of a whole).
"""

from __future__ import annotations

import argparse
import collections
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

from apo.cli import NUM_SHOWN, BadField, InputError, OneLineParser, exit_on_input_error, write_json
from apo.figures import new_figure, save_figure
from apo.records import (
    SEPARATOR,
    PreferenceRecord,
    iter_records,
    parse_record,
    require_query_id,
    require_string,
    require_text,
)
from apo.statistics import wilson_interval
from reward_datasets import (
    RewardDataCollator,
    build_sequence,
    encode_records,
    name_datasets,
    normalize_scores,
    preferred_pairs,
)

if TYPE_CHECKING:
    from apo.tokenizer import RewardTokenizer

FINDINGS = {
    "unreadable": "the file is not readable to its end, or holds other things than records",
    "bad_records": "bad records",
    "duplicates": "records with the prompt and the responses of an earlier one",
    "duplicate_ids": "records with the query id of an earlier one",
    "identical_pairs": "pairs of twice the same text",
    "identical_after_truncation": "pairs of two texts that become the same tokens",
    "prompts_cut_away": "responses whose whole prompt is cut away",
    "golden_without_samples": "golden answers without samples",
    "samples_without_golden": "samples without a golden answer",
    "overlap": "prompts of training files that evaluation files hold too",
}
QUANTILES = {"min": 0, "5%": 5, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "max": 100}


class Findings(dict[str, dict[str, Any]]):
    """{name in `FINDINGS`: {"count": how many, "first": the first few, each with its place}}."""

    def add(self, name: str, example: str) -> None:
        assert name in FINDINGS, name
        finding = self.setdefault(name, {"count": 0, "first": []})
        finding["count"] += 1
        if len(finding["first"]) < NUM_SHOWN:
            finding["first"].append(example.encode(errors="replace").decode())  # no file holds half a surrogate pair


@dataclass
class FileCheck:
    """All that is kept of a file; of each record little more than two hashes, so that memory stays low."""

    path: str
    name: str
    role: str  # train or eval
    kind: str = "unknown"  # pairs, samples or golden
    findings: Findings = field(default_factory=Findings)
    counts: Counter[str] = field(default_factory=Counter)
    contents: dict[bytes, str] = field(default_factory=dict)  # hash of prompt and responses -> first place
    prompts: dict[bytes, str] = field(default_factory=dict)  # hash of the prompt -> first place
    ids: dict[str, str] = field(default_factory=dict)  # query id -> first place; where an id must be the only one
    lengths: dict[str, array] = field(  # in tokens, before truncation
        default_factory=lambda: {name: array("q") for name in ("prompt", "response", "sequence")}
    )
    tokens_run: Counter[str] = field(default_factory=Counter)  # way of batching -> tokens


# ------------------------------------------------------------------------------------------------ texts


def kind_of(raw: dict[str, Any]) -> str:
    """Tells the format of a file from its first record."""
    if "query" not in raw:
        return "pairs"
    return "golden" if "golden" in raw else "samples"


def parse_golden(raw: dict[str, Any]) -> PreferenceRecord:
    """Checks a golden answer as the converter does, which counts and skips an empty one."""
    query_id, query = require_query_id(raw), require_text(raw, "query")
    if SEPARATOR in query:
        raise BadField("query", f"a text with {SEPARATOR}", f"one without; {SEPARATOR} is put behind it")
    return PreferenceRecord([query], [require_string(raw, "golden")], [0.0], query_id, ["golden"])


def parse_records(check: FileCheck, add_sep_token: bool) -> Iterator[tuple[str, PreferenceRecord]]:
    """Checks the texts of each good record, those behind a bad one too, and yields it with its place."""
    try:
        for index, (place, raw) in enumerate(iter_records(check.path)):
            if index == 0:
                check.kind = kind_of(raw)
            try:
                if check.kind == "golden":
                    record = parse_golden(raw)
                else:
                    data_type = "comparison_pair" if check.kind == "pairs" else "reject_sample"
                    record = parse_record(raw, data_type, str(index), add_sep_token)
            except BadField as error:
                check.findings.add("bad_records", f"{place}: {error}")
            else:
                check_texts(check, place, record)
                yield place, record
    except InputError as error:
        check.findings.add("unreadable", str(error).removeprefix(f"{check.path}: "))


def digest(value: Any) -> bytes:
    """A hash of 16 bytes that stands for a value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def pairs_of(record: PreferenceRecord) -> list[tuple[int, int]]:
    """The pairs (i, j) of an item in which training prefers i: float32 of the normalised scores tells, as there."""
    return preferred_pairs(np.float32(normalize_scores(record.scores)).tolist())


def check_texts(check: FileCheck, place: str, record: PreferenceRecord) -> None:
    """Adds what a record's texts, scores and id tell."""
    texts = list(zip(record.prompts, record.responses, strict=True))
    first = check.contents.setdefault(digest(sorted(set(texts))), place)
    if first != place:
        check.findings.add("duplicates", f"{place} is {first} again")
    if check.kind != "pairs" and check.ids.setdefault(record.query_id, place) != place:
        check.findings.add(
            "duplicate_ids", f"{place} and {check.ids[record.query_id]}: id {json.dumps(record.query_id)}"
        )
    for prompt in filter(None, (" ".join(prompt.split()) for prompt in dict.fromkeys(record.prompts))):
        check.prompts.setdefault(digest(prompt), place)

    check.counts.update(records=1, responses=len(texts))
    check.counts["empty_responses"] += sum(not response.strip() for response in record.responses)
    check.counts["without_prompt"] += not any(prompt.strip() for prompt in record.prompts)
    if check.kind != "pairs":
        return
    pairs = pairs_of(record)
    check.counts.update(pairs=len(pairs), tied_pairs=math.comb(len(texts), 2) - len(pairs), tied_items=not pairs)
    for i, j in pairs:
        if texts[i] == texts[j]:
            check.findings.add("identical_pairs", f"{place}: responses {i + 1} and {j + 1}")
        length, other = len(record.responses[i]), len(record.responses[j])
        check.counts["longer_preferred"] += length > other
        check.counts["shorter_preferred"] += length < other


# ------------------------------------------------------------------------------------------------ tokens


def tokenized_items(
    check: FileCheck,
    records: Iterator[tuple[str, PreferenceRecord]],
    tokenizer: RewardTokenizer,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Adds what the tokens of each record tell, and yields items as `RewardDataCollator` takes them."""
    unlimited = {**settings, "max_length": sys.maxsize}
    for place, record, ids in encode_records(records, tokenizer):
        sequences = [build_sequence(*pair, tokenizer, **settings) for pair in ids]
        different = dict(zip(record.prompts, (prompt for prompt, _ in ids), strict=True))
        check.lengths["prompt"].extend(map(len, different.values()))
        for number, (sequence, (prompt, response)) in enumerate(zip(sequences, ids, strict=True), start=1):
            whole = len(build_sequence(prompt, response, tokenizer, **unlimited))
            check.lengths["response"].append(len(response))
            check.lengths["sequence"].append(whole)
            check.counts["truncated_responses"] += len(sequence) < whole
            behind_prompt = whole - 1 - len(prompt)  # bos stands before it
            if prompt and settings["truncation_side"] == "left" and len(sequence) <= behind_prompt:
                check.findings.add("prompts_cut_away", f"{place}: response {number} ({len(response)} tokens)")
        for i, j in pairs_of(record) if check.kind == "pairs" else ():
            is_same_text = (record.prompts[i], record.responses[i]) == (record.prompts[j], record.responses[j])
            if sequences[i] == sequences[j] and not is_same_text:
                check.findings.add("identical_after_truncation", f"{place}: responses {i + 1} and {j + 1}")
        yield {"input_ids": sequences, "scores": record.scores, "is_apo": record.is_apo}


def count_tokens_run(items: list[dict[str, Any]], pad_token_id: int, max_length: int) -> Counter[str]:
    """Tokens that a batch of these items costs: needed (its sequences), as a tree, padded, and as the reference pads.

    The reference pads a batch of several items to `max_length`, and fills absent responses up with a dummy.
    """
    padded, tree = (
        RewardDataCollator(pad_token_id, batching=batching)(items)["input_ids"].numel()
        for batching in ("padded", "tree")
    )
    reference = len(items) * max(len(item["input_ids"]) for item in items) * max_length if len(items) > 1 else padded
    needed = sum(len(ids) for item in items for ids in item["input_ids"])
    return Counter(needed=needed, reference=reference, padded=padded, tree=tree)


def check_file(
    check: FileCheck, settings: dict[str, Any], tokenizer: RewardTokenizer | None = None, batch_size: int = 8
) -> FileCheck:
    """Reads a file once and adds to `check` all that it tells.

    Args:
        check: of the file; nothing but its path, name and role is known yet.
        settings: `add_sep_token`, and with a tokenizer `max_length` and `truncation_side`.
        tokenizer: None leaves out what needs tokens.
        batch_size: items of the batches whose tokens are counted.
    """
    records = parse_records(check, settings["add_sep_token"])
    if tokenizer is None:
        collections.deque(records, maxlen=0)
        return check
    items = tokenized_items(check, records, tokenizer, settings)
    while batch := list(itertools.islice(items, batch_size)):
        check.tokens_run.update(count_tokens_run(batch, tokenizer.pad_token_id, settings["max_length"]))
    return check


# ------------------------------------------------------------------------------------------------ between files


def compare_ids(checks: list[FileCheck]) -> Findings:
    """Finds ids that only golden files or only samples files hold, if there are files of both kinds."""
    findings = Findings()
    known = {
        kind: {query_id for check in checks if check.kind == kind for query_id in check.ids}
        for kind in ("golden", "samples")
    }
    names = {"golden": ("samples", "golden_without_samples"), "samples": ("golden", "samples_without_golden")}
    for check in checks if all(known.values()) else ():
        other, name = names.get(check.kind, ("", ""))
        for query_id, place in check.ids.items() if other else ():
            if query_id not in known[other]:
                findings.add(name, f"{check.name}: {place}: id {json.dumps(query_id)}")
    return findings


def compare_prompts(checks: list[FileCheck]) -> list[dict[str, Any]]:
    """Counts the prompts that two files share, white space aside, for every two files that share any.

    Returns:
        rows of "files", "prompts" (different ones), "of" (how many each file has), "first" (a few places), and
        "is_finding": one file is for training, the other for evaluation.
    """
    rows = []
    for one, other in itertools.combinations(checks, 2):
        shared = [key for key in one.prompts if key in other.prompts]
        if shared:
            row = {"files": [one.name, other.name], "prompts": len(shared)}
            row["of"] = [len(one.prompts), len(other.prompts)]
            row["first"] = [f"{one.prompts[key]} and {other.prompts[key]}" for key in shared[:NUM_SHOWN]]
            rows.append({**row, "is_finding": one.role != other.role})
    return rows


# ------------------------------------------------------------------------------------------------ reporting


def quantiles(lengths: array) -> dict[str, float]:
    """The quantiles of `QUANTILES`, interpolated."""
    return dict(zip(QUANTILES, np.percentile(lengths, list(QUANTILES.values())).tolist(), strict=True))


def summarize(check: FileCheck) -> dict[str, Any]:
    """The statistics of one file; lengths in tokens are those before truncation."""
    counts = check.counts
    names = ["records", "responses", "empty_responses", "without_prompt"]
    names += ["pairs", "tied_pairs", "tied_items"] * (check.kind == "pairs")
    result: dict[str, Any] = {name: counts[name] for name in names}
    if result.get("pairs", 0) + result.get("tied_pairs", 0):
        result["share_of_tied_pairs"] = counts["tied_pairs"] / (counts["tied_pairs"] + counts["pairs"])
        result["share_of_tied_items"] = counts["tied_items"] / counts["records"]
    if num_pairs := counts["longer_preferred"] + counts["shorter_preferred"]:
        share = counts["longer_preferred"] / num_pairs
        interval = list(wilson_interval(share, num_pairs))
        result["longer_preferred"] = {"share": share, "interval_95": interval, "pairs": num_pairs}
    if run := dict(check.tokens_run):
        result["truncated_responses"] = counts["truncated_responses"]
        result["tokens"] = {name: quantiles(lengths) for name, lengths in check.lengths.items()}
        if check.kind != "golden":  # golden answers are never run by themselves
            ratios = {name: run[name] / run["needed"] for name in ("reference", "padded", "tree")}
            result |= {"tokens_run": run, "tokens_run_per_needed": ratios}
    return result


def make_report(checks: list[FileCheck], settings: dict[str, Any] | None) -> dict[str, Any]:
    """The whole result, as `check_data.json` holds it; `num_findings` adds up all counts of findings."""
    files = [
        {"path": c.path, "role": c.role, "kind": c.kind, "findings": c.findings, "statistics": summarize(c)}
        for c in checks
    ]
    unmatched, overlap = compare_ids(checks), compare_prompts(checks)
    num_findings = sum(f["count"] for found in (unmatched, *(c.findings for c in checks)) for f in found.values())
    num_findings += sum(row["prompts"] for row in overlap if row["is_finding"])
    report = {"settings": settings, "num_findings": num_findings, "files": files}
    return {**report, "unmatched_ids": unmatched, "overlap": overlap}


def format_finding(name: str, count: int, first: list[str]) -> list[str]:
    """How many of what, and the first few, a line each."""
    more = [f"... and {count - NUM_SHOWN} more"] * (count > NUM_SHOWN)
    return [f"  FOUND {count} {FINDINGS[name]} ({name})", *(f"        {line}" for line in first + more)]


def format_findings(findings: dict[str, dict[str, Any]]) -> list[str]:
    """All findings of a file, or between files."""
    return [line for name in FINDINGS if name in findings for line in format_finding(name, **findings[name])]


def format_file(entry: dict[str, Any], settings: dict[str, Any] | None) -> list[str]:
    """The block of one file."""
    stats = entry["statistics"]
    lines = [f"{entry['path']} ({entry['role']}): {entry['kind']}, {stats['records']} good records"]
    lines += format_findings(entry["findings"]) or ["  nothing found"]
    if not stats["records"]:
        return lines
    lines.append(
        "  responses     {responses}, {empty_responses} empty; {without_prompt} records without prompt".format(**stats)
    )
    if "share_of_tied_pairs" in stats:
        ties = "{tied_pairs} pairs ({share_of_tied_pairs:.1%}), {tied_items} whole items ({share_of_tied_items:.1%})"
        lines.append(f"  pairs         {stats['pairs']}; equal scores: {ties.format(**stats)}")
    if longer := stats.get("longer_preferred"):
        interval = "[{:.1%}, {:.1%}]".format(*longer["interval_95"])
        share = f"{longer['share']:.1%} {interval} of {longer['pairs']} pairs"
        lines.append(f"  length bias   the response of more characters is preferred in {share}")
    if tokens := stats.get("tokens"):
        lines.append("  tokens        " + "".join(f"{name:>8}" for name in QUANTILES))
        lines += [f"    {n:<12}" + "".join(f"{q:8.0f}" for q in values.values()) for n, values in tokens.items()]
        share = stats["truncated_responses"] / stats["responses"]
        how = f"to {settings['max_length']} tokens, cut on the {settings['truncation_side']}"
        lines.append(f"  truncated     {stats['truncated_responses']} responses ({share:.1%}) {how}")
    if ratios := stats.get("tokens_run_per_needed"):
        ways = "padded {padded:.2f}, padded as in the reference {reference:.2f}, tree {tree:.2f}".format(**ratios)
        needed, size = stats["tokens_run"]["needed"], settings["batch_size"]
        lines.append(f"  tokens run    for each of {needed}, in batches of {size} items: {ways}")
    return lines


def format_overlap(row: dict[str, Any]) -> list[str]:
    """What two files share."""
    files = " and ".join(f"{name} (of {count})" for name, count in zip(row["files"], row["of"], strict=True))
    if not row["is_finding"]:
        return [f"  {row['prompts']} prompts shared by {files}"]
    return format_finding("overlap", row["prompts"], [files, *row["first"]])


def format_report(report: dict[str, Any]) -> str:
    """The report as text: one block a file, then what lies between the files, then the sum."""
    blocks = [format_file(entry, report["settings"]) for entry in report["files"]]
    between = format_findings(report["unmatched_ids"])
    for row in sorted(report["overlap"], key=lambda row: not row["is_finding"]):
        between += format_overlap(row)
    if len(blocks) > 1:
        blocks.append(["between the files", *(between or ["  nothing found"])])
    if report["settings"] is None:
        blocks.append(["left out without --model_name_or_path: truncation, lengths in tokens, padding"])
    blocks.append([f"findings in total: {report['num_findings']}"])
    return "\n\n".join("\n".join(block) for block in blocks)


def draw_report(path: Path, checks: list[FileCheck], max_length: int) -> None:
    """Draws the lengths of the sequences of each file, and the tokens that each way of batching runs."""
    checks = [check for check in checks if check.tokens_run]
    figure, (histogram, bars) = new_figure(2, width=5.5, height=3 + 0.5 * len(checks))
    bins = np.linspace(0, max((max(check.lengths["sequence"]) for check in checks), default=1), 41)
    for check in checks:
        lengths = check.lengths["sequence"]
        weights = np.full(len(lengths), 1 / len(lengths))
        histogram.hist(lengths, bins=bins, weights=weights, histtype="step", label=check.name)
    histogram.axvline(max_length, color="grey", linestyle=":", label="max_length")
    histogram.set(xlabel="tokens of a sequence, before truncation", ylabel="share", title="length")
    histogram.legend(fontsize=7)
    run = {c.name: summarize(c)["tokens_run_per_needed"] for c in checks if c.kind != "golden"}
    for offset, way in zip((0.25, 0, -0.25), ("tree", "padded", "reference"), strict=True):
        bars.barh(np.arange(len(run)) - offset, [ratios[way] for ratios in run.values()], height=0.23, label=way)
    bars.set_yticks(range(len(run)), list(run), fontsize=7)
    bars.invert_yaxis()
    bars.axvline(1, color="grey", linestyle=":")
    bars.set(xlabel="tokens run for each that the sequences hold", title="batching")
    bars.legend(fontsize=7)
    save_figure(path, figure)


# ------------------------------------------------------------------------------------------------ command line


def parse_bool(word: str) -> bool:
    """Reads true or false."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {word}, expected true or false")
    return word.lower() == "true"


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="Says what is wrong with data files, and what is in them.",
        epilog="example:\n"
        "  python tools/check_data.py --train_data_path data/sample/rm_data/hh_split_rm.train.json \\\n"
        "      --eval_data_path data/sample/eval_data/hh_cleaned_origin.test.json \\\n"
        "      --model_name_or_path outputs/rm_base --output_dir outputs/check_data",
    )
    parser.add_argument("--train_data_path", nargs="+", default=[], help="files that training draws on, of any kind")
    parser.add_argument("--eval_data_path", nargs="+", default=[], help="files for evaluation, of any kind")
    parser.add_argument("--model_name_or_path", help="model whose tokenizer counts; without it nothing is tokenised")
    parser.add_argument(
        "--max_length", type=int, help="longest sequence in tokens (default: the checkpoint's, or 256)"
    )
    parser.add_argument(
        "--truncation_side", choices=("left", "right"), help="side cut off (default: the checkpoint's, or left)"
    )
    sep_help = "separator between prompt and response (default: as the checkpoint, or false)"
    parser.add_argument("--add_sep_token", nargs="?", const=True, type=parse_bool, help=sep_help)
    parser.add_argument("--batch_size", type=int, default=8, help="items of a batch whose tokens count (default: 8)")
    parser.add_argument("--output_dir", type=Path, help="folder for check_data.json and check_data.png")
    parser.add_argument("--strict", action="store_true", help="exit status 2 when anything is found")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Refuses arguments that cannot work, before anything loads."""
    paths = [*args.train_data_path, *args.eval_data_path]
    if not paths:
        raise InputError("nothing to check: give --train_data_path, --eval_data_path, or both")
    for path in paths:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; give the path of an existing .json, .jsonl, .gz or .parquet file")
    for name, least in (("max_length", 8), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: expected at least {least}")
    if args.output_dir:
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output_dir {args.output_dir}: cannot be made ({error.strerror}); give another folder"
            ) from error


def load_tokenizer(path: str, flags: dict[str, Any]) -> tuple[RewardTokenizer, dict[str, Any]]:
    """The tokenizer of a model, and its settings as `train.py` would settle them."""
    from apo.tokenizer import load_reward_tokenizer
    from models import load_config, resolve_settings

    config = load_config(path)
    settings = resolve_settings(config, **flags)
    tokenizer = load_reward_tokenizer(path, config, settings.tokenizer_backend)
    return tokenizer, {name: getattr(settings, name) for name in flags}


@exit_on_input_error
def main() -> None:
    """Checks each file, compares them, prints, writes."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args()
    check_args(args)
    tokenizer, settings, recorded = None, {"add_sep_token": bool(args.add_sep_token)}, None
    if args.model_name_or_path:
        flags = {name: getattr(args, name) for name in ("max_length", "truncation_side", "add_sep_token")}
        tokenizer, settings = load_tokenizer(args.model_name_or_path, flags)
        recorded = {"tokenizer": args.model_name_or_path, **settings, "batch_size": args.batch_size}

    files = [("train", path) for path in args.train_data_path] + [("eval", path) for path in args.eval_data_path]
    names = {path: name for name, path in name_datasets([path for _, path in files]).items()}
    checks = [
        check_file(FileCheck(path, names[os.path.normpath(path)], role), settings, tokenizer, args.batch_size)
        for role, path in dict.fromkeys(files)
    ]
    report = make_report(checks, recorded)
    print(format_report(report))
    if args.output_dir:
        write_json(args.output_dir / "check_data.json", report)
        if tokenizer:
            draw_report(args.output_dir / "check_data.png", checks, settings["max_length"])
    if args.strict and report["num_findings"]:
        sys.exit(2)


if __name__ == "__main__":
    main()
