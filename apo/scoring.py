"""Scores of answers: a file for each data set, every answer once, in file order; a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback

from apo.cli import InputError, first_few
from apo.resume import ResultStore

if TYPE_CHECKING:
    import datasets

    from trainer import RewardModelTrainer

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
            raise InputError(f"--eval_data_path: found two files whose scores would go to {path}; score them apart")
        paths[name] = path
    return paths


def check_query_ids(path: str, query_ids: list[str]) -> None:
    """Refuses samples whose scores could not be told apart.

    Raises:
        InputError: a query id occurs twice.
    """
    repeated = [query_id for query_id, count in Counter(query_ids).items() if count > 1]
    if repeated:
        raise InputError(
            f'{path}: field "query_id": found {len(repeated)} ids more than once ({first_few(repeated)}), '
            "expected one record a prompt"
        )


def score_dataset(
    trainer: RewardModelTrainer, dataset: datasets.Dataset, path: Path, settings: dict[str, Any]
) -> None:
    """Writes one {"<query_id>:<answer key>": reward} per answer, in file order.

    The rewards of finished batches are kept as the run goes on. Batches depend neither on the number of processes nor
    on what was finished before, so the file is the same to the bit, however often the run was interrupted, as long as
    a process computes with the same number of threads.

    Args:
        trainer: with the reward model.
        dataset: the answers, as `load_preference_dataset` gives them.
        path: the file to write; an old one is replaced at the end.
        settings: all that the rewards depend on; rewards kept under other settings are left alone.
    """
    is_main = trainer.is_world_process_zero()
    batches = trainer.eval_batches(dataset)
    batches_sha256 = hashlib.sha256(json.dumps(batches).encode()).hexdigest()
    store = ResultStore(path, {**settings, "batches_sha256": batches_sha256})
    done = broadcast_object_list([set(store.load())])[0]
    todo = [number for number in range(len(batches)) if str(number) not in done]
    if is_main:
        store.log_state(len(batches) - len(todo), len(batches), "batches")
    trainer.remove_callback(ProgressCallback)  # it would begin anew with every part
    part_size = BATCHES_PER_PART * trainer.args.world_size
    num_left = sum(len(batches[number]) for number in todo)
    with tqdm(
        total=len(dataset),
        initial=len(dataset) - num_left,
        unit="record",
        disable=not is_main or trainer.args.disable_tqdm,
    ) as progress:
        for start in range(0, len(todo), part_size):
            part = todo[start : start + part_size]
            rewards = trainer.predict_batches(dataset, [batches[number] for number in part])
            for number in part:
                if is_main:
                    store.append(str(number), [rewards[i].tolist() for i in batches[number]])
                progress.update(len(batches[number]))
    if is_main:
        parts = store.load()
        kept = [(batch, parts[str(number)]) for number, batch in enumerate(batches)]
        rows = {i: row for batch, batch_rows in kept for i, row in zip(batch, batch_rows, strict=True)}
        answers = zip(dataset["query_id"], dataset["response_keys"], strict=True)
        store.finish(
            [
                {f"{query_id}:{key}": reward}
                for i, (query_id, keys) in enumerate(answers)
                for key, reward in zip(keys, rows[i], strict=False)  # padded to the most answers of a record
            ]
        )
