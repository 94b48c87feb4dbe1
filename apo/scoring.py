"""Rewards of the responses of a file: one scores file per data set, in file order; a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_callback import ProgressCallback

from apo.cli import InputError, locked, refuse
from apo.resume import Keep, ResultStore, complete_items, read_recorded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)

BATCHES_PER_PART = 4  # that a process scores before their rewards are kept


def name_score_files(output_dir: str, eval_names: list[str], suffix: str) -> dict[str, Path]:
    """Returns the path of `<data>_pred_<suffix>_results.json` for each file to score.

    Raises:
        InputError: two files would write the same scores file.
    """
    paths: dict[str, Path] = {}
    for name in eval_names:
        stem = name.replace("/", "_").split(".json")[0]
        path = Path(output_dir, f"{stem}_pred_{suffix}_results.json")
        if path in paths.values():
            raise InputError(f"--eval_data_path: found two files with scores for {path}; score them separately")
        paths[name] = path
    return paths


def warn_of_equal_rewards(path: Path, records: list[dict[str, float]], response_keys: Sequence[list[str]]) -> None:
    """Warns of prompts whose responses all have one reward, as those that a cut on the right leaves nothing of."""
    rewards = iter([reward for record in records for reward in record.values()])
    of_prompts = [[next(rewards) for _ in keys] for keys in response_keys]
    num_equal = sum(len(values) > 1 and len({*values}) == 1 for values in of_prompts)
    if num_equal:
        text = "%s: %d of %d prompts have the same reward for all responses; are they cut away (--max_length)?"
        logger.warning(text, path, num_equal, len(of_prompts))


def score_dataset(trainer: Trainer, dataset: Dataset, path: Path, settings: dict[str, Any]) -> None:
    """Writes one {"<query_id>:<response key>": reward} per response, in file order.

    The rewards of finished batches are kept. Batches depend neither on the number of processes nor on earlier runs, so
    the file is the same to the bit after any interruption, as long as a process has the same number of threads.

    Args:
        trainer: with `eval_batches` and `predict_batches`; all processes call this function together.
        dataset: the responses, as `load_preference_dataset` returns them.
        path: the file to write; an old one is replaced at the end, that of another model if it is allowed.
        settings: all that the rewards depend on.
    """
    batches = trainer.eval_batches(dataset)
    trainer.remove_callback(ProgressCallback)  # it would start again with every part
    part_size = BATCHES_PER_PART * trainer.args.world_size

    def work(todo: dict[str, list[int]], keep: Keep) -> None:
        numbers = broadcast_object_list([list(todo)])[0]
        for start in range(0, len(numbers), part_size):
            part = numbers[start : start + part_size]
            rewards = trainer.predict_batches(dataset, [batches[int(number)] for number in part])
            for number in part:
                keep(number, [rewards[i].tolist() for i in batches[int(number)]])

    def make_records(kept: dict[str, list[list[float]]]) -> list[dict[str, float]]:
        rows: dict[int, list[float]] = {}
        for number, batch in enumerate(batches):
            rows |= zip(batch, kept[str(number)], strict=True)
        return [
            {f"{query_id}:{key}": reward}
            for i, (query_id, keys) in enumerate(zip(dataset["query_id"], dataset["response_keys"], strict=True))
            for key, reward in zip(keys, rows[i], strict=False)  # padded to the most responses of a record
        ]

    if not trainer.is_world_process_zero():
        work({}, lambda number, rewards: None)  # the main process sends the batches, and keeps the rewards
        return
    batches_sha256 = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
    store = ResultStore(path, {**settings, "batches_sha256": batches_sha256})
    with locked(store.lock_path, wait=False):
        recorded = read_recorded(path).get("model", "unknown")
        if path.exists() and recorded != settings["model"]:
            found = f"found the rewards of another model, {recorded}, expected those of {settings['model']}"
            refuse(f"{path}: {found}; give another --data_suffix or --output_dir", trainer.args.allow_changes)
        records = complete_items(
            store,
            {str(number): batch for number, batch in enumerate(batches)},
            store.load(),
            work,
            make_records,
            noun="batches",
            progress=not trainer.args.disable_tqdm,
        )
    warn_of_equal_rewards(path, records, dataset["response_keys"])
    print(f"{path}: rewards of the responses of {len(dataset)} records")
