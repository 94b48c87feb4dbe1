"""Measures training steps or scored batches under several ways of batching, side by side in one run.

    python tools/dev/benchmark.py --output_dir outputs/benchmark --threads 2
    python tools/dev/benchmark.py --mode scoring --output_dir outputs/benchmark_scoring --threads 2
    python tools/dev/benchmark.py --mode alignment --output_dir outputs/benchmark_alignment --threads 2

    tree           every prefix that sequences of a batch share is computed once, nothing is padded
    padded         a row per response, padded to the longest of the batch; batches in the order of the data
    padded_sorted  scoring: the same with batches of similar length, as under --batching padded
    reference      the reference's scheme: padded to max_length; an LM head runs and its output is dropped
    trl            training: TRL's RewardTrainer, collator and loss on the same ids (pip install trl==1.16.0)

All have the same weights, data, precision, AdamW and pooling, and run the `training_step` or `predict` of a Trainer,
data loading included; schedule, logging, checkpoints and tokenising are left out. A prompt with several pairs is one
item for `tree`; for the others its pairs are shuffled and accumulated, so that all make the same updates. The learning
rate is 0, so that "check", the mean loss or reward, shows that all compute the same function. The mode `alignment`, of
the LLM, is described in `benchmark_alignment.py`. Linux only. The numbers are explained in docs/performance.md.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process, one card

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from benchmark_alignment import ALIGNMENT_CONTESTANTS, ALIGNMENT_MAX_LENGTH, run_alignment
from benchmark_rounds import draw_rounds, find_files, format_race, summarize
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error, write_json
from apo.figures import plot_bars
from apo.records import load_preference_data
from apo.run_files import git_commit
from apo.tokenizer import RewardTokenizer, load_reward_tokenizer
from apo.tree import choose_attention, common_prefix_length
from arguments import RewardTrainingArguments
from models import RewardSettings, load_config, load_reward_model, resolve_settings
from reward_datasets import RewardDataCollator, preferred_pairs, tokenize_records
from trainer import RewardModelTrainer

REPO_ROOT = Path(__file__).resolve().parents[2]
CONTESTANTS = {
    "training": ["tree", "padded", "reference", "trl"],
    "scoring": ["tree", "padded", "reference", "padded_sorted"],
    "alignment": list(dict.fromkeys(name for names in ALIGNMENT_CONTESTANTS.values() for name in names)),
}
DEFAULT_WORKLOADS = {
    "training": ["hh_pairs", "apo_groups", "long_prompts"],
    "scoring": ["apo_groups"],
    "alignment": list(ALIGNMENT_CONTESTANTS),
}
WORKLOADS = {"hh_pairs": 512, "apo_groups": 512, "long_prompts": 2048}  # and their longest sequences
WORKLOADS |= dict.fromkeys(ALIGNMENT_CONTESTANTS, ALIGNMENT_MAX_LENGTH)
LONG_PROMPT, SHORT_RESPONSE = 1500, 64  # tokens, of long_prompts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
Row = dict[str, Any]  # of `tokenize_records`


def run_tool(name: str, *words: object, **flags: object) -> None:
    """Runs another tool; its error message becomes an `InputError`."""
    words += tuple(word for flag, value in flags.items() for word in (f"--{flag}", value))
    command = [sys.executable, str(REPO_ROOT / "tools" / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))


def make_model(args: argparse.Namespace, output_dir: Path) -> str:
    """Writes a random LLaMA whose tokenizer, at most 32,000 pieces, is trained on the data; returns its path."""
    pairs, _, sampled = find_files(args.data_dir)
    sizes = {"hidden_size": args.hidden_size, "num_layers": args.num_layers, "num_heads": args.hidden_size // 64 or 1}
    sizes |= {"vocab_size": 32000, "max_position_embeddings": args.max_length or max(WORKLOADS.values())}
    run_tool("dev/make_tiny_llama.py", "--corpus", pairs, sampled, **sizes, seed=args.seed, output_dir=output_dir)
    return str(output_dir)


def make_workload(name: str, args: argparse.Namespace, work_dir: Path) -> tuple[Path, str]:
    """The file of a workload and its data type; groups of golden and sampled responses are written to `work_dir`."""
    pairs, golden, sampled = find_files(args.data_dir)
    if args.mode == "scoring" and name != "hh_pairs":
        return sampled, "reject_sample"
    if name != "apo_groups":
        return pairs, "comparison_pair"
    flags = {"golden_data_path": golden, "sample_data_path": sampled, "output_dir": work_dir}
    run_tool("apo_data_converter.py", "--group", apo_data_name="groups", **flags)
    return work_dir / "groups_text_scores.json", "comparison_pair"


def lengthen_prompts(rows: Iterable[Row], num_tokens: int) -> Iterator[Row]:
    """Puts the dialogues of earlier rows before each prompt, so that it has `num_tokens`; short responses only."""
    context: list[int] = []
    for row in rows:
        first, last = min(row["input_ids"]), max(row["input_ids"])  # in sorted order: what they share, all share
        shared = common_prefix_length(np.array(first), np.array(last))
        if len(context) >= num_tokens and row["longest"] - shared <= SHORT_RESPONSE:
            before = context[shared:]
            sizes = {key: row[key] + len(before) for key in ("length", "longest")}
            yield {**row, **sizes, "input_ids": [ids[:1] + before + ids[1:] for ids in row["input_ids"]]}
        context = (context + row["input_ids"][0][1:-1])[-num_tokens:]


class Contestant:
    """A trainer whose model and optimizer are ready to run; counts the tokens that its backbone runs."""

    def __init__(self, name: str, trainer: Trainer, mode: str) -> None:
        self.name, self.trainer = name, trainer
        # As `Trainer.train` does; it is what turns bf16 on.
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        self.num_tokens = self.num_passes = self.operations_per_token = 0
        trainer.model.model.embed_tokens.register_forward_hook(self._count)
        for module_name, module in trainer.model.named_modules():
            if isinstance(module, nn.Linear):
                # A backward pass takes twice a forward pass; that of the dropped LM head does not run.
                passes = 1 if mode == "scoring" or module_name == "lm_head" else 3
                self.operations_per_token += 2 * passes * module.weight.numel()

    def _count(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.num_tokens += args[0].numel()
        self.num_passes += 1


def make_dataset(name: str, groups: list[Row], args: argparse.Namespace) -> Dataset:
    """The rows of a contestant: groups in their order, or their pairs, shuffled, with the preferred sequence first."""
    if args.mode == "scoring" or name == "tree":
        return Dataset.from_list(groups)
    pairs = [(group, pair) for group in groups for pair in preferred_pairs(group["scores"])]
    np.random.default_rng(args.seed).shuffle(pairs)
    rows = []
    for group, pair in pairs:
        ids, scores = ([group[key][i] for i in pair] for key in ("input_ids", "scores"))
        columns = {"chosen_ids": ids[0], "rejected_ids": ids[1]} if name == "trl" else {}
        rows.append({**group, "input_ids": ids, "scores": scores, "num_pairs": 1, **columns})
    return Dataset.from_list(rows)


def pad_to_max_length(collator: RewardDataCollator, max_length: int, items: list[Row]) -> dict[str, Tensor]:
    """The reference's batch: padded to `max_length` unless it is a single item; its dummy responses do not occur."""
    batch = collator(items)
    if len(items) > 1:
        padding = (0, max_length - batch["input_ids"].shape[1])
        batch["input_ids"] = F.pad(batch["input_ids"], padding, value=collator.pad_token_id)
        batch["attention_mask"] = F.pad(batch["attention_mask"], padding)
    return batch


