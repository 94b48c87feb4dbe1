"""Golden and sampled responses -> APO pairs, golden preferred over sampled.

example:
    python tools/apo_data_converter.py --golden_data_path data/sample/rm_data/hh_split_rm.golden.json \\
        --sample_data_path data/sample/rm_data/hh_split_rm_llm_v0.sample.json \\
        --output_dir outputs/apo_data --apo_data_name rm_apo_data_v0

writes `<output_dir>/<apo_data_name>_text_scores.json`, one pair per sampled response, in the order of its file:

    {"text": ["<query><sep><golden>", "<query><sep><sampled>"], "scores": [1.0, 0.0], "type": "apo"}

With `--group` a prompt becomes one record of all its responses, golden first, with scores [1.0, 0.0, 0.0, ...]: the
same pairs, but training computes prompt and golden response once. With N sampled responses, train with
`--apo_sample_num N`; with 1 where a micro-batch is a single record, because the pairs of the group are its whole
denominator then.
"""

import argparse
import itertools
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apo.cli import InputError, OneLineParser, describe, describe_counts, exit_on_input_error, first_few, write_json
from apo.prompts import GOLDEN_STOP_STRINGS, SAMPLE_STOP_STRINGS, count_cuts
from apo.records import SEPARATOR, PreferenceRecord, load_preference_data

logger = logging.getLogger(__name__)

STOP_STRINGS = {"golden": GOLDEN_STOP_STRINGS, "sampled": SAMPLE_STOP_STRINGS}
Responses = dict[str, PreferenceRecord]  # query id -> prompt and responses, in file order


@dataclass
class Conversion:
    """The APO records, and counts of everything that is not in them."""

    items: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> responses
    cut: Counter[str] = field(default_factory=Counter)  # "golden", "sampled" -> responses


def load_responses(path: str | Path, kind: str) -> Responses:
    """Reads a file of `golden` or `sampled` responses; see `apo.records.parse_record`."""
    return {record.query_id: record for record in load_preference_data(path, kind)}


def cut_next_turn(response: str, stop_strings: tuple[str, ...]) -> str:
    """Cuts a response where it continues as the user; any other response is returned unchanged."""
    for stop_string in stop_strings:
        if stop_string in response:
            response = response.split(stop_string, maxsplit=1)[0].strip()
    return response


def usable_responses(record: PreferenceRecord, kind: str, result: Conversion, golden: str = "") -> list[str]:
    """Cuts the responses of a record, drops those that make no pair, and counts both in `result`.

    A sampled response that equals the `golden` one is dropped: it would be preferred and not preferred at once.
    """
    result.cut[kind] += count_cuts(record.responses, STOP_STRINGS[kind])
    kept = []
    for response in (cut_next_turn(text, STOP_STRINGS[kind]) for text in record.responses):
        if SEPARATOR in response:
            result.skipped[f"{kind} with {SEPARATOR}"] += 1
        elif not response.strip():
            result.skipped[f"{kind} empty"] += 1
        elif response.strip() == golden.strip():
            result.skipped[f"{kind} same as golden"] += 1
        else:
            kept.append(response)
    return kept


def to_items(query_id: str, query: str, golden: str, sampled: list[str], group: bool) -> list[dict[str, Any]]:
    """Returns one pair per sampled response, as the reference writes them, or one group of all."""
    first, *others = (query + SEPARATOR + response for response in (golden, *sampled))
    if group:
        scores = [1.0] + [0.0] * len(others)
        return [{"text": [first, *others], "scores": scores, "type": "apo", "query_id": query_id}]
    return [{"text": [first, other], "scores": [1.0, 0.0], "type": "apo"} for other in others]


