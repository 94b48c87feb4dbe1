"""What a game has brought: the figures of its report, from the records and outputs of the stages that are done.

Responses to one prompt are not independent: means are first taken over the responses to a prompt, and all intervals
are over prompts. Two LLMs are compared prompt by prompt. Rewards of different RMs have no common unit: where they
stand beside each other, they are in standard deviations (SD) of the rewards that the RM gives to the responses of an
LLM.
"""

from __future__ import annotations

import glob
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apo.cli import mask_secrets, read_json
from apo.game import Game, describe_game
from apo.records import PreferenceRecord, find_response_keys, iter_preference_data, iter_records, load_rewards
from apo.resume import read_recorded
from apo.stages import Records, Stage
from apo.statistics import mean_and_interval, share_and_interval
from apo.verdict import make_verdict

NUM_EXAMPLES = 10
GOLDEN_OVER_SAMPLED = "golden over sampled"
PAPER = {  # LLaMA-7B on Helpful&Harmless, arXiv:2311.08045 as in docs/results.md; other models, data and scales
    "rm": {"base": [63.04, 0.019], "round 1": [66.73, 0.033], "round 2": [67.07, None], "round 3": [67.56, 0.031]},
    "llm_start": 1.272,
    "llm": {"rjs": [1.582, 1.623], "rrhf": [2.201, 2.302], "dpo": [2.445, 2.633]},  # with the base RM, the APO RM
    "win_rate": {"rjs": [35.78, 36.43], "rrhf": [62.77, 69.64], "dpo": [68.86, 74.22]},
}

PerPrompt = dict[str, list[float]]  # query id -> a number for each of its responses


class Results:
    """The outputs of the stages that are done."""

    def __init__(self, game: Game, stages: list[Stage]) -> None:
        self.game, self.stages = game, stages
        self.records = Records(stages)
        self.records.load_done()
        self.folders = {(s.round, s.name): s.folder for s in stages if s.label in self.records.done}

    @property
    def rounds_done(self) -> int:
        """The last round of which all stages are done, and those of the rounds before; -1 if 0 is not."""
        todo = [stage.round for stage in self.stages if stage.label not in self.records.done]
        return min(todo) - 1 if todo else self.game.rounds

    def read(self, round_: int, stage: str, name: str) -> dict[str, Any]:
        """Returns a JSON file of a stage; an empty object if there is none."""
        folder = self.folders.get((round_, stage))
        return read_json(folder / name) if folder else {}

    def samples(self, round_: int, stage: str = "sample_test") -> Path | None:
        """The file of the responses that a stage has drawn."""
        folder = self.folders.get((round_, stage))
        return next(folder.glob("*_results.json")) if folder else None

    def rewards(self, round_: int, stage: str, llm: int) -> PerPrompt:
        """The rewards that a stage gave to the responses of an LLM to the test prompts; empty if it is not done."""
        folder, samples = self.folders.get((round_, stage)), self.samples(llm)
        if folder is None or samples is None:
            return {}
        rewards = load_rewards(next(folder.glob(f"{glob.escape(samples.stem)}_pred_*_results.json")))
        texts = responses_of(samples)
        return {i: [rewards[f"{i}:{key}"] for key in own] for i, own in texts.items()}

    def evaluated_pairs(self, round_: int, number: int) -> list[tuple[PreferenceRecord, dict[str, Any]]]:
        """Returns the records of the n-th file that RM k was evaluated on, each with its rewards and scores.

        With --debug_mode these are the first ones.
        """
        rewards = list(self.read(round_, "evaluate_rm", "eval_rewards.json").values())
        if not rewards:
            return []
        stage = next(stage for stage in self.stages if (stage.round, stage.name) == (round_, "evaluate_rm"))
        records = iter_preference_data(stage.flags["eval_data_path"][number], "comparison_pair")
        return list(zip(records, rewards[number], strict=False))


def responses_of(path: Path) -> dict[str, dict[str, str]]:
    """Returns {query id: {response key: text}} of a file of sampled responses."""
    records = [record for _, record in iter_records(path)]
    return {record["query_id"]: {key: record[key] for key in find_response_keys(record)} for record in records}


# ------------------------------------------------------------------------------------------------ averages


def average(values: Iterable[float]) -> dict[str, Any] | None:
    """Returns mean and 95 % interval of one number per prompt; None without prompts."""
    numbers = np.array(list(values), dtype=float)
    return mean_and_interval(numbers) | {"prompts": len(numbers)} if len(numbers) else None


def means(values: PerPrompt) -> dict[str, float]:
    """Returns the mean over the responses to each prompt."""
    return {query_id: float(np.mean(own)) for query_id, own in values.items()}


def differences(after: PerPrompt, before: PerPrompt) -> dict[str, float]:
    """Returns the differences of the means of each prompt that both have."""
    new, old = means(after), means(before)
    return {query_id: new[query_id] - old[query_id] for query_id in new if query_id in old}


