"""Measures, side by side in one run, what a training step or a scored batch costs under several ways of batching.

    python tools/dev/benchmark.py --output_dir outputs/benchmark --threads 2
    python tools/dev/benchmark.py --mode scoring --output_dir outputs/benchmark_scoring --threads 2
    python tools/dev/benchmark.py --mode scaling --hidden_size 64 --num_layers 2 --output_dir outputs/benchmark_scaling

The contestants, all with the same weights, data, order, precision, optimizer and pooling (last token):

    tree           ours: every shared prefix of a batch is computed once, nothing is padding
    padded         every answer a row of its own, padded to the longest of the batch; batches in the order of the data
    padded_groups  in training: the same on whole groups, an answer that several pairs share being one row
    padded_sorted  in scoring: ours with --batching padded, which puts answers of similar length into a batch
    reference      the reference's scheme: a batch of more than one item is padded to max_length, every item filled up
                   to the largest number of answers with dummies; an LM head over the vocabulary runs and is dropped
    trl            in training: TRL's own RewardTrainer, collator and loss on the same ids (pip install trl==1.16.0)

Why it is fair. All are transformers Trainers, and each runs its own data loader, collator and `training_step` with the
AdamW that it makes itself from the same arguments, then gradient clipping and the update; scoring is Trainer.predict.
Left out is what they have in common, the loop around the steps: schedule, logging, checkpoints. Tokenising is left out
too, which flatters the reference, who does it in every step.

A prompt with several pairs is one item for `tree` and several for the others, which see these pairs shuffled, as in
training, and accumulate them: each makes the same number of updates from the same pairs. Rounds alternate between the
contestants, and a ratio is the median of the ratios within a round. The learning rate is 0, which costs the same and
keeps the weights equal: the column "check", the mean loss or reward, shows that all compute the same function.

Without --model_name_or_path the model is a random LLaMA whose tokenizer, 32,000 pieces or as many as the text offers,
is trained on the files of --data_dir by `tools/dev/make_tiny_llama.py`, so that sequences have realistic lengths.
Linux only: the memory of a CPU run is the process's peak resident set above what it held before the round.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import gc
import importlib.util
import itertools
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process, one card

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PrinterCallback, Trainer
from transformers.models.llama.modeling_llama import LlamaAttention

from apo.cli import InputError, OneLineParser, exit_on_input_error, write_json
from apo.figures import new_figure, save_figure
from apo.records import SEPARATOR, PreferenceRecord, load_preference_data
from apo.run_files import git_commit
from apo.tokenizer import RewardTokenizer, load_reward_tokenizer
from apo.tree import build_token_tree, choose_attention
from arguments import RewardTrainingArguments
from models import (
    RewardModel,
    RewardModelOutput,
    RewardSettings,
    load_config,
    load_reward_model,
    resolve_settings,
)
from reward_datasets import RewardDataCollator, load_preference_dataset, preferred_pairs
from trainer import RewardModelTrainer

REPO_ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger("benchmark")

CONTESTANTS = {
    "training": ("tree", "padded", "reference", "trl", "padded_groups"),
    "scoring": ("tree", "padded", "reference", "padded_sorted"),
    "scaling": ("tree", "padded_sorted"),
}
ALL_CONTESTANTS = tuple(dict.fromkeys(itertools.chain(*CONTESTANTS.values())))
WORKLOADS = {"hh_pairs": 512, "apo_groups": 512, "long_prompts": 2048}  # and their longest sequences
DEFAULT_WORKLOADS = {"training": list(WORKLOADS), "scoring": ["apo_groups"], "scaling": ["hh_pairs"]}
LONG_PROMPT_TOKENS = 1500
SHORT_ANSWER_TOKENS = 64
VOCAB_SIZE = 32000
SCALING_LIMIT = 1.15
# Dense bf16 matrix products in TFLOP/s, as the makers state them.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
COLUMNS = ("contestant", "items/s", "real tokens/s", "wasted tokens", "peak memory", "of peak rate", "check")


# ------------------------------------------------------------------------------------------------ data


def run_tool(name: str, *words: str | Path, **flags: Any) -> None:
    """Runs another tool.

    Raises:
        InputError: what the tool said when it refused its input.
    """
    command = [sys.executable, REPO_ROOT / "tools" / name, *words]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))


def find_files(data_dir: Path) -> dict[str, Path]:
    """The files of an hh-split folder that the workloads are made of: human pairs, golden answers, sampled answers."""
    folder = data_dir / "rm_data"
    samples = sorted(folder.glob("hh_split_rm_*.sample.json"))
    if not samples:
        raise InputError(f"{data_dir}: found no rm_data/hh_split_rm_*.sample.json; expected the hh-split layout")
    names = {"pairs": "hh_split_rm.train.json", "golden": "hh_split_rm.golden.json"}
    return {**{kind: folder / name for kind, name in names.items()}, "samples": samples[0]}


def read_workload(name: str, mode: str, data_dir: Path, work_dir: Path) -> list[PreferenceRecord]:
    """Reads the records behind a workload: human pairs, golden answers with samples, or samples alone for scoring."""
    files = find_files(data_dir)
    if name == "hh_pairs" or (name == "long_prompts" and mode != "scoring"):
        return load_preference_data(files["pairs"], "comparison_pair")
    if mode == "scoring":
        return load_preference_data(files["samples"], "reject_sample")
    flags = {"golden_data_path": files["golden"], "sample_data_path": files["samples"], "output_dir": work_dir}
    run_tool("apo_data_converter.py", "--group", apo_data_name="groups", **flags)
    return load_preference_data(work_dir / "groups_text_scores.json", "comparison_pair")


def lengthen_prompts(
    records: list[PreferenceRecord], tokenizer: RewardTokenizer, num_tokens: int
) -> list[PreferenceRecord]:
    """Puts the dialogues that follow in the file before each prompt, cut to about `num_tokens`; short answers only."""
    dialogues = [record.prompts[0] + record.responses[0] for record in records]
    lengths = [len(ids) for ids in tokenizer.encode(dialogues)]
    long = []
    for i, record in enumerate(records):
        if max(map(len, tokenizer.encode(record.responses))) > SHORT_ANSWER_TOKENS:
            continue
        context, length = record.prompts[0], len(tokenizer.encode(record.prompts[:1])[0])
        for j in itertools.count(i + 1):
            if length >= num_tokens:
                break
            context, length = dialogues[j % len(records)] + context, length + lengths[j % len(records)]
        prompt = context[-len(context) * num_tokens // length :]
        long.append(replace(record, prompts=[prompt] * len(record.responses)))
    return long


def save_records(path: Path, records: list[PreferenceRecord]) -> None:
    """Writes text-scores records."""
    items = [
        {"text": [p + SEPARATOR + r for p, r in zip(x.prompts, x.responses, strict=True)], "scores": x.scores}
        for x in records
    ]
    write_json(path, items)


def split_pairs(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of a row of `tokenize_records`, each a row of its own with the preferred sequence first."""
    ids, scores = group["input_ids"], group["scores"]
    return [
        {**group, "input_ids": [ids[i], ids[j]], "scores": [scores[i], scores[j]], "num_pairs": 1}
        for i, j in preferred_pairs(scores)
    ]


