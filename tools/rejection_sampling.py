"""LLM samples + their rewards -> the best answer to each prompt, training data for the LLM, and a best-of-n report.

    python tools/rejection_sampling.py --data_path data/sample/rm_data/hh_split_rm_llm_v0.sample.json \\
        --score_path outputs/scores/hh_split_rm_llm_v0.sample_pred_rm_apo_results.json \\
        --output_dir outputs/rejection_sampling --output_file_name best.json --to_pairs

The rewards are what `train.py --task_type inference` wrote for the same file. Written are

    best.json                the records with two more fields: "target", the best answer, and "scores", all rewards
    best_report.json, .png   what the best of 1, 2, ... answers is worth, and how long chosen and rejected answers are
    best_pairs.json          with --to_pairs, for DPO: {"prompt", "chosen", "rejected", "query_id"}, best over worst
    best_text_scores.json    with --to_pairs, for RRHF: {"text": ["<query><sep><answer>", ...], "scores", "query_id"}

An empty answer is never chosen or rejected, and counts in no average. Among equal rewards the first answer is the
best. A prompt whose answers are all empty is left out, counted and named: an LLM that now and then says nothing should
not hold up a round.
"""

from __future__ import annotations

import argparse
import functools
import glob
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apo.cli import (
    InputError,
    OneLineParser,
    describe,
    describe_counts,
    exit_on_input_error,
    first_few,
    raise_bad_records,
    write_json,
)
from apo.figures import new_figure, save_figure
from apo.records import MAX_SCORE, SEPARATOR, load_preference_data, read_records
from apo.resume import refuse_overwriting
from apo.statistics import Z_95

logger = logging.getLogger(__name__)