def deviation(values: PerPrompt) -> float:
    """Returns the standard deviation over all responses; NaN if it is 0 or there are fewer than two."""
    numbers = [number for own in values.values() for number in own]
    return float(np.std(numbers, ddof=1)) or math.nan if len(numbers) > 1 else math.nan


# ------------------------------------------------------------------------------------------------ the players


def report_evaluation(name: str, metrics: Mapping[str, float], pairs: list[Any]) -> dict[str, Any]:
    """Returns accuracy and calibration of an RM on one file of pairs.

    Args:
        metrics: those of `final_eval_results.json`.
        pairs: (record, its item of `eval_rewards.json`); an earlier version wrote none: then there is no interval.
    """
    found = {key.removeprefix(f"eval_{name}_"): value for key, value in metrics.items()}
    ece = {int(key.rpartition("bin")[2]): value for key, value in found.items() if "_ECE_bin" in key}
    of_prompts: dict[str, list[bool]] = {}  # whether each pair is ranked as people did; pairs share prompts
    for record, item in pairs:
        responses = list(zip(item["scores"], item["rewards"], strict=True))
        hits = [a > b for better, a in responses for worse, b in responses if better > worse]
        of_prompts.setdefault(record.prompts[0] or record.query_id, []).extend(hits)
    counts = np.array([(sum(hits), len(hits)) for hits in of_prompts.values() if hits])
    accuracy = share_and_interval(*counts.T) if len(counts) else {"mean": found["accuracy"], "interval_95": None}
    row = {"data": name, "accuracy": accuracy, "prompts": len(counts) or None}
    bins = min(ece, default=None)
    return {**row, "pairs": found["pairs"], "ties": found["ties"], "ece": ece.get(bins), "ece_bins": bins}


def report_rm(results: Results, round_: int) -> dict[str, Any] | None:
    """Returns what RM k was trained on, and how well it ranks pairs; None if it is not evaluated yet."""
    evaluations = results.read(round_, "evaluate_rm", "final_eval_results.json")
    if not evaluations:
        return None
    rows = [
        report_evaluation(name, metrics, results.evaluated_pairs(round_, number))
        for number, (name, metrics) in enumerate(evaluations.items())
    ]
    rows[-1]["data"] = GOLDEN_OVER_SAMPLED  # the order is that of the command
    learnt = results.records.done.get(f"{round_}/pair", {}).get("counts", {}).get("pairs", 0)
    return {"round": round_, "golden_over_sampled_pairs_learnt": learnt, "evaluations": rows}


def report_llm(results: Results, round_: int) -> dict[str, Any] | None:
    """Returns the figures of LLM k on the test prompts; None if it has not responded to them yet.

    Under "own" are those of RM k, for the responses of LLM k and of LLM k-1.
    """
    path = results.samples(round_)
    if path is None:
        return None
    texts = {query_id: list(own.values()) for query_id, own in responses_of(path).items()}
    num_responses = sum(map(len, texts.values()))
    row: dict[str, Any] = {"round": round_, "prompts": len(texts), "responses": num_responses}
    row["characters"] = average(means({i: [len(text.strip()) for text in own] for i, own in texts.items()}).values())
    broken_off = read_recorded(path).get("broken_off")
    row["broken_off"] = None if broken_off is None else len(broken_off) / num_responses
    row["empty"] = sum(not text.strip() for own in texts.values() for text in own) / num_responses
    testing = results.rewards(round_, "score_testing", round_)
    row["testing_reward"] = average(means(testing).values())
    before = results.rewards(round_ - 1, "score_testing", round_ - 1)
    row["testing_gain"] = average(differences(testing, before).values())
    own, own_before = (results.rewards(round_, "score_own", llm) for llm in (round_, round_ - 1))
    row["own_reward"], row["own_reward_before"] = (average(means(values).values()) for values in (own, own_before))
    row["own_gain"] = average(differences(own, own_before).values())
    row["judge"] = results.read(round_, "judge", "verdicts.json").get("shares")
    return row


def flawless(results: Results, round_: int) -> PerPrompt:
    """Returns 1 for each flawless response to the test prompts and 0 for the others; empty without a judge."""
    found: PerPrompt = {}
    for name, holds in results.read(round_, "judge", "verdicts.json").get("verdicts", {}).items():
        found.setdefault(name.rpartition(":")[0], []).append(float("flawless" in holds))
    return found


def report_gains(results: Results) -> list[dict[str, Any]]:
    """Returns the gains since LLM 0 by the RMs of the rounds and by the testing RM, in SD: over-optimisation.

    By the RMs of the rounds it is the sum of the gains of the rounds: RM k compares LLM k with LLM k-1, in SD of the
    rewards that it gives to LLM k-1. By the testing RM it is in SD of the rewards that it gives to LLM 0. The SDs are
    taken as known. "excess" is the difference between both.
    """
    first = results.rewards(0, "score_testing", 0)
    rows, total = [], dict.fromkeys(first, 0.0)
    for k in range(1, results.game.rounds + 1):
        testing = differences(results.rewards(k, "score_testing", k), first)
        own, before = (results.rewards(k, "score_own", llm) for llm in (k, k - 1))
        gains = differences(own, before)
        total = {i: total[i] + gains[i] / deviation(before) for i in gains if i in total}
        testing = {i: testing[i] / deviation(first) for i in testing if i in total}
        if not testing or not all(map(math.isfinite, (*total.values(), *testing.values()))):
            break
        excess = [total[i] - gain for i, gain in testing.items()]
        rows.append({"round": k, "own": average(total.values()), "testing": average(testing.values())})
        rows[-1]["excess"] = average(excess)
    return rows