def plan_rounds(num_items: int, num_rounds: int, items_per_round: int, seed: int) -> list[list[int]]:
    """Draws the items of each round without repetition; a round takes other items than the last while there are any.

    Raises:
        InputError: a round needs more items than there are.
    """
    if items_per_round > num_items:
        raise InputError(
            f"--batch_size, --num_batches: a round needs {items_per_round} items, the data has {num_items}; lower one"
        )
    rng = np.random.default_rng(seed)
    rounds: list[list[int]] = []
    while len(rounds) < num_rounds:
        order = rng.permutation(num_items).tolist()
        rounds += [order[i : i + items_per_round] for i in range(0, num_items - items_per_round + 1, items_per_round)]
    return rounds[:num_rounds]


# ------------------------------------------------------------------------------------------------ contestants


@dataclass
class FixedLengthCollator:
    """The reference's batch: dummies up to the largest number of answers, and `max_length` unless it is one item."""

    pad_token_id: int
    dummy_ids: list[int]
    max_length: int

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        largest = max(len(item["input_ids"]) for item in items)
        filled = [
            {**x, "input_ids": x["input_ids"] + [self.dummy_ids] * (largest - len(x["input_ids"]))} for x in items
        ]
        batch = RewardDataCollator(self.pad_token_id, batching="padded")(filled)
        if len(items) > 1:
            missing = (0, self.max_length - batch["input_ids"].shape[1])
            batch["input_ids"] = F.pad(batch["input_ids"], missing, value=self.pad_token_id)
            batch["attention_mask"] = F.pad(batch["attention_mask"], missing, value=0)
        return batch