ADVICE = "give the file that train.py --task_type inference wrote for this data"


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt with all of its answers (keys in file order) and their rewards."""

    record: dict[str, Any]
    query_id: str
    query: str
    answers: dict[str, str]  # answer key -> text
    rewards: dict[str, float]  # answer key -> reward

    @property
    def candidates(self) -> list[str]:
        """The keys of the answers that say something, best first; among equal rewards in file order."""
        return sorted(
            (key for key, text in self.answers.items() if text.strip()), key=self.rewards.__getitem__, reverse=True
        )


# ------------------------------------------------------------------------------------------------ reading


def find_score_file(data_path: Path, score_path: Path | None, rm_scorer: str | None) -> Path:
    """Returns the file of rewards: `score_path` itself, or the one in that folder that was written for the data.

    Args:
        data_path: the samples; scoring them wrote `<stem of data_path>_pred_<suffix>_results.json`.
        score_path: a file, a folder, or with `rm_scorer` None for the folder of the data.
        rm_scorer: that suffix; None where a folder holds the rewards of one reward model only.

    Raises:
        InputError: no such file, or several.
    """
    if score_path is None and not rm_scorer:
        raise InputError("found neither --score_path nor --rm_scorer, expected one of them; " + ADVICE)
    folder = data_path.parent if score_path is None else score_path
    if not folder.is_dir():
        if rm_scorer:
            logger.warning("--rm_scorer %s has no effect: --score_path %s is no folder", rm_scorer, score_path)
        return folder
    stem = data_path.name.split(".json")[0]  # as train.py names it
    suffix = glob.escape(rm_scorer) if rm_scorer else "*"
    fitting = sorted(folder.glob(f"{glob.escape(stem)}_pred_{suffix}_results.json"))
    if len(fitting) != 1:
        found = f"{len(fitting)} ({first_few([path.name for path in fitting])})" if fitting else "none"
        wanted = f"one {stem}_pred_{rm_scorer or '<suffix>'}_results.json"
        raise InputError(f"{folder}: found {found}, expected {wanted}; name the suffix by --rm_scorer, or {ADVICE}")
    return fitting[0]


def read_rewards(path: Path) -> dict[str, float]:
    """Reads records of `{"<query_id>:<answer key>": reward}`.

    Raises:
        InputError: the file cannot be read, a reward is no finite number, or an answer has two.
    """
    rewards: dict[str, float] = {}
    problems = []
    for place, record in read_records(path):
        for key, reward in record.items():
            if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not abs(reward) <= MAX_SCORE:
                problems.append(f"{place}: {quote(key)}: found {describe(reward)}, expected a finite reward")
            elif key in rewards:
                problems.append(f"{place}: {quote(key)}: found a second reward, expected one an answer")
            else:
                rewards[key] = float(reward)
    raise_bad_records(path, problems)
    return rewards


def quote(text: str) -> str:
    """Puts an id into a message, in one line whatever it holds."""
    return json.dumps(text, ensure_ascii=False)


def name_ids(ids: Iterable[str]) -> str:
    """Counts different ids and shows the first few."""
    different = list(dict.fromkeys(ids))
    return f"{len(different)} {'id' if len(different) == 1 else 'ids'}: {first_few([quote(i) for i in different])}"


def load_scored_prompts(data_path: Path, score_path: Path) -> list[ScoredPrompt]:
    """Reads the samples and their rewards.

    Raises:
        InputError: a file cannot be read, a query id occurs twice, or the two files do not belong together: answers
            without a reward, or rewards without an answer.
    """
    parsed = load_preference_data(data_path, "reject_sample")
    counts = Counter(answers.query_id for answers in parsed)
    if twice := [query_id for query_id, count in counts.items() if count > 1]:
        raise InputError(
            f"{data_path}: found more than one record of {name_ids(twice)}; expected an id of its own each"
        )
    rewards = read_rewards(score_path)
    keys = {(a.query_id, key): f"{a.query_id}:{key}" for a in parsed for key in a.answer_keys}
    check_same_answers(data_path, score_path, keys, rewards)
    return [
        ScoredPrompt(
            record=record,
            query_id=a.query_id,
            query=record["query"],
            answers={key: record[key] for key in a.answer_keys},
            rewards={key: rewards[keys[a.query_id, key]] for key in a.answer_keys},
        )
        for a, (_, record) in zip(parsed, read_records(data_path), strict=True)
    ]


def check_same_answers(
    data_path: Path, score_path: Path, keys: dict[tuple[str, str], str], rewards: dict[str, float]
) -> None:
    """Refuses rewards that are not those of the data, naming the ids.

    Args:
        data_path: for the message.
        score_path: for the message.
        keys: (query id, answer key) -> "<query_id>:<answer key>", of every answer of the data.
        rewards: the same kind of key -> reward. The id ends at the last ":".
    """
    missing = [query_id for (query_id, _), key in keys.items() if key not in rewards]
    foreign = [key.rpartition(":")[0] or key for key in rewards.keys() - set(keys.values())]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(keys)} answers have no reward, those of {name_ids(missing)}")
    if foreign:
        problems.append(
            f"{len(foreign)} of {len(rewards)} rewards have no answer, those of {name_ids(sorted(foreign))}"
        )
    if problems:
        raise InputError(f"{score_path}: not the rewards of {data_path}: {'; '.join(problems)}; {ADVICE}")


# ------------------------------------------------------------------------------------------------ choosing


def with_target(prompt: ScoredPrompt) -> dict[str, Any]:
    """Returns the record with its best answer as "target" and all rewards as "scores", as the reference writes it."""
    return {**prompt.record, "target": prompt.answers[prompt.candidates[0]], "scores": prompt.rewards}


def trainable_keys(prompt: ScoredPrompt) -> list[str]:
    """Returns the candidates that training data can hold, best first: without `<sep>`, which ends the prompt there."""
    if SEPARATOR in prompt.query:
        return []
    return [key for key in prompt.candidates if SEPARATOR not in prompt.answers[key]]


def to_pairs(prompts: list[ScoredPrompt], skipped: Counter[str]) -> list[dict[str, str]]:
    """Returns one best-over-worst pair a prompt, for DPO.

    Args:
        prompts: see `ScoredPrompt`.
        skipped: reason -> prompts without a pair; added to.
    """
    pairs = []
    for prompt in prompts:
        keys = trainable_keys(prompt)
        if len(keys) < 2:
            skipped["fewer than two answers"] += 1
        elif prompt.rewards[keys[0]] == prompt.rewards[keys[-1]]:
            skipped["equal rewards"] += 1
        elif prompt.answers[keys[0]].strip() == prompt.answers[keys[-1]].strip():
            skipped["equal answers"] += 1
        else:
            texts = {"chosen": prompt.answers[keys[0]], "rejected": prompt.answers[keys[-1]]}
            pairs.append({"prompt": prompt.query, **texts, "query_id": prompt.query_id})
    return pairs


def to_text_scores(prompts: list[ScoredPrompt]) -> list[dict[str, Any]]:
    """Returns one text-scores item a prompt, all its answers in file order with their rewards, for RRHF."""
    items = []
    for prompt in prompts:
        trainable = set(trainable_keys(prompt))
        keys = [key for key in prompt.answers if key in trainable]
        if len(keys) >= 2:
            text = [prompt.query + SEPARATOR + prompt.answers[key] for key in keys]
            scores = [prompt.rewards[key] for key in keys]
            items.append({"text": text, "scores": scores, "query_id": prompt.query_id})
    return items


# ------------------------------------------------------------------------------------------------ best of n


@functools.cache
def best_of_weights(num_answers: int) -> np.ndarray:
    """Weights of the sorted rewards in the expected best of n answers.

    The i-th smallest of K rewards is the largest of C(i - 1, n - 1) of the C(K, n) subsets of n answers.

    Returns:
        (K, K): row n - 1, column i - 1 holds C(i - 1, n - 1) / C(K, n); a row sums to 1.
    """
    n = np.arange(1, num_answers + 1)[:, None]
    i = np.arange(num_answers, 1, -1)
    ratios = np.maximum(i - n, 0) / (i - 1)  # of the weight of i - 1 to that of i
    return (n / num_answers * np.cumprod(np.hstack([np.ones_like(n), ratios]), axis=1))[:, ::-1]


def expected_best(rewards: Iterable[float]) -> np.ndarray:
    """Estimates, from the K rewards of one prompt, the expected largest reward of n answers for n = 1 ... K.

    The mean of the largest over all subsets of n of the K answers, without replacement. It is unbiased for
    independent answers, unlike the largest of n draws from the K with replacement, which is too small: the argument
    behind pass@k in Chen et al., arXiv:2107.03374, section 2.1, with a maximum in place of "one of them passes".

    Returns:
        (K,): first the mean reward, last the largest.
    """
    ordered = np.sort(np.fromiter(rewards, dtype=float))
    return best_of_weights(len(ordered)) @ ordered


def mean_and_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean over prompts with its 95 % interval, mean +- 1.96 s / sqrt(N) with the sample deviation s.

    Returns:
        "mean", and "interval_95" as [low, high], or null for a single prompt, which has none.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "interval_95": None}
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "interval_95": [mean - half, mean + half]}


def best_of_n(prompts: list[ScoredPrompt]) -> list[dict[str, Any]]:
    """Averages `expected_best` over prompts, for each n.

    Returns:
        a row for each n: "n", "mean" and "interval_95" of the expected best reward, "gain" (mean over the same prompts
        of expected best of n minus best of one), and "prompts", those with n answers or more. Where that number falls
        with n, the means of two rows are not of the same prompts; the gains still compare like with like.
    """
    curves = [expected_best(prompt.rewards[key] for key in prompt.candidates) for prompt in prompts]
    rows = []
    for n in range(1, max(map(len, curves)) + 1):
        values = np.array([[curve[n - 1], curve[0]] for curve in curves if len(curve) >= n])
        gain = float((values[:, 0] - values[:, 1]).mean())
        rows.append({"n": n, **mean_and_interval(values[:, 0]), "gain": gain, "prompts": len(values)})
    return rows


def lengths(texts: list[str]) -> dict[str, float]:
    """Mean and median number of characters; empty for no texts."""
    sizes = [len(text) for text in texts]
    return {"mean": float(np.mean(sizes)), "median": float(np.median(sizes))} if sizes else {}


def make_report(prompts: list[ScoredPrompt], pairs: list[dict[str, str]]) -> dict[str, Any]:
    """Describes the selection in numbers.

    Args:
        prompts: those with a best answer.
        pairs: best over worst, see `to_pairs`.

    Returns:
        "prompts"; "best_of_n" (see there); "ties": the share of prompts whose best reward several answers have, of
        which the first was taken; "length": characters of the chosen and the rejected answers of the pairs.
    """
    ties = sum(p.rewards[keys[0]] == p.rewards[keys[1]] for p in prompts if len(keys := p.candidates) > 1)
    length = {side: lengths([pair[side] for pair in pairs]) for side in ("chosen", "rejected")}
    return {
        "prompts": len(prompts),
        "best_of_n": best_of_n(prompts),
        "ties": ties / len(prompts),
        "pairs": len(pairs),
        "length": length,
    }


def draw_report(path: Path, report: dict[str, Any], pairs: list[dict[str, str]]) -> None:
    """Draws the best-of-n curve with its interval, and the lengths of chosen and rejected answers."""
    figure, (curve, histogram) = new_figure(2)
    rows = report["best_of_n"]
    counts, means = [row["n"] for row in rows], [row["mean"] for row in rows]
    low, high = zip(*(row["interval_95"] or (row["mean"], row["mean"]) for row in rows), strict=True)
    curve.fill_between(counts, low, high, alpha=0.3, label="95 % interval over prompts")
    curve.plot(counts, means, marker=".")
    curve.set(xlabel="answers a prompt", ylabel="expected reward of the best", title="best of n")
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend()
    sizes = [[len(pair[side]) for pair in pairs] for side in ("chosen", "rejected")]
    histogram.hist(sizes, bins=20, label=["chosen", "rejected"])
    histogram.set(xlabel="characters", ylabel="pairs", title="length")
    histogram.legend()
    save_figure(path, figure)


# ------------------------------------------------------------------------------------------------ telling


def summary(report: dict[str, Any], skipped_pairs: Counter[str]) -> str:
    """Returns the result in a few lines."""
    lines = [f"{report['prompts']} prompts, {report['ties']:.1%} with a tie for the best answer"]
    for row in report["best_of_n"]:
        interval = "" if row["interval_95"] is None else " [{:.4f}, {:.4f}]".format(*row["interval_95"])
        lines.append(f"best of {row['n']}: expected reward {row['mean']:.4f}{interval}, {row['prompts']} prompts")
    without = describe_counts(skipped_pairs, "prompts")
    lines.append(f"{report['pairs']} pairs of best over worst, {without} without one")
    return "\n".join(lines)


def name_outputs(
    output_dir: Path, output_file_name: str | None, score_path: Path, with_pairs: bool
) -> dict[str, Path]:
    """Returns the paths of all files to write, by what they hold.

    A name with a folder in it is taken as it is, as in the reference; a bare name lies in `output_dir`. The default
    name is the reference's as well.
    """
    name = Path(output_file_name or f"{score_path.name}_sft.json")
    target = output_dir / name if name.name == str(name) else name
    endings = {"report": "_report.json", "figure": "_report.png"}
    if with_pairs:
        endings |= {"pairs": "_pairs.json", "text_scores": "_text_scores.json"}
    stem = target.name.removesuffix(".json")
    return {"target": target, **{what: target.with_name(stem + ending) for what, ending in endings.items()}}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="LLM samples + their rewards -> the best answer to each prompt, and a best-of-n report.",
        epilog="example:\n"
        "  python tools/rejection_sampling.py \\\n"
        "      --data_path data/sample/rm_data/hh_split_rm_llm_v0.sample.json \\\n"
        "      --score_path outputs/scores/hh_split_rm_llm_v0.sample_pred_rm_apo_results.json \\\n"
        "      --output_dir outputs/rejection_sampling --output_file_name best.json --to_pairs",
    )
    parser.add_argument(
        "--data_path", type=Path, required=True, help='records of "query_id", "query", "sample_0", ...'
    )
    parser.add_argument(
        "--score_path",
        type=Path,
        help="what train.py --task_type inference wrote: <data>_pred_<suffix>_results.json, or its folder "
        "(default with --rm_scorer: the folder of the data)",
    )
    parser.add_argument("--rm_scorer", help="<suffix> of that file, for a folder with the rewards of several models")
    parser.add_argument("--output_dir", type=Path, default=Path(), help="folder to write to (default: this one)")
    parser.add_argument(
        "--output_file_name", help="the other files are named after it (default: <file name of the rewards>_sft.json)"
    )
    parser.add_argument(
        "--to_pairs", action="store_true", help="also write pairs of best over worst (DPO) and all answers (RRHF)"
    )
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads samples and rewards, chooses, writes, prints the report."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = parse_args()
    score_path = find_score_file(args.data_path, args.score_path, args.rm_scorer)
    outputs = name_outputs(args.output_dir, args.output_file_name, score_path, args.to_pairs)

    scored = load_scored_prompts(args.data_path, score_path)
    prompts = [prompt for prompt in scored if prompt.candidates]
    empty = [prompt.query_id for prompt in scored if not prompt.candidates]
    if not prompts:
        raise InputError(f"{args.data_path}: all answers of all {len(scored)} prompts are empty; expected some text")
    if empty:
        logger.warning("left out, all answers are empty: %s", name_ids(empty))

    skipped: Counter[str] = Counter()
    pairs = to_pairs(prompts, skipped)
    report = {"data": str(args.data_path), "rewards": str(score_path), **make_report(prompts, pairs)}
    report |= {"prompts_without_pair": dict(skipped), "prompts_left_out": empty}

    for path, output in itertools.product((args.data_path, score_path), outputs.values()):
        refuse_overwriting(path, output)
    write_json(outputs["target"], [with_target(prompt) for prompt in prompts])
    if args.to_pairs:
        write_json(outputs["pairs"], pairs)
        write_json(outputs["text_scores"], to_text_scores(prompts))
    write_json(outputs["report"], report)
    draw_report(outputs["figure"], report, pairs)
    print(summary(report, skipped))
    print(f"written: {', '.join(map(str, outputs.values()))}")


if __name__ == "__main__":
    main()
