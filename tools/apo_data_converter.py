"""Golden answers + LLM samples -> APO pairs, golden preferred over sampled.

    python tools/apo_data_converter.py --golden_data_path data/sample/rm_data/hh_split_rm.golden.json \\
        --sample_data_path data/sample/rm_data/hh_split_rm_llm_v0.sample.json \\
        --output_dir outputs/apo_data --apo_data_name rm_apo_data_v0

writes `<output_dir>/<apo_data_name>_text_scores.json`, one pair per sample, in the order of the samples file:

    {"text": ["<query><sep><golden>", "<query><sep><sample>"], "scores": [1.0, 0.0], "type": "apo"}

With `--group` a prompt becomes one item of all its answers, golden first, with scores [1.0, 0.0, 0.0, ...]: the same
pairs, but training computes prompt and golden answer once. Of N samples, train with `--apo_sample_num N`; with 1 where
a micro-batch is a single item, because the pairs of the group are its whole denominator then.
"""

import argparse
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from apo.cli import (
    BadField,
    InputError,
    OneLineParser,
    describe,
    describe_counts,
    exit_on_input_error,
    first_few,
    raise_bad_records,
    write_json,
)
from apo.prompts import GOLDEN_STOP_STRINGS, SAMPLE_STOP_STRINGS, count_cuts
from apo.records import SEPARATOR, read_records, require_query_id, require_string, require_text

logger = logging.getLogger(__name__)

SAMPLE_PREFIX = "sample_"


@dataclass(frozen=True)
class PromptAnswers:
    """What one record of a golden or a samples file says: a prompt and its answers, unaltered."""

    path: str
    place: str
    query: str
    answers: tuple[str, ...]


@dataclass
class Conversion:
    """The APO items, and what became of everything else."""

    items: list[dict] = field(default_factory=list)
    num_pairs: int = 0
    num_matched: int = 0
    golden_without_samples: list[str] = field(default_factory=list)
    samples_without_golden: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> answers
    cut: Counter[str] = field(default_factory=Counter)  # "golden", "sampled" -> answers


# ------------------------------------------------------------------------------------------------ reading


def read_golden(path: str | Path) -> dict[str, PromptAnswers]:
    """Reads `{"query_id", "query", "golden"}` records.

    Returns:
        query id (as a string) -> prompt and its one answer, in file order.

    Raises:
        InputError: the file cannot be read, a field is missing or no string, or an id occurs twice.
    """
    return _read_answers(path, lambda record: ("golden",))


def read_samples(path: str | Path) -> dict[str, PromptAnswers]:
    """Reads `{"query_id", "query", "sample_0", "sample_1", ...}` records; any number of samples, in numeric order.

    Returns:
        query id (as a string) -> prompt and its samples, in file order.

    Raises:
        InputError: the file cannot be read, a field is missing or no string, or an id occurs twice.
    """
    return _read_answers(path, sample_keys)


def sample_keys(record: dict) -> list[str]:
    """Returns the record's `sample_*` keys, `sample_10` after `sample_2`."""
    keys = [key for key in record if key.startswith(SAMPLE_PREFIX)]
    if not keys:
        raise BadField("sample_0", f"no sample (the record has {', '.join(record)})", "fields sample_0, sample_1, ...")
    for key in keys:
        if not key.removeprefix(SAMPLE_PREFIX).isdecimal():
            raise BadField(key, "no number after sample_", "a field such as sample_0")
    return sorted(keys, key=lambda key: int(key.removeprefix(SAMPLE_PREFIX)))


def _read_answers(path: str | Path, answer_keys: Callable[[dict], Iterable[str]]) -> dict[str, PromptAnswers]:
    found: dict[str, PromptAnswers] = {}
    problems = []
    for place, record in read_records(path):
        try:
            query_id, query = require_query_id(record), require_text(record, "query")
            if SEPARATOR in query:
                raise BadField("query", f"a text with {SEPARATOR}", f"one without; {SEPARATOR} is put behind it")
            answers = tuple(require_string(record, key) for key in answer_keys(record))
            if query_id in found:
                raise BadField("query_id", query_id, f"an id of its own; {found[query_id].place} has it too")
            found[query_id] = PromptAnswers(str(path), place, query, answers)
        except BadField as error:
            problems.append(f"{place}: {error}")
    raise_bad_records(path, problems)
    return found