def in_file_order(num_items: int, batch_size: int) -> list[list[int]]:
    """Indices of the items of each batch."""
    return [list(range(i, min(i + batch_size, num_items))) for i in range(0, num_items, batch_size)]


class InOrderTrainer(RewardModelTrainer):
    """Scores batches of `batch_size` items in the order of the data, and drops the rewards of dummies."""

    def eval_batches(self, dataset: Dataset) -> list[list[int]]:
        return in_file_order(len(dataset), self.args.eval_batch_size)

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> RewardModelOutput:
        output = super()._forward(model, inputs)
        present = (inputs["scores"] >= 0).flatten()  # (B*R,)
        if len(output["rewards"]) == len(present):
            output["rewards"] = output["rewards"][present]
        return output


class Contestant:
    """A trainer whose model and optimizer are ready to run, and counts of what has run through the model's layers."""

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.name, self.trainer, self.layers = name, trainer, trainer.model.model
        self.layers.embed_tokens.register_forward_hook(self._count_tokens)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._count_linear)
            elif isinstance(module, LlamaAttention):
                module.register_forward_pre_hook(self._count_attention, with_kwargs=True)
        # As `Trainer.train` does; it is what turns bf16 on.
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        self.reset()

    def reset(self) -> None:
        """Begins to count anew."""
        self.num_tokens, self.flops = 0, 0

    def _count_tokens(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.num_tokens += args[0].numel()

    def _count_linear(self, module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        self.flops += 2 * module.in_features * output.numel()

    def _count_attention(self, module: LlamaAttention, args: tuple, kwargs: dict[str, Tensor]) -> None:
        positions = kwargs["position_ids"].expand(kwargs["hidden_states"].shape[:2])  # (N, T)
        heads = module.config.num_attention_heads * module.head_dim
        self.flops += 4 * heads * (positions + 1).sum()  # a token attends to those before it and to itself

    def count_flops(self, mode: str) -> float:
        """Floating-point operations of the matrix products that have run.

        Two for a token and a weight outside the embedding, four for an attended token and a dimension of the heads of
        a layer, three times as many with the backward pass; the LM head of the reference has none. A tree's last
        layer attends from pooled tokens only, which is left out.
        """
        config = self.layers.config
        lm_head = 2 * config.hidden_size * config.vocab_size * self.num_tokens * (self.name == "reference")
        return float(self.flops) * (1 if mode == "scoring" else 3) + lm_head


def make_dataset(name: str, groups: list[dict[str, Any]], args: argparse.Namespace) -> Dataset:
    """The rows that a contestant runs on: groups in their order, or their pairs, shuffled."""
    if args.mode == "scoring" or name in ("tree", "padded_groups"):
        return Dataset.from_list(groups)
    pairs = [pair for group in groups for pair in split_pairs(group)]
    pairs = [pairs[i] for i in np.random.default_rng(args.seed).permutation(len(pairs))]
    if name == "trl":
        pairs = [{**x, "chosen_ids": x["input_ids"][0], "rejected_ids": x["input_ids"][1]} for x in pairs]
    return Dataset.from_list(pairs)


def trainer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What every contestant's trainer is given."""
    return {
        "output_dir": str(args.output_dir),
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.0,
        "num_train_epochs": 1,
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bfloat16",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": args.seed,
    }


def make_trainer(
    name: str,
    path: str,
    tokenizer: RewardTokenizer,
    settings: RewardSettings,
    *,
    dataset: Dataset,
    arguments: dict[str, Any],
) -> Trainer:
    """Loads the model of a contestant and builds its trainer; TRL's asks for a data set of pairs at once."""
    batching = "tree" if name == "tree" else "padded"
    args = RewardTrainingArguments(**arguments, batching=batching)
    config = load_config(path)
    attention = choose_attention(config, batching, args.device, torch.bfloat16 if args.bf16 else torch.float32)
    loading = {"seed": args.seed, "with_lm_head": name == "reference", "attention": attention}
    model = load_reward_model(path, config, tokenizer, settings, **loading)
    if name == "trl":
        return make_trl_trainer(model, tokenizer, dataset, {**arguments, "max_length": settings.max_length})
    collator = RewardDataCollator(tokenizer.pad_token_id, batching=batching)
    if name == "reference":
        dummy_ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        collator = FixedLengthCollator(tokenizer.pad_token_id, dummy_ids, settings.max_length)
        model.model.register_forward_hook(functools.partial(run_and_drop, model.lm_head))
    trainer_class = InOrderTrainer if name in ("padded", "reference") else RewardModelTrainer
    trainer = trainer_class(model=model, args=args, data_collator=collator, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_and_drop(lm_head: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook that runs the LM head on all hidden states."""
    lm_head(output.last_hidden_state)


def make_trl_trainer(
    model: RewardModel, tokenizer: RewardTokenizer, dataset: Dataset, arguments: dict[str, Any]
) -> Trainer:
    """TRL's trainer on a sequence classifier that takes over the weights of a reward model."""
    from trl import RewardConfig, RewardTrainer

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = LlamaForSequenceClassification(config)
    classifier.model, classifier.score = model.model, model.reward_head
    args = RewardConfig(**arguments, gradient_checkpointing=False)
    return RewardTrainer(model=classifier, args=args, train_dataset=dataset, processing_class=tokenizer.hf_tokenizer)


# ------------------------------------------------------------------------------------------------ measuring


def train_round(contestant: Contestant, dataset: Dataset, num_updates: int) -> float:
    """Trains on a data set with `num_updates` updates; returns the mean loss over its pairs."""
    trainer, model = contestant.trainer, contestant.model
    trainer.train_dataset = dataset
    loader = trainer.get_train_dataloader()
    trainer.current_gradient_accumulation_steps = len(loader) / num_updates
    losses = []
    for i, inputs in enumerate(loader):
        losses.append(trainer.training_step(model, inputs))
        if (i + 1) * num_updates // len(loader) > i * num_updates // len(loader):
            trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            contestant.optimizer.step()
            model.zero_grad()
    size = trainer.args.per_device_train_batch_size
    num_pairs = [sum(dataset["num_pairs"][i : i + size]) for i in range(0, len(dataset), size)]
    return len(loader) / num_updates * float(np.average([loss.item() for loss in losses], weights=num_pairs))


def score_round(contestant: Contestant, dataset: Dataset) -> float:
    """Scores a data set; returns the mean reward."""
    return float(np.nanmean(contestant.trainer.predict(dataset).predictions[0]))


def memory_level(device: str, *, reset: bool = False) -> int:
    """Bytes in use: the most since the last reset, or, on a reset, those of now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the round needs
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(contestant: Contestant, groups: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, float]:
    """One timed round of one contestant on some groups, collating and data loading included."""
    dataset = make_dataset(contestant.name, groups, args)
    contestant.reset()
    before = memory_level(args.device, reset=True)
    start = time.perf_counter()
    if args.mode == "scoring":
        check = score_round(contestant, dataset)
    else:
        check = train_round(contestant, dataset, len(groups) // args.batch_size)
    seconds = time.perf_counter() - start  # the check has waited for the device
    if args.mode == "scoring":
        batches = contestant.trainer.eval_batches(dataset)
    else:
        batches = in_file_order(len(groups), args.batch_size)
    trees = [build_token_tree([ids for i in batch for ids in groups[i]["input_ids"]]) for batch in batches]
    needed = sum(len(tree["subtree_ends"]) for tree in trees)
    return {
        "seconds": seconds,
        "items_per_second": len(groups) / seconds,
        "real_tokens_per_second": sum(len(ids) for group in groups for ids in group["input_ids"]) / seconds,
        "tokens_run": contestant.num_tokens,
        "wasted_tokens": 1 - needed / contestant.num_tokens,
        "peak_memory_bytes": memory_level(args.device) - before,
        "tflops_per_second": contestant.count_flops(args.mode) / seconds / 1e12,
        "check": check,
    }


def race(contestants: list[Contestant], dataset: Dataset, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Measures round by round, all contestants in turn, after a round that does not count; {contestant: rounds}."""
    results: dict[str, list[dict]] = {contestant.name: [] for contestant in contestants}
    plan = plan_rounds(len(dataset), 1 + args.rounds, args.batch_size * args.num_batches, args.seed)
    for i, indices in enumerate(plan):
        groups = dataset.select(indices).to_list()
        for contestant in contestants:
            results[contestant.name].append(measure(contestant, groups, args))
        speeds = ", ".join(f"{name} {rounds[-1]['items_per_second']:.3g}" for name, rounds in results.items())
        logger.info("%s: %s items/s", f"round {i} of {args.rounds}" if i else "warm-up", speeds)
    return {name: rounds[1:] for name, rounds in results.items()}


def summarize(results: dict[str, list[dict]], peak_tflops: float | None) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and how many times as fast the first contestant is, within each round."""
    base = next(iter(results.values()))
    summary = {}
    for name, rounds in results.items():
        medians = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
        ratios = [r["seconds"] / b["seconds"] for r, b in zip(rounds, base, strict=True)]
        summary[name] = {
            **medians,
            "first_is_faster": float(np.median(ratios)),
            "first_is_faster_range": [min(ratios), max(ratios)],
            "share_of_peak_rate": medians["tflops_per_second"] / peak_tflops if peak_tflops else None,
            "rounds": rounds,
        }
    return summary


def measure_scaling(
    make: Callable[[str], Trainer],
    load: Callable[[Path], Dataset],
    records: list[PreferenceRecord],
    args: argparse.Namespace,
    work_dir: Path,
) -> dict[str, dict[str, Any]]:
    """Seconds per item of a whole pass: load the cached data, `Trainer.train` on it, predict it.

    The first `min(sizes)` records are repeated, so that every size has the same mix of lengths.
    """
    paths = {size: work_dir / f"scaling_{size}.json" for size in args.sizes}
    for size, path in paths.items():
        save_records(path, list(itertools.islice(itertools.cycle(records[: min(args.sizes)]), size)))
        load(path)  # fills the cache of tokenised data
    keys = list(itertools.product(args.contestants, args.sizes))
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    for _, (name, size) in itertools.product(range(args.rounds), keys):
        trainer = make(name)
        start = time.perf_counter()
        dataset = load(paths[size])
        trainer.train_dataset = dataset
        trainer.train()
        trainer.predict(dataset)
        seconds[name, size].append((time.perf_counter() - start) / size)
    return {
        f"{name}, {size:,} items": {
            "seconds_per_item": float(np.median(seconds[name, size])),
            "ratio": float(np.median(np.divide(seconds[name, size], seconds[name, args.sizes[0]]))),
            "rounds": seconds[name, size],
        }
        for name, size in keys
    }


# ------------------------------------------------------------------------------------------------ telling


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, numbers (from the second column on) to the right."""
    rule = ("---", *["---:"] * (len(header) - 1))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def format_race(summary: dict[str, dict[str, Any]]) -> str:
    """The table of one workload."""
    rows = []
    for name, values in summary.items():
        low, high = values["first_is_faster_range"]
        share = values["share_of_peak_rate"]
        cells = (
            name,
            f"{values['items_per_second']:.2f}",
            f"{values['real_tokens_per_second']:,.0f}",
            f"{100 * values['wasted_tokens']:.1f} %",
            f"{values['peak_memory_bytes'] / 2**20:,.0f} MiB",
            "-" if share is None else f"{100 * share:.1f} %",
            f"{values['check']:.5f}",
        )
        rows.append((*cells, f"{values['first_is_faster']:.2f} ({low:.2f} to {high:.2f})"))
    return format_table((*COLUMNS, f"{next(iter(summary))} is faster by (range)"), rows)


def format_scaling(summary: dict[str, dict[str, Any]]) -> str:
    """The table of one workload in the mode `scaling`, with a verdict for each size."""
    rows = []
    for name, values in summary.items():
        verdict = "yes" if values["ratio"] <= SCALING_LIMIT else "no"
        rows.append((name, f"{1000 * values['seconds_per_item']:.2f}", f"{values['ratio']:.3f}", verdict))
    return format_table(("pass over", "ms per item", "of the first size", f"at most {SCALING_LIMIT}"), rows)


def plot(path: Path, panels: dict[str, dict[str, float]], label: str) -> None:
    """Draws one panel of bars per title."""
    figure, axes = new_figure(len(panels), width=4, height=3)
    for (title, bars), axis in zip(panels.items(), axes, strict=True):
        drawn = axis.barh(list(bars), list(bars.values()), color=[f"C{i}" for i in range(len(bars))])
        axis.bar_label(drawn, fmt="%.3g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set(title=title, xlabel=label)
    save_figure(path, figure)


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the flags."""
    packages = ["torch", "transformers", "accelerate", *["trl"] * ("trl" in args.contestants)]
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
        "commit": git_commit(),
    }


# ------------------------------------------------------------------------------------------------ main


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    real = REPO_ROOT / "data" / "hh-split"
    data_dir = os.environ.get("HH_DATA_DIR") or (real if real.is_dir() else REPO_ROOT / "data" / "sample")
    parser = OneLineParser(
        description="Measures what a training step or a scored batch costs under several ways of batching.",
        epilog="example:\n  python tools/dev/benchmark.py --output_dir outputs/benchmark --threads 2",
    )
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for benchmark.json and benchmark.png")
    add("--mode", choices=CONTESTANTS, default="training", help="what to measure (default: training)")
    add("--workload", nargs="+", choices=WORKLOADS, help="default: all; scoring: apo_groups; scaling: hh_pairs")
    add("--contestants", nargs="+", choices=ALL_CONTESTANTS, help="the first is compared with the others")
    add("--data_dir", type=Path, default=Path(data_dir), help="default: HH_DATA_DIR, data/hh-split or data/sample")
    add("--model_name_or_path", help="a LLaMA with its tokenizer (default: a random one)")
    add("--hidden_size", type=int, default=384, help="of the random LLaMA, a head for each 64 (default: 384)")
    add("--num_layers", type=int, default=8, help="of the random LLaMA (default: 8)")
    add("--batch_size", type=int, default=8, help="items of a micro-batch, prompts of an update (default: 8)")
    add("--max_length", type=int, help="longest sequence (default: 512, long_prompts 2048)")
    add("--num_batches", type=int, default=2, help="updates, or scored batches, of a round (default: 2)")
    add("--rounds", type=int, default=5, help="rounds of each contestant (default: 5)")
    add("--sizes", type=int, nargs="+", default=[1000, 8000], help="of --mode scaling (default: 1000 8000)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation (default: bfloat16 on cuda)")
    add("--peak_tflops", type=float, help="the card's peak rate (default: that of known cards for bfloat16)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=42, help="of weights and order (default: 42)")
    return parser.parse_args()


def complete_args(args: argparse.Namespace) -> None:
    """Settles the defaults that depend on the machine and on one another.

    Raises:
        InputError: a number below 1, no GPU, or a contestant that this mode does not have.
    """
    numbers = {name: getattr(args, name) for name in ("batch_size", "num_batches", "rounds", "threads")}
    for name, value in {**numbers, "sizes": min(args.sizes)}.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: found no GPU; leave it out to measure on the CPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.peak_tflops is None and (args.device, args.dtype) == ("cuda", "bfloat16"):
        name = torch.cuda.get_device_name()
        args.peak_tflops = next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)
    args.workload = args.workload or DEFAULT_WORKLOADS[args.mode]
    known = CONTESTANTS[args.mode]
    args.contestants = args.contestants or [name for name in known if name != "padded_groups"]
    if not set(args.contestants) <= set(known):
        raise InputError(f"--contestants {' '.join(args.contestants)}: --mode {args.mode} has {', '.join(known)}")
    if "trl" in args.contestants and not importlib.util.find_spec("trl"):
        print("trl is left out: it is not installed (pip install trl==1.16.0)")
        args.contestants.remove("trl")
    if not args.contestants:
        raise InputError("--contestants trl: TRL is not installed (pip install trl==1.16.0)")
    if args.threads:
        torch.set_num_threads(args.threads)


def make_model(args: argparse.Namespace, output_dir: Path) -> str:
    """Writes a random LLaMA whose tokenizer is trained on the data; returns its path."""
    files = find_files(args.data_dir)
    run_tool(
        "dev/make_tiny_llama.py",
        *("--corpus", files["pairs"], files["samples"]),
        output_dir=output_dir,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=max(1, args.hidden_size // 64),
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=args.max_length or max(WORKLOADS.values()),
        seed=args.seed,
    )
    return str(output_dir)


def run_workload(name: str, args: argparse.Namespace, model_path: str, work_dir: Path) -> dict[str, dict[str, Any]]:
    """Loads data and contestants of one workload and measures them."""
    config = load_config(model_path)
    settings = resolve_settings(config, max_length=args.max_length or WORKLOADS[name], pooling_type="eos")
    tokenizer = load_reward_tokenizer(model_path, config, settings.tokenizer_backend)
    settings.sep_token_id = tokenizer.sep_token_id

    def load(path: Path) -> Dataset:
        flags = {key: getattr(settings, key) for key in ("max_length", "truncation_side", "add_sep_token")}
        cache_dir = str(work_dir / "cache")
        return load_preference_dataset(path, tokenizer, data_type="comparison_pair", cache_dir=cache_dir, **flags)

    def make(contestant: str) -> Trainer:
        first = make_dataset(contestant, dataset.select([0]).to_list(), args)
        return make_trainer(
            contestant, model_path, tokenizer, settings, dataset=first, arguments=trainer_arguments(args)
        )

    records = read_workload(name, args.mode, args.data_dir, work_dir)
    if name == "long_prompts":
        records = lengthen_prompts(records, tokenizer, LONG_PROMPT_TOKENS)
    save_records(work_dir / f"{name}.json", records)
    dataset = load(work_dir / f"{name}.json")
    if args.mode == "scaling":
        return measure_scaling(make, load, records, args, work_dir)
    if args.mode == "training":
        dataset = dataset.select(np.flatnonzero(dataset["num_pairs"]))
    return summarize(race([Contestant(x, make(x)) for x in args.contestants], dataset, args), args.peak_tflops)


@exit_on_input_error
def main() -> None:
    """Measures every workload, prints a table of each, writes the numbers and a figure."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    args = parse_args()
    complete_args(args)
    machine = describe_machine(args)
    print(f"{args.mode} on {machine['device']}, {machine['threads']} threads, {args.dtype}, data of {args.data_dir}")
    summaries = {}
    with tempfile.TemporaryDirectory() as folder:
        model_path = args.model_name_or_path or make_model(args, Path(folder) / "model")
        for name in args.workload:
            summaries[name] = run_workload(name, args, model_path, Path(folder))
            format_summary = format_scaling if args.mode == "scaling" else format_race
            print(f"\n{name}, micro-batches of {args.batch_size}\n\n{format_summary(summaries[name])}", flush=True)
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(args.output_dir / "benchmark.json", {"flags": flags, "machine": machine, "results": summaries})
    key, label = ("items_per_second", "items per second")
    if args.mode == "scaling":
        key, label = ("seconds_per_item", "seconds per item")
    panels = {name: {bar: values[key] for bar, values in rows.items()} for name, rows in summaries.items()}
    plot(args.output_dir / "benchmark.png", panels, label)
    print(f"\nwritten: {args.output_dir / 'benchmark.json'}, {args.output_dir / 'benchmark.png'}")


if __name__ == "__main__":
    main()