def find_difference(golden: PreferenceRecord, sampled: PreferenceRecord) -> str:
    """Shows where the prompts of one id start to differ; an empty string if they are the same."""
    expected, found = golden.prompts[0], sampled.prompts[0]
    if found == expected:
        return ""
    start = next(i for i, (x, y) in enumerate(itertools.zip_longest(found, expected)) if x != y)
    return (
        f'{sampled.place}: id {golden.query_id}: field "query": found, from character {start + 1} on, '
        f"{describe(found[start:])}, expected {describe(expected[start:])} as in {golden.place} of --golden_data_path"
    )


def convert(
    golden: Responses, sampled: Responses, *, group: bool = False, sampling: bool = False, seed: int = 42
) -> Conversion:
    """Pairs the golden response of every prompt with its sampled responses, in the order of `sampled`.

    Args:
        group: one record per prompt instead of one per pair.
        sampling: keep one sampled response per prompt, drawn with `seed` among the usable ones.
    """
    rng = random.Random(seed)
    result = Conversion()
    matched = [query_id for query_id in sampled if query_id in golden]
    if not matched:
        found = f"--golden_data_path has {first_few(list(golden))}; --sample_data_path has {first_few(list(sampled))}"
        raise InputError(f'field "query_id": found no id in both files, expected the same ids; {found}')
    if problems := list(filter(None, (find_difference(golden[i], sampled[i]) for i in matched))):
        raise InputError(f"--sample_data_path: prompts differ from --golden_data_path: {first_few(problems)}")
    for query_id in matched:
        for response in usable_responses(golden[query_id], "golden", result):
            if kept := usable_responses(sampled[query_id], "sampled", result, response):
                kept = [rng.choice(kept)] if sampling else kept
                result.items += to_items(query_id, golden[query_id].prompts[0], response, kept, group)
    if not result.items:
        skipped = describe_counts(result.skipped, "responses")
        raise InputError(f"{len(matched)} prompts matched, but no pair is left; skipped: {skipped}")
    return result


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    add = (parser := OneLineParser(description=__doc__)).add_argument
    add("--golden_data_path", required=True, help='records of "query_id", "query", "golden"')
    add("--sample_data_path", required=True, help='records of "query_id", "query", "sample_0", ...')
    add("--output_dir", type=Path, required=True, help="folder to write to; made if it does not exist")
    add("--apo_data_name", required=True, help="the file is <apo_data_name>_text_scores.json")
    sampling_help = "keep one random response per prompt; the file is <apo_data_name>_sampled_text_scores.json"
    add("--sampling", action="store_true", help=sampling_help)
    add("--seed", type=int, default=42, help="of --sampling (default: 42)")
    add("--group", action="store_true", help="one record per prompt, scores [1, 0, 0, ...]")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads both files, writes the APO data, prints one line."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = parse_args()
    golden = load_responses(args.golden_data_path, "golden")
    sampled = load_responses(args.sample_data_path, "sampled")
    result = convert(golden, sampled, group=args.group, sampling=args.sampling, seed=args.seed)
    golden_only, sampled_only = ([i for i in a if i not in b] for a, b in ((golden, sampled), (sampled, golden)))
    for kind, ids in (("golden", golden_only), ("sampled", sampled_only)):
        if ids:
            logger.warning("%d ids with %s responses only, left out: %s", len(ids), kind, first_few(ids))
    if result.cut.total():
        message = "cut where they continue as the user: %(golden)d golden, %(sampled)d sampled responses"
        logger.info(message, result.cut)
    path = args.output_dir / f"{args.apo_data_name}{'_sampled' * args.sampling}_text_scores.json"
    write_json(path, result.items)
    num_pairs = sum(len(item["text"]) - 1 for item in result.items)
    print(
        f"{len(sampled) - len(sampled_only)} prompts matched, {num_pairs} pairs written"
        f"{f' in {len(result.items)} groups' * args.group}, {len(golden_only) + len(sampled_only)} ids unmatched, "
        f"{describe_counts(result.skipped, 'responses')} skipped: {path}"
    )


if __name__ == "__main__":
    main()