# ------------------------------------------------------------------------------------------------ converting


def cut_next_turn(answer: str, stop_strings: tuple[str, ...]) -> str:
    """Cuts an answer where it goes on to play the user; an answer that does not is returned as it is."""
    for stop_string in stop_strings:
        answer = answer.split(stop_string, maxsplit=1)[0].strip() if stop_string in answer else answer
    return answer


def unusable(answer: str) -> str:
    """Returns why an answer (already cut) cannot be trained on; an empty string if it can."""
    if not answer.strip():
        return "empty"
    return f"with {SEPARATOR}" if SEPARATOR in answer else ""


def usable_answers(golden: str, samples: Iterable[str], skipped: Counter[str]) -> tuple[str, list[str]] | None:
    """Cuts one prompt's answers and drops those that make no pair.

    A golden answer is cut at "\\nHuman:" only, a sample, as in the reference, at any line that begins with "Human".

    Args:
        golden: the annotator's answer.
        samples: the LLM's answers.
        skipped: reason -> count of dropped answers; added to. A sample that equals the golden answer is dropped, for
            it would be preferred and not preferred at once.

    Returns:
        the golden answer and the samples left, or None if nothing is left to compare.
    """
    golden = cut_next_turn(golden, GOLDEN_STOP_STRINGS)
    if reason := unusable(golden):
        skipped[f"golden {reason}"] += 1
        return None
    kept = []
    for sample in (cut_next_turn(sample, SAMPLE_STOP_STRINGS) for sample in samples):
        reason = unusable(sample) or ("same as golden" if sample.strip() == golden.strip() else "")
        if reason:
            skipped[f"sample {reason}"] += 1
        else:
            kept.append(sample)
    return (golden, kept) if kept else None


def to_pairs(query: str, golden: str, samples: Iterable[str]) -> list[dict]:
    """Returns one golden-over-sample pair per sample, as the reference writes them."""
    preferred = query + SEPARATOR + golden
    return [{"text": [preferred, query + SEPARATOR + s], "scores": [1.0, 0.0], "type": "apo"} for s in samples]


def to_group(query_id: str, query: str, golden: str, samples: list[str]) -> dict:
    """Returns one item that holds the golden answer and all samples."""
    text = [query + SEPARATOR + answer for answer in (golden, *samples)]
    return {"text": text, "scores": [1.0] + [0.0] * len(samples), "type": "apo", "query_id": query_id}


def check_same_queries(golden: dict[str, PromptAnswers], samples: dict[str, PromptAnswers]) -> None:
    """Refuses files that mean different prompts by the same id.

    Raises:
        InputError: with the first few such ids, where they are, and where the two prompts part.
    """
    problems = []
    for query_id, answers in golden.items():
        other = samples.get(query_id, answers)
        if other.query != answers.query:
            letters = enumerate(itertools.zip_longest(other.query, answers.query))
            same = next(i for i, (x, y) in letters if x != y)
            problems.append(
                f'{other.path}: {other.place}: id {query_id}: field "query": found, from character {same + 1} on, '
                f"{describe(other.query[same:])}, expected {describe(answers.query[same:])} as in {answers.path}: "
                f"{answers.place}"
            )
    if problems:
        count = f"{len(problems)} ids with two prompts: " if len(problems) > 1 else ""
        raise InputError(f"{count}{first_few(problems)}")


