"""Rejection sampling: the responses of a prompt with their rewards, the best of them, pairs, a best-of-n report."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apo.cli import InputError, first_few, refuse, sha256_of_file
from apo.records import SEPARATOR, iter_valid, load_rewards, parse_record
from apo.resume import model_version, read_recorded
from apo.statistics import expected_best, mean_and_interval

logger = logging.getLogger(__name__)

ADVICE = "give the file that train.py --task_type inference wrote for this data, and the same --response_keys"


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt with all of its responses (keys in file order) and their rewards."""

    record: dict[str, Any]
    query_id: str
    query: str
    responses: dict[str, str]  # response key -> text
    rewards: dict[str, float]  # response key -> reward

    @property
    def candidates(self) -> list[str]:
        """The keys of the responses that are not empty, best first; among equal rewards in file order."""
        keys = (key for key, text in self.responses.items() if text.strip())
        return sorted(keys, key=self.rewards.__getitem__, reverse=True)

    @property
    def trainable(self) -> list[str]:
        """The candidates that training data can hold: those without `<sep>`, which ends the prompt there."""
        return [key for key in self.candidates if SEPARATOR not in self.query + self.responses[key]]


def find_score_file(data_path: Path, score_path: Path, rm_scorer: str | None) -> Path:
    """Returns `score_path`, or if that is a folder the file of rewards there that was written for the data.

    That is `<stem of data_path>_pred_<rm_scorer>_results.json`; without a suffix `rm_scorer` the only such file.
    """
    if not score_path.is_dir():
        return score_path
    stem = data_path.name.split(".json")[0]  # as train.py names it
    name = f"{stem}_pred_{rm_scorer or '<suffix>'}_results.json"
    pattern = glob.escape(name) if rm_scorer else f"{glob.escape(stem)}_pred_*_results.json"
    matches = sorted(path.name for path in score_path.glob(pattern))
    if len(matches) != 1:
        found = f"found {first_few(matches) or 'none'}, expected one {name}"
        raise InputError(f"{score_path}: {found}; see --rm_scorer, or {ADVICE}")
    return score_path / matches[0]


def load_scored_prompts(data_path: Path, score_path: Path, response_keys: Iterable[str] = ()) -> list[ScoredPrompt]:
    """Reads responses and their rewards.

    Raises:
        InputError: a file cannot be read, or the two files do not belong together: responses without a reward, or
            rewards without a response.
    """
    rewards = load_rewards(score_path)

    def parse(raw: dict[str, Any], default_id: str) -> ScoredPrompt:
        record = parse_record(raw, default_id, kind="reject_sample", response_keys=response_keys)
        responses = dict(zip(record.response_keys, record.responses, strict=True))
        names = {key: f"{record.query_id}:{key}" for key in responses}
        own = {key: rewards[name] for key, name in names.items() if name in rewards}
        return ScoredPrompt(raw, record.query_id, record.prompts[0], responses, own)

    prompts = [prompt for _, prompt in iter_valid(data_path, parse, unique_ids=True)]
    names = {f"{prompt.query_id}:{key}" for prompt in prompts for key in prompt.responses}
    for what, lacking in (("reward", names - rewards.keys()), ("response", rewards.keys() - names)):
        if lacking:
            found = f"no {what} named {first_few(sorted(lacking))}"
            raise InputError(f"{score_path}: not the rewards of {data_path}: found {found}; {ADVICE}")
    return prompts


def check_origin(data_path: Path, score_path: Path, allow_changes: bool) -> dict[str, Any]:
    """Returns the hashes of data, rewards and reward model; refuses others than are recorded beside the rewards."""
    recorded = read_recorded(score_path)
    if "data_sha256" not in recorded:
        logger.warning("%s: no settings file records of which data these are the rewards", score_path)
    now = {"data_sha256": sha256_of_file(data_path), "result_sha256": sha256_of_file(score_path)}
    if Path(model := str(recorded.get("model_name_or_path"))).is_dir():
        now["model"] = model_version(model, None)
    if different := [name for name in now if recorded.get(name, now[name]) != now[name]]:
        found = "; ".join(f"{name} is {now[name]}, recorded is {recorded[name]}" for name in different)
        refuse(f"{score_path}: not the rewards of {data_path} as it is now: {found}; score it again", allow_changes)
    return now


def to_pairs(prompts: list[ScoredPrompt]) -> list[dict[str, str]]:
    """Returns a best-over-worst pair of each prompt whose responses differ in text and reward, for DPO."""
    pairs = []
    for prompt in prompts:
        if len(keys := prompt.trainable) < 2:
            continue
        best, worst = keys[0], keys[-1]
        chosen, rejected = prompt.responses[best], prompt.responses[worst]
        if prompt.rewards[best] != prompt.rewards[worst] and chosen.strip() != rejected.strip():
            pairs.append({"prompt": prompt.query, "chosen": chosen, "rejected": rejected, "query_id": prompt.query_id})
    return pairs


def to_text_scores(prompts: list[ScoredPrompt]) -> list[dict[str, Any]]:
    """Returns one text-scores record per prompt, its trainable responses in file order with rewards, for RRHF."""
    records = []
    for prompt in prompts:
        keys = sorted(prompt.trainable, key=list(prompt.responses).index)
        if len(keys) >= 2:
            text = [prompt.query + SEPARATOR + prompt.responses[key] for key in keys]
            scores = [prompt.rewards[key] for key in keys]
            records.append({"text": text, "scores": scores, "query_id": prompt.query_id})
    return records


def best_of_n(prompts: list[ScoredPrompt]) -> list[dict[str, Any]]:
    """Averages `expected_best` over prompts, for each n.

    Returns:
        a row for each n: "n", "mean" and "interval_95" of the expected best reward, and "prompts": how many have n
        responses or more. Two rows can be compared only if they have the same prompts.
    """
    curves = [expected_best(prompt.rewards[key] for key in prompt.candidates) for prompt in prompts]
    rows = []
    for n in range(1, max(map(len, curves)) + 1):
        values = np.array([curve[n - 1] for curve in curves if len(curve) >= n])
        rows.append({"n": n, **mean_and_interval(values), "prompts": len(values)})
    return rows


def share_of_ties(prompts: list[ScoredPrompt]) -> float:
    """Returns the share of prompts whose best reward several responses have, of which the first is taken."""
    ties = sum(p.rewards[keys[0]] == p.rewards[keys[1]] for p in prompts if len(keys := p.candidates) > 1)
    return ties / len(prompts)
