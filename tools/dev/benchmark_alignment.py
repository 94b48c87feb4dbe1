"""The mode `alignment` of `benchmark.py`: steps of the LLM on real prompts, against TRL's DPO and padded batches.

    tree               as `train_llm.py` does it
    padded             the same with a row per response, padded to the longest of the batch
    padded_all_logits  rrhf: padded, and the LM head runs on all tokens of all rows, as in the code of RRHF's authors
    trl                dpo: TRL's DPOTrainer, which keeps the reference model and runs it in every step, its default
    trl_precomputed    dpo: the same with --precompute_ref_log_probs
    trl_checkpointing  dpo: `trl` with gradient checkpointing, its default, which saves memory and takes time

`dpo` trains on human pairs, `rrhf` on four responses a prompt. All start from the same weights and make the same
updates on the same ids in float32 on the CPU; the loss of every step is compared. Each contestant is a process of its
own, which waits while another one works, so that the largest resident set is that of one contestant.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from benchmark_rounds import draw_rounds, find_files, summarize
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Trainer

from apo.evaluation import token_budget
from apo.policy import PolicyTrainer, sum_logprobs
from apo.policy_data import PolicyDataCollator, iter_scored_records, tokenize_records
from apo.policy_model import load_policy
from apo.records import PreferenceRecord
from apo.reference import compute_reference_logps
from apo.sampling import load_tokenizer
from apo.tree import batching_of, choose_attention
from arguments import CommonTrainingArguments
from models import load_config

ALIGNMENT_CONTESTANTS = {
    "dpo": ["tree", "padded", "trl", "trl_precomputed", "trl_checkpointing"],
    "rrhf": ["tree", "padded", "padded_all_logits"],
}
ALIGNMENT_MAX_LENGTH = 512  # tokens, by default
BETA = 0.1
LEARNING_RATE = 1e-5  # moves the losses of DPO from log 2
TOLERANCE = 1e-4  # of the losses of a step
Row = dict[str, Any]  # of `apo.policy_data.tokenize_records`


# ------------------------------------------------------------------------------------------------ data


def add_responses(records: list[PreferenceRecord]) -> Iterator[PreferenceRecord]:
    """Gives each prompt also the two responses of the next one, for lengths as real ones have; all scores differ."""
    for record, other in zip(records, [*records[1:], records[0]], strict=True):
        responses = record.responses[:2] + other.responses[:2]
        yield dataclasses.replace(record, responses=responses, scores=[4.0, 3.0, 2.0, 1.0])


def iter_rows(align_type: str, pairs_path: Path, model_path: str, max_length: int, seed: int) -> Iterator[Row]:
    """Human pairs in random order as rows of ids; for rrhf with four responses."""
    records = list(iter_scored_records(pairs_path, align_type))
    records = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
    if align_type == "rrhf":
        records = list(add_responses(records))
    tokenizer = load_tokenizer(model_path, "plain")
    settings = {"align_type": align_type, "template": "plain", "max_length": max_length}
    rows = tokenize_records(pairs_path, records, tokenizer, **settings)
    return (row for row in rows if not row["left_out"])


# ------------------------------------------------------------------------------------------------ trainers


class AllLogitsTrainer(PolicyTrainer):
    """Computes the log-probabilities of all tokens and takes those of the responses."""

    def _logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits  # (N, T, V)
        logprobs = logits.log_softmax(-1).flatten(0, 1)[inputs["rows"], inputs["labels"]]
        return sum_logprobs(logprobs, inputs["lengths"])


def make_trainer(name: str, align_type: str, model_path: str, max_length: int, flags: dict[str, Any]) -> Trainer:
    """The trainer of `train_llm.py`."""
    batching = "tree" if name == "tree" else "padded"
    config = load_config(model_path)
    attention = choose_attention(config, batching, torch.device("cpu"), torch.float32)
    trainer_class = AllLogitsTrainer if name == "padded_all_logits" else PolicyTrainer
    return trainer_class(
        model=load_policy(model_path, config, dtype=torch.float32, attention=attention),
        args=CommonTrainingArguments(**flags, batching=batching),
        align_type=align_type,
        beta=BETA,
        max_length=max_length,
        data_collator=PolicyDataCollator(batching_of(attention)),
    )


def make_trl_trainer(name: str, model_path: str, max_length: int, flags: dict[str, Any], rows: list[Row]) -> Trainer:
    """TRL's trainer of DPO, which needs a data set."""
    from trl import DPOConfig, DPOTrainer

    class SameIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset  # `Contestant.add_reference` does it

    trl_args = DPOConfig(
        **flags,
        beta=BETA,
        max_length=max_length,
        bf16=False,
        gradient_checkpointing=name == "trl_checkpointing",
        precompute_ref_log_probs=name == "trl_precomputed",
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = load_tokenizer(model_path, "plain")
    return SameIds(model=model, args=trl_args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def to_trl(row: Row) -> Row:
    """A row of TRL's columns."""
    chosen, rejected = row["response_ids"]
    columns = {"prompt_ids": row["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
    reference = row.get("reference_logps", ())
    return columns | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=False))


# ------------------------------------------------------------------------------------------------ a contestant


def now() -> np.ndarray:
    """Seconds on the clock, and processor seconds of this process with all its threads: (2,)."""
    return np.array([time.perf_counter(), time.process_time()])


class Contestant:
    """A trainer that is ready to run, in a process of its own; counts the tokens that its backbone runs."""

    def __init__(self, name: str, align_type: str, model_path: str, rows: list[Row], settings: dict[str, Any]) -> None:
        self.name, self.batch_size = name, settings["batch_size"]
        flags = {"output_dir": settings["output_dir"], "use_cpu": True, "learning_rate": LEARNING_RATE}
        flags |= {f"per_device_{phase}_batch_size": self.batch_size for phase in ("train", "eval")}
        flags |= {"train_sampling_strategy": "sequential", "disable_tqdm": True}
        self.is_trl, self.max_length = name.startswith("trl"), settings["max_length"]
        if self.is_trl:
            self.trainer = make_trl_trainer(name, model_path, self.max_length, flags, [to_trl(row) for row in rows])
        else:
            self.trainer = make_trainer(name, align_type, model_path, self.max_length, flags)
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = 1
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        self.precomputes = align_type == "dpo" and name not in ("trl", "trl_checkpointing")
        self.num_tokens = 0
        trainer.model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.num_tokens += args[0].numel() * self.model.training

    def make_dataset(self, rows: list[Row]) -> Dataset:
        """The columns that this trainer reads."""
        return Dataset.from_list([to_trl(row) for row in rows] if self.is_trl else rows)

    def add_reference(self, rows: list[Row]) -> tuple[np.ndarray, list[Row]]:
        """Returns the time that the reference model, here the untrained policy, took, and rows with its result."""
        if not self.precomputes:
            return np.zeros(2), rows
        dataset = self.make_dataset(rows)
        start = now()
        if not self.is_trl:
            args = self.trainer.args
            budget = token_budget(args, self.max_length)
            logps = compute_reference_logps(self.model.eval(), dataset, args, budget)
        else:
            batches = DataLoader(dataset, self.batch_size, collate_fn=self.trainer.data_collator)
            pairs = [torch.stack(self.trainer.compute_ref_log_probs(self.model.eval(), batch), 1) for batch in batches]
            logps = torch.cat(pairs).tolist()
        return now() - start, [{**row, "reference_logps": pair} for row, pair in zip(rows, logps, strict=True)]

    def train(self, rows: list[Row]) -> dict[str, Any]:
        """Makes an update with each batch; returns losses, time, tokens and the largest resident set so far."""
        trainer = self.trainer
        trainer.train_dataset = self.make_dataset(rows)
        self.num_tokens, losses, start = 0, [], now()
        for inputs in trainer.get_train_dataloader():
            losses.append(trainer.training_step(self.model, inputs, torch.tensor(self.batch_size)).item())
            trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
            self.optimizer.step()
            self.model.zero_grad()
        return {
            "losses": losses,
            "time": now() - start,
            "num_tokens": self.num_tokens,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


_contestant: Contestant  # of this process


def start_contestant(threads: int, *args: Any) -> None:
    """Builds the contestant of a new process."""
    global _contestant
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(threads)
    _contestant = Contestant(*args)


def call_contestant(method: str, rows: list[Row]) -> Any:
    """Calls a method of the contestant of this process, and gives back the memory that others may need."""
    result = getattr(_contestant, method)(rows)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return result


# ------------------------------------------------------------------------------------------------ the race


def check_losses(losses: dict[str, list[float]]) -> None:
    """All contestants have the same loss in each step of a round."""
    first, *others = losses
    for name in others:
        difference = np.abs(np.subtract(losses[name], losses[first])).max()
        assert difference <= TOLERANCE, (name, first, difference, losses[name], losses[first])


def summarize_round(measured: dict[str, Any], reference_time: np.ndarray, num_items: int) -> dict[str, float]:
    """What is reported of a round: `Contestant.train` and the reference pass over the same items."""
    seconds, cpu_seconds = measured["time"] + reference_time
    return {
        "seconds": float(seconds),
        "step_seconds": float(measured["time"][0]),
        "cpu_seconds": float(cpu_seconds),
        "items_per_second": num_items / float(seconds),
        "tokens_per_item": measured["num_tokens"] / num_items,
        "peak_memory_mib": measured["peak_memory_mib"],
        "check": float(np.mean(measured["losses"])),
    }


def race(
    align_type: str, names: list[str], rounds: list[list[Row]], *, model_path: str, threads: int, **settings: Any
) -> dict[str, list[dict[str, float]]]:
    """Measures round by round, all contestants in turn; the first round is a warm-up.

    Args:
        align_type: `dpo` or `rrhf`.
        names: of the contestants.
        rounds: rows of `iter_rows`.
        model_path: of the policy to start from, which is the reference of dpo.
        threads: of each process.
        settings: `batch_size`, `max_length` and `output_dir` of the trainers.

    Returns:
        {contestant: its rounds}; `seconds` are those of the steps and of a reference pass over the same pairs.
    """
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        pools = {}
        for name in names:
            start = (threads, name, align_type, model_path, rounds[0][: settings["batch_size"]], settings)
            pool = ProcessPoolExecutor(1, get_context("spawn"), start_contestant, start)
            pools[name] = stack.enter_context(pool)
        with_reference: dict[str, list[tuple[np.ndarray, list[Row]]]] = {name: [] for name in names}
        for rows in tqdm(rounds, unit="round", desc="reference"):
            for name, pool in pools.items():
                with_reference[name].append(pool.submit(call_contestant, "add_reference", rows).result())
        for i in tqdm(range(len(rounds)), unit="round", desc="steps"):
            measured = {}
            for name, pool in pools.items():
                reference_time, rows = with_reference[name][i]
                measured[name] = pool.submit(call_contestant, "train", rows).result()
                results[name].append(summarize_round(measured[name], reference_time, len(rows)))
            check_losses({name: found["losses"] for name, found in measured.items()})
    return {name: history[1:] for name, history in results.items()}


def run_alignment(name: str, args: argparse.Namespace, model_path: str, work_dir: Path) -> dict[str, dict[str, Any]]:
    """Loads the data of a workload, `dpo` or `rrhf`, and measures its contestants."""
    pairs, *_ = find_files(args.data_dir)
    rows = iter_rows(name, pairs, model_path, args.max_length or ALIGNMENT_MAX_LENGTH, args.seed)
    rounds = draw_rounds(rows, 1 + args.rounds, args.batch_size * args.num_batches)
    settings = {"max_length": args.max_length or ALIGNMENT_MAX_LENGTH, "batch_size": args.batch_size}
    settings |= {"model_path": model_path, "threads": args.threads, "output_dir": str(work_dir)}
    names = [key for key in args.contestants if key in ALIGNMENT_CONTESTANTS[name]]
    return summarize(race(name, names, rounds, **settings))