def convert(
    golden: dict[str, PromptAnswers],
    samples: dict[str, PromptAnswers],
    *,
    group: bool = False,
    sampling: bool = False,
    seed: int = 42,
) -> Conversion:
    """Pairs every prompt's golden answer with its samples, in the order of the samples.

    Args:
        golden: see `read_golden`.
        samples: see `read_samples`.
        group: one item per prompt instead of one per sample.
        sampling: keep one sample per prompt, drawn with `seed` among the usable ones.
        seed: of that draw.

    Raises:
        InputError: no id is in both files, the same id has different prompts, or no pair is left.
    """
    check_same_queries(golden, samples)
    rng = random.Random(seed)
    result = Conversion(golden_without_samples=[query_id for query_id in golden if query_id not in samples])
    for query_id, sampled in samples.items():
        if query_id not in golden:
            result.samples_without_golden.append(query_id)
            continue
        result.num_matched += 1
        result.cut["golden"] += count_cuts(golden[query_id].answers, GOLDEN_STOP_STRINGS)
        result.cut["sampled"] += count_cuts(sampled.answers, SAMPLE_STOP_STRINGS)
        usable = usable_answers(golden[query_id].answers[0], sampled.answers, result.skipped)
        if usable is None:
            continue
        golden_response, kept = usable
        if sampling:
            kept = [rng.choice(kept)]
        result.num_pairs += len(kept)
        if group:
            result.items.append(to_group(query_id, sampled.query, golden_response, kept))
        else:
            result.items.extend(to_pairs(sampled.query, golden_response, kept))
    _check_not_empty(result, golden, samples)
    return result


def _check_not_empty(result: Conversion, golden: dict[str, PromptAnswers], samples: dict[str, PromptAnswers]) -> None:
    if not result.num_matched:
        ours, theirs = (f"{next(iter(d.values())).path} has {first_few(list(d))}" for d in (golden, samples))
        raise InputError(f'field "query_id": found no id in both files, expected the same ids; {ours}; {theirs}')
    if not result.items:
        raise InputError(
            f"no pair is left of {result.num_matched} matched prompts, expected at least one; "
            f"skipped: {describe_counts(result.skipped, 'answers')}"
        )


# ------------------------------------------------------------------------------------------------ telling


def log_unmatched(result: Conversion) -> None:
    """Warns about ids that are in one file only."""
    for name, ids in (
        ("golden answers without samples", result.golden_without_samples),
        ("samples without a golden answer", result.samples_without_golden),
    ):
        if ids:
            logger.warning("%d %s, left out: %s", len(ids), name, first_few(ids))


def summary(result: Conversion, path: Path) -> str:
    """Returns the tool's result in one line."""
    unmatched = len(result.golden_without_samples) + len(result.samples_without_golden)
    items = "" if len(result.items) == result.num_pairs else f" in {len(result.items)} groups"
    return (
        f"{result.num_matched} prompts matched, {result.num_pairs} pairs written{items}, {unmatched} ids unmatched, "
        f"{describe_counts(result.skipped, 'answers')} skipped: {path}"
    )


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="Golden answers + LLM samples -> APO pairs, golden preferred over sampled.",
        epilog="example:\n"
        "  python tools/apo_data_converter.py \\\n"
        "      --golden_data_path data/sample/rm_data/hh_split_rm.golden.json \\\n"
        "      --sample_data_path data/sample/rm_data/hh_split_rm_llm_v0.sample.json \\\n"
        "      --output_dir outputs/apo_data --apo_data_name rm_apo_data_v0",
    )
    parser.add_argument("--golden_data_path", required=True, help='records of "query_id", "query", "golden"')
    parser.add_argument("--sample_data_path", required=True, help='records of "query_id", "query", "sample_0", ...')
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to; made if it is not there")
    parser.add_argument("--apo_data_name", required=True, help="the file is <apo_data_name>_text_scores.json")
    parser.add_argument(
        "--sampling",
        action="store_true",
        help="keep one random sample per prompt; the file is <apo_data_name>_sampled_text_scores.json",
    )
    parser.add_argument("--seed", type=int, default=42, help="of --sampling (default: 42)")
    parser.add_argument("--group", action="store_true", help="one item per prompt, scores [1, 0, 0, ...]")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads both files, writes the APO data, prints one line."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = parse_args()
    golden = read_golden(args.golden_data_path)
    samples = read_samples(args.sample_data_path)
    result = convert(golden, samples, group=args.group, sampling=args.sampling, seed=args.seed)
    log_unmatched(result)
    if result.cut.total():
        logger.info(
            "cut where they go on to play the user: %(golden)d golden, %(sampled)d sampled answers", result.cut
        )
    path = args.output_dir / f"{args.apo_data_name}{'_sampled' * args.sampling}_text_scores.json"
    write_json(path, result.items)
    print(summary(result, path))


if __name__ == "__main__":
    main()