def report_selection(results: Results, round_: int) -> dict[str, Any] | None:
    """Returns the report of the selection; a row of its curve has "kl", the KL divergence of best-of-n from the LLM.

    That is log n - (n - 1) / n if no two responses have one reward, and less otherwise (arXiv:2401.01879).
    """
    report = results.read(round_, "select", "best_report.json")
    if not report:
        return None
    curve = [{**row, "kl": math.log(row["n"]) - (row["n"] - 1) / row["n"]} for row in report["best_of_n"]]
    found = {name: report[name] for name in ("prompts", "pairs", "ties")}
    return {"round": round_, **found, "prompts_left_out": len(report["prompts_left_out"]), "best_of_n": curve}


def report_examples(results: Results) -> dict[str, Any] | None:
    """Returns held-out prompts of the last round that has them, with golden, best and worst response, by RM k.

    The prompts are the first of a shuffle of all with the seed of the game. A response is (text, reward).
    """
    done = [k for k, name in results.folders if name == "evaluate_rm" and results.evaluated_pairs(k, -1)]
    if not done:
        return None
    found: dict[str, dict[str, Any]] = {}
    for record, item in results.evaluated_pairs(max(done), -1):
        golden, *sampled = zip(record.responses, item["rewards"], strict=True)
        example = found.setdefault(record.prompts[0], {"prompt": record.prompts[0], "golden": golden, "sampled": []})
        example["sampled"] += sampled
    prompts = sorted(found)
    random.Random(results.game.seed).shuffle(prompts)
    examples = [found[prompt] for prompt in prompts[:NUM_EXAMPLES]]
    for example in examples:
        ranked = sorted(example.pop("sampled"), key=lambda response: response[1])
        example |= {"best": ranked[-1], "worst": ranked[0]}
    return {"round": max(done), "prompts": examples}


# ------------------------------------------------------------------------------------------------ the stages


def report_players(results: Results) -> list[dict[str, Any]]:
    """Returns who starts from whom: of each training stage, the models that its command names."""
    rows = []
    for stage in results.stages:
        if "do_train" in stage.flags:
            row = {"stage": stage.label}
            for name, flag in (("start", "model_name_or_path"), ("reference", "reference_model")):
                path = stage.flags.get(flag, [None])[0]
                owner = results.records.owner(path) if path else None
                row[name] = owner.label if owner else path
            rows.append(row)
    return rows


def report_stages(results: Results) -> list[dict[str, Any]]:
    """Returns seconds, attempts, tokens seen in training and counts of each stage that is done."""
    rows = []
    for stage in results.stages:
        if record := results.records.done.get(stage.label):
            row = {name: record[name] for name in ("seconds", "attempts", "counts", "commit", "finished")}
            tokens = results.read(stage.round, stage.name, "all_results.json").get("num_input_tokens_seen")
            rows.append({"stage": stage.label, **row, "tokens_trained": tokens})
    return rows


def make_report(game: Game, stages: list[Stage]) -> dict[str, Any]:
    """Returns all figures of a game, of whatever is done of it.

    Only "game", "players" and "stages" hold paths, times and versions; the rest is equal for two equal games.

    Raises:
        InputError: a done stage does not fit the game, or its files were changed; see `apo.stages.Records.load`.
    """
    results = Results(game, stages)
    rounds = range(game.rounds + 1)
    done = results.records.done.values()
    versions = sorted({f"{name} {number}" for record in done for name, number in record["versions"].items()})
    llms = [row for k in rounds if (row := report_llm(results, k))]
    last = max((row["round"] for row in llms if row["testing_reward"]), default=0)
    figures: dict[str, Any] = {
        "rounds": game.rounds,
        "rounds_done": results.rounds_done,
        "seed": game.seed,
        "align_type": game.align_type,
        "apo": game.apo,
        "rm": [row for k in rounds if (row := report_rm(results, k))],
        "llm": llms,
        "since_llm_0": {
            "round": last,
            "testing": average(differences(*(results.rewards(k, "score_testing", k) for k in (last, 0))).values()),
            "flawless": average(differences(*(flawless(results, k) for k in (last, 0))).values()),
        },
        "gains_in_sd": report_gains(results),
        "selection": [row for k in rounds if (row := report_selection(results, k))],
        "examples": report_examples(results),
        "paper": PAPER,
    }
    about = {"description": mask_secrets(describe_game(game)), "versions": versions}
    about["commits"] = sorted({record["commit"] for record in done})
    figures |= {"verdict": make_verdict(figures), "game": about}
    return figures | {"players": report_players(results), "stages": report_stages(results)}