def run_and_drop(lm_head: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook that runs the LM head on all hidden states."""
    lm_head(output.last_hidden_state)


def make_trainer(
    name: str, path: str, tokenizer: RewardTokenizer, settings: RewardSettings, rows: list[Row], args: Any
) -> Trainer:
    """Loads the model of a contestant and builds its trainer; TRL's needs a data set, made of `rows`."""
    flags = {"output_dir": args.output_dir, "use_cpu": DEVICE == "cpu", "bf16": DEVICE == "cuda", "disable_tqdm": True}
    flags |= {f"per_device_{phase}_batch_size": args.batch_size for phase in ("train", "eval")}
    flags |= {"train_sampling_strategy": "sequential", "learning_rate": 0.0}
    batching = "tree" if name == "tree" else "padded"
    config = load_config(path)
    attention = choose_attention(config, batching, torch.device(DEVICE), DTYPE)
    loading = {"seed": args.seed, "with_lm_head": name == "reference", "attention": attention}
    model = load_reward_model(path, config, tokenizer, settings, **loading)
    if name == "trl":
        from trl import RewardConfig, RewardTrainer

        config = LlamaConfig.from_dict({**model.config.to_dict(), "num_labels": 1})
        with torch.device("meta"):
            classifier = LlamaForSequenceClassification(config)
        classifier.model, classifier.score = model.model, model.reward_head
        trl_args = RewardConfig(**flags, max_length=settings.max_length, gradient_checkpointing=False)
        data = {"train_dataset": make_dataset(name, rows, args), "processing_class": tokenizer.hf_tokenizer}
        return RewardTrainer(model=classifier, args=trl_args, **data)
    collator = RewardDataCollator(tokenizer.pad_token_id, batching=batching)
    if name == "reference":
        collator = functools.partial(pad_to_max_length, collator, settings.max_length)
        model.model.register_forward_hook(functools.partial(run_and_drop, model.lm_head))
    training_args = RewardTrainingArguments(**flags, batching=batching)
    trainer = RewardModelTrainer(model=model, args=training_args, data_collator=collator, processing_class=tokenizer)
    if name in ("padded", "reference"):
        trainer.eval_batches = lambda dataset: np.arange(len(dataset)).reshape(-1, args.batch_size).tolist()
    return trainer


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
    num_pairs = [sum(batch["num_pairs"]) for batch in dataset.iter(trainer.args.per_device_train_batch_size)]
    return len(loader) / num_updates * float(np.average([loss.item() for loss in losses], weights=num_pairs))


def peak_memory(*, reset: bool = False) -> int:
    """The most bytes in use since the last reset, on a CPU in the resident set; after a reset, those in use now."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the round needs
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def matrix_rate(num_tokens: int, weight: Tensor) -> float:
    """Operations per second of the plain product (num_tokens, in) x (in, out), over a second or more."""
    weight = weight.detach().to(DTYPE)  # (out, in)
    tensors = {"states": torch.randn(num_tokens, weight.shape[1]).to(weight), "weight": weight}
    product = "torch.nn.functional.linear(states, weight)"
    timer = Timer(product, globals=tensors, num_threads=torch.get_num_threads())
    return 2 * num_tokens * weight.numel() / timer.blocked_autorange(min_run_time=1).median


def measure(contestant: Contestant, groups: list[Row], args: argparse.Namespace) -> dict[str, float]:
    """One timed round of one contestant on some groups, collating and data loading included."""
    dataset = make_dataset(contestant.name, groups, args)
    contestant.num_tokens = contestant.num_passes = 0
    before = peak_memory(reset=True)
    start = time.perf_counter()
    if args.mode == "scoring":
        num_units, unit = sum(len(group["input_ids"]) for group in groups), "response"
        check = float(np.nanmean(contestant.trainer.predict(dataset).predictions[0]))
    else:
        num_units, unit = sum(group["num_pairs"] for group in groups), "pair"
        check = train_round(contestant, dataset, args.num_batches)
    seconds = time.perf_counter() - start  # the check has waited for the device
    return {
        "seconds": seconds,
        "items_per_second": len(groups) / seconds,
        f"tokens_per_{unit}": contestant.num_tokens / num_units,
        "peak_memory_mib": (peak_memory() - before) / 2**20,
        "check": check,
        "operations_per_second": contestant.operations_per_token * contestant.num_tokens / seconds,
    }


def race(contestants: list[Contestant], rounds: list[list[Row]], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Measures round by round, all contestants in turn; the first round is a warm-up. Returns {contestant: rounds}."""
    first = contestants[0]
    weight = first.trainer.model.model.layers[0].mlp.up_proj.weight
    results: dict[str, list[dict]] = {contestant.name: [] for contestant in contestants}
    for groups in tqdm(rounds, unit="round"):
        measured = {contestant.name: measure(contestant, groups, args) for contestant in contestants}
        rate = matrix_rate(first.num_tokens // first.num_passes, weight)
        for name, values in measured.items():
            share = values.pop("operations_per_second") / rate
            results[name].append({**values, "share_of_matrix_rate": share})
    return {name: history[1:] for name, history in results.items()}


def parse_args() -> argparse.Namespace:
    """Reads and checks the command line, and settles the defaults that depend on other flags."""
    data_dir = os.environ.get("HH_DATA_DIR") or str(REPO_ROOT / "data" / "sample")
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for benchmark.json and benchmark.png")
    add("--mode", choices=CONTESTANTS, default="training", help="what to measure (default: training)")
    add("--workload", nargs="+", choices=WORKLOADS, help="default: apo_groups in scoring, else all of the mode")
    add("--contestants", nargs="+", help="the first is compared with the others (default: all, trl if installed)")
    add("--data_dir", default=data_dir, help="default: HH_DATA_DIR, else data/sample")
    add("--model_name_or_path", help="a LLaMA with its tokenizer (default: random, its tokenizer trained on the data)")
    add("--hidden_size", type=int, default=384, help="of the random LLaMA, a head for each 64 (default: 384)")
    add("--num_layers", type=int, default=8, help="of the random LLaMA (default: 8)")
    add("--batch_size", type=at_least(1), default=8, help="items of a micro-batch, prompts of an update (default: 8)")
    add("--max_length", type=int, help="longest sequence (default: 512, long_prompts 2048)")
    add("--num_batches", type=at_least(1), default=2, help="updates, or scored batches, of a round (default: 2)")
    add("--rounds", type=at_least(1), default=5, help="rounds of each contestant (default: 5)")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    add("--seed", type=int, default=42, help="of weights and order (default: 42)")
    args = parser.parse_args()
    args.workload = args.workload or DEFAULT_WORKLOADS[args.mode]
    of_mode = [name for name in WORKLOADS if (name in ALIGNMENT_CONTESTANTS) == (args.mode == "alignment")]
    if not set(args.workload) <= set(of_mode):
        raise InputError(f"--workload {' '.join(args.workload)}: --mode {args.mode} has {', '.join(of_mode)}")
    has_trl = importlib.util.find_spec("trl") is not None
    known = [name for name in CONTESTANTS[args.mode] if has_trl or not name.startswith("trl")]
    args.contestants = args.contestants or known
    if not set(args.contestants) <= set(known):
        raise InputError(f"--contestants {' '.join(args.contestants)}: --mode {args.mode} has {', '.join(known)}")
    for name in args.workload:
        names = ALIGNMENT_CONTESTANTS.get(name, known)
        if not set(args.contestants) & set(names):
            raise InputError(f"--contestants {' '.join(args.contestants)}: --workload {name} has {', '.join(names)}")
    return args


def run_workload(name: str, args: argparse.Namespace, model_path: str, work_dir: Path) -> dict[str, dict[str, Any]]:
    """Loads data and contestants of one workload and measures them."""
    config = load_config(model_path)
    settings = resolve_settings(config, max_length=args.max_length or WORKLOADS[name], pooling_type="eos")
    tokenizer = load_reward_tokenizer(model_path, config, settings.tokenizer_backend)
    records = load_preference_data(*make_workload(name, args, work_dir))
    order = np.random.default_rng(args.seed).permutation(len(records))
    rows = tokenize_records((records[i] for i in order), tokenizer, **settings.sequence_settings)
    if name == "long_prompts":
        rows = lengthen_prompts(rows, min(LONG_PROMPT, settings.max_length - SHORT_RESPONSE))
    if args.mode == "training":
        rows = (row for row in rows if row["num_pairs"])
    rounds = draw_rounds(rows, 1 + args.rounds, args.batch_size * args.num_batches)
    loading = (model_path, tokenizer, settings, rounds[0], args)
    contestants = [Contestant(key, make_trainer(key, *loading), args.mode) for key in args.contestants]
    return summarize(race(contestants, rounds, args))


@exit_on_input_error
def main() -> None:
    """Measures every workload, prints a table of each, writes the numbers and a figure."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    args = parse_args()
    torch.set_num_threads(args.threads)
    packages = {name: version(name) for name in ("torch", "transformers", "trl") if importlib.util.find_spec(name)}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "cpu"
    machine = {"device": device, "dtype": str(DTYPE), "packages": packages, "commit": git_commit()}
    summaries, run = {}, run_alignment if args.mode == "alignment" else run_workload
    with tempfile.TemporaryDirectory() as folder:
        model_path = args.model_name_or_path or make_model(args, Path(folder, "model"))
        for name in args.workload:
            summaries[name] = run(name, args, model_path, Path(folder))
            print(f"\n{name}, micro-batches of {args.batch_size}\n\n{format_race(summaries[name])}", flush=True)
    numbers, figure = (Path(args.output_dir, f"benchmark.{suffix}") for suffix in ("json", "png"))
    write_json(numbers, {"flags": vars(args), "machine": machine, "results": summaries})
    panels = {name: {bar: x["items_per_second"] for bar, x in rows.items()} for name, rows in summaries.items()}
    plot_bars(figure, panels, "items per second")
    print(f"\nwritten: {numbers}, {figure}")


if __name__ == "__main__":
    main()
