"""Measures training steps or scored batches under several ways of batching, side by side in one run.

    python tools/dev/benchmark.py --output_dir outputs/benchmark --threads 2
    python tools/dev/benchmark.py --mode scoring --output_dir outputs/benchmark_scoring --threads 2

The contestants have the same weights, data, precision, optimizer and pooling (last token):

    tree           ours: every shared prefix of a batch is computed once, nothing is padded
    padded         a row per response, padded to the longest of the batch; batches in the order of the data
    padded_groups  training: the same on whole groups; a response that several pairs share is one row
    padded_sorted  scoring: ours with --batching padded, which batches responses of similar length
    reference      the reference's scheme: padded to max_length; an LM head runs and its output is dropped
    trl            training: TRL's RewardTrainer, collator and loss on the same ids (pip install trl==1.16.0)

Each is a transformers Trainer with its own data loader, collator, `training_step`, AdamW, clipping and update; scoring
is `Trainer.predict`. Schedule, logging, checkpoints and tokenising are left out. A prompt with several pairs is one
item for `tree` and several, shuffled and accumulated, for the others: all make the same updates from the same pairs.
The contestants take turns in every round; a ratio is the median of the ratios within a round. The learning rate is 0,
so the weights stay equal and "check", the mean loss or reward, shows that all compute the same function.

"Of matrix rate" is the rate of a contestant's matrix products over that of a plain product of the model's shape and
dtype, measured in the same round. It counts 2 operations per weight of a linear layer and token run, times 3 in
training. Attention, optimizer and data loading add time but no operations, so it is a lower bound. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib.util
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process, one card

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, PrinterCallback, Trainer

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error, write_json
from apo.figures import plot_bars
from apo.records import load_preference_data
from apo.run_files import format_table, git_commit
from apo.tokenizer import RewardTokenizer, load_reward_tokenizer
from apo.tree import choose_attention, common_prefix_length
from arguments import RewardTrainingArguments
from models import RewardSettings, load_config, load_reward_model, resolve_settings
from reward_datasets import RewardDataCollator, preferred_pairs, tokenize_records
from trainer import RewardModelTrainer

REPO_ROOT = Path(__file__).resolve().parents[2]
CONTESTANTS = {
    "training": ("tree", "padded", "reference", "trl", "padded_groups"),
    "scoring": ("tree", "padded", "reference", "padded_sorted"),
}
WORKLOADS = {"hh_pairs": 512, "apo_groups": 512, "long_prompts": 2048}  # and their longest sequences
LONG_PROMPT, SHORT_RESPONSE = 1500, 64  # tokens, of long_prompts
COLUMNS = {
    "items_per_second": ("items/s", ".2f"),
    "tokens_per_pair": ("tokens/pair", ".0f"),
    "tokens_per_response": ("tokens/response", ".0f"),
    "peak_memory_mib": ("peak MiB", ",.0f"),
    "share_of_matrix_rate": ("of matrix rate", ".1%"),
    "check": ("check", ".5f"),
}
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


def find_files(data_dir: Path) -> tuple[Path, Path, Path]:
    """The files of an hh-split folder: human pairs, golden responses, sampled responses."""
    folder = data_dir / "rm_data"
    sampled = sorted(folder.glob("hh_split_rm_*.sample.json"))
    if not sampled:
        raise InputError(f"{data_dir}: found no rm_data/hh_split_rm_*.sample.json; expected the hh-split layout")
    return folder / "hh_split_rm.train.json", folder / "hh_split_rm.golden.json", sampled[0]


def write_workload(name: str, mode: str, data_dir: Path, work_dir: Path) -> tuple[Path, str]:
    """Returns the file of a workload and its data type; groups of golden and sampled responses are made first."""
    pairs, golden, sampled = find_files(data_dir)
    if name == "hh_pairs" or (name == "long_prompts" and mode == "training"):
        return pairs, "comparison_pair"
    if mode == "scoring":
        return sampled, "reject_sample"
    flags = {"golden_data_path": golden, "sample_data_path": sampled, "output_dir": work_dir}
    run_tool("apo_data_converter.py", "--group", apo_data_name="groups", **flags)
    return work_dir / "groups_text_scores.json", "comparison_pair"


def lengthen_prompts(rows: Iterable[Row], num_tokens: int) -> Iterator[Row]:
    """Puts the dialogues of earlier rows before each prompt, so that it has `num_tokens`; short responses only."""
    context: list[int] = []
    for row in rows:
        first, *others = map(np.array, row["input_ids"])
        shared = min((common_prefix_length(first, other) for other in others), default=len(first))
        if len(context) >= num_tokens and row["longest"] - shared <= SHORT_RESPONSE:
            before = context[len(context) - max(0, num_tokens - shared) :]
            sizes = {key: row[key] + len(before) for key in ("length", "longest")}
            yield {**row, **sizes, "input_ids": [ids[:1] + before + ids[1:] for ids in row["input_ids"]]}
        context = (context + row["input_ids"][0][1:-1])[-num_tokens:]


def split_pairs(group: Row) -> list[Row]:
    """The pairs of a row, each a row of its own with the preferred sequence first."""
    ids, scores = group["input_ids"], group["scores"]
    return [
        {**group, "input_ids": [ids[i], ids[j]], "scores": [scores[i], scores[j]], "num_pairs": 1}
        for i, j in preferred_pairs(scores)
    ]


def draw_rounds(rows: Iterable[Row], num_rounds: int, num_items: int) -> list[list[Row]]:
    """Divides rows into rounds of `num_items`; rounds are repeated only if there are too few rows."""
    drawn = list(itertools.islice(rows, num_rounds * num_items))
    if len(drawn) < num_items:
        raise InputError(f"--batch_size, --num_batches: found {len(drawn)} items, expected {num_items}; lower one")
    rounds = [drawn[i : i + num_items] for i in range(0, len(drawn) - num_items + 1, num_items)]
    return list(itertools.islice(itertools.cycle(rounds), num_rounds))


# ------------------------------------------------------------------------------------------------ contestants


class Contestant:
    """A trainer whose model and optimizer are ready to run; counts the tokens that its backbone runs."""

    def __init__(self, name: str, trainer: Trainer, mode: str) -> None:
        self.name, self.trainer = name, trainer
        # As `Trainer.train` does; it is what turns bf16 on.
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        self.num_tokens = self.num_passes = 0
        trainer.model.model.embed_tokens.register_forward_hook(self._count)
        linear = {name: x.weight for name, x in trainer.model.named_modules() if isinstance(x, nn.Linear)}
        # A backward pass takes twice a forward pass; that of the dropped LM head does not run.
        passes = {name: 1 if mode == "scoring" or name == "lm_head" else 3 for name in linear}
        self.operations_per_token = sum(2 * passes[name] * weight.numel() for name, weight in linear.items())

    def _count(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.num_tokens += args[0].numel()
        self.num_passes += 1


def make_dataset(name: str, groups: list[Row], args: argparse.Namespace) -> Dataset:
    """The rows of a contestant: groups in their order, or their pairs, shuffled."""
    if args.mode == "scoring" or name in ("tree", "padded_groups"):
        return Dataset.from_list(groups)
    pairs = [pair for group in groups for pair in split_pairs(group)]
    np.random.default_rng(args.seed).shuffle(pairs)
    if name == "trl":
        pairs = [{**x, "chosen_ids": x["input_ids"][0], "rejected_ids": x["input_ids"][1]} for x in pairs]
    return Dataset.from_list(pairs)


def make_trainer(
    name: str, path: str, tokenizer: RewardTokenizer, settings: RewardSettings, rows: list[Row], args: Any
) -> Trainer:
    """Loads the model of a contestant and builds its trainer; TRL's needs a data set, made of `rows`."""
    flags = {
        "output_dir": str(args.output_dir),
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.0,
        "use_cpu": DEVICE == "cpu",
        "bf16": DEVICE == "cuda",
        "disable_tqdm": True,
    }
    batching = "tree" if name == "tree" else "padded"
    config = load_config(path)
    attention = choose_attention(config, batching, torch.device(DEVICE), DTYPE)
    loading = {"seed": args.seed, "with_lm_head": name == "reference", "attention": attention}
    model = load_reward_model(path, config, tokenizer, settings, **loading)
    if name == "trl":
        dataset = make_dataset(name, rows, args)
        return make_trl_trainer(model, tokenizer, dataset, {**flags, "max_length": settings.max_length})
    collator = RewardDataCollator(tokenizer.pad_token_id, batching=batching)
    if name == "reference":
        # Its dummy responses do not occur: the items of a workload have equally many responses.
        collator = functools.partial(pad_to_max_length, collator, settings.max_length)
        model.model.register_forward_hook(functools.partial(run_and_drop, model.lm_head))
    training_args = RewardTrainingArguments(**flags, batching=batching)
    trainer = RewardModelTrainer(model=model, args=training_args, data_collator=collator, processing_class=tokenizer)
    if name in ("padded", "reference"):
        trainer.eval_batches = lambda dataset: np.arange(len(dataset)).reshape(-1, args.batch_size).tolist()
    trainer.remove_callback(PrinterCallback)
    return trainer


def pad_to_max_length(collator: RewardDataCollator, max_length: int, items: list[Row]) -> dict[str, Tensor]:
    """The reference's batch: padded to `max_length` unless it is a single item."""
    batch = collator(items)
    if len(items) > 1:
        for key, value in (("input_ids", collator.pad_token_id), ("attention_mask", 0)):
            batch[key] = F.pad(batch[key], (0, max_length - batch[key].shape[1]), value=value)
    return batch


def run_and_drop(lm_head: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook that runs the LM head on all hidden states."""
    lm_head(output.last_hidden_state)


def make_trl_trainer(
    model: PreTrainedModel, tokenizer: RewardTokenizer, dataset: Dataset, flags: dict[str, Any]
) -> Trainer:
    """TRL's trainer on a sequence classifier that takes over the weights of a reward model."""
    from trl import RewardConfig, RewardTrainer

    config = LlamaConfig.from_dict({**model.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        classifier = LlamaForSequenceClassification(config)
    classifier.model, classifier.score = model.model, model.reward_head
    args = RewardConfig(**flags, gradient_checkpointing=False)
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
    num_pairs = [sum(batch["num_pairs"]) for batch in dataset.iter(trainer.args.per_device_train_batch_size)]
    return len(loader) / num_updates * float(np.average([loss.item() for loss in losses], weights=num_pairs))


def memory_level(*, reset: bool = False) -> int:
    """Bytes in use, on a CPU the resident set: the most since the last reset, or, on a reset, those of now."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the round needs
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def matrix_rate(num_tokens: int, weight: Tensor) -> float:
    """Operations per second of the plain product (num_tokens, in) x (in, out): the median over a second or more."""
    weight = weight.detach().to(DTYPE)  # (out, in)
    states = torch.randn(num_tokens, weight.shape[1], device=DEVICE, dtype=DTYPE)
    seconds: list[float] = []
    while sum(seconds) < 1.0:
        start = time.perf_counter()
        F.linear(states, weight)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * num_tokens * weight.numel() / float(np.median(seconds))


def measure(contestant: Contestant, groups: list[Row], args: argparse.Namespace) -> dict[str, float]:
    """One timed round of one contestant on some groups, collating and data loading included."""
    dataset = make_dataset(contestant.name, groups, args)
    contestant.num_tokens = contestant.num_passes = 0
    before = memory_level(reset=True)
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
        "peak_memory_mib": (memory_level() - before) / 2**20,
        "tflops_per_second": contestant.operations_per_token * contestant.num_tokens / seconds / 1e12,
        "check": check,
    }


def race(contestants: list[Contestant], rounds: list[list[Row]], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Measures round by round, all contestants in turn; the first round is a warm-up. Returns {contestant: rounds}."""
    history, first = [], contestants[0]
    weight = first.trainer.model.model.layers[0].mlp.up_proj.weight
    for i, groups in enumerate(rounds):
        measured = {contestant.name: measure(contestant, groups, args) for contestant in contestants}
        rate = matrix_rate(first.num_tokens // first.num_passes, weight) / 1e12
        for values in measured.values():
            values |= {"matrix_tflops_per_second": rate, "share_of_matrix_rate": values["tflops_per_second"] / rate}
        history.append(measured)
        speeds = ", ".join(f"{name} {values['items_per_second']:.3g}" for name, values in measured.items())
        print(f"round {i} of {args.rounds}: {speeds} items/s" if i else "warm-up done", file=sys.stderr)
    return {name: [measured[name] for measured in history[1:]] for name in history[0]}


def summarize(results: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and the ratio of the seconds to those of the first contestant, within each round."""
    base, *_ = results.values()
    summary = {}
    for name, rounds in results.items():
        ratios = [r["seconds"] / b["seconds"] for r, b in zip(rounds, base, strict=True)]
        summary[name] = {
            **{key: float(np.median([r[key] for r in rounds])) for key in rounds[0]},
            "first_is_faster": float(np.median(ratios)),
            "first_is_faster_range": [min(ratios), max(ratios)],
            "rounds": rounds,
        }
    return summary


def format_race(summary: dict[str, dict[str, Any]]) -> str:
    """The table of one workload."""
    first, *_ = summary
    columns = {key: column for key, column in COLUMNS.items() if key in summary[first]}
    rows = []
    for name, values in summary.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(values["first_is_faster"], *values["first_is_faster_range"])
        rows.append((name, *(format(values[key], spec) for key, (_, spec) in columns.items()), ratio))
    return format_table(("contestant", *(title for title, _ in columns.values()), f"{first} is faster by"), rows)


def parse_args() -> argparse.Namespace:
    """Reads and checks the command line, and settles the defaults that depend on other flags."""
    data_dir = os.environ.get("HH_DATA_DIR") or REPO_ROOT / "data" / "sample"
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for benchmark.json and benchmark.png")
    add("--mode", choices=CONTESTANTS, default="training", help="what to measure (default: training)")
    add("--workload", nargs="+", choices=WORKLOADS, help="default: all in training, apo_groups in scoring")
    add("--contestants", nargs="+", help="the first is compared with the others (default: all but padded_groups)")
    add("--data_dir", type=Path, default=Path(data_dir), help="default: HH_DATA_DIR, else data/sample")
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
    torch.set_num_threads(args.threads)
    args.workload = args.workload or (["apo_groups"] if args.mode == "scoring" else list(WORKLOADS))
    known = list(CONTESTANTS[args.mode])
    if "trl" in known and not importlib.util.find_spec("trl"):
        print("trl is left out: it is not installed (pip install trl==1.16.0)")
        known.remove("trl")
    args.contestants = args.contestants or [name for name in known if name != "padded_groups"]
    if not set(args.contestants) <= set(known):
        raise InputError(f"--contestants {' '.join(args.contestants)}: --mode {args.mode} has {', '.join(known)}")
    return args


def run_workload(name: str, args: argparse.Namespace, model_path: str, work_dir: Path) -> dict[str, dict[str, Any]]:
    """Loads data and contestants of one workload and measures them."""
    config = load_config(model_path)
    settings = resolve_settings(config, max_length=args.max_length or WORKLOADS[name], pooling_type="eos")
    tokenizer = load_reward_tokenizer(model_path, config, settings.tokenizer_backend)
    settings.sep_token_id = tokenizer.sep_token_id
    records = load_preference_data(*write_workload(name, args.mode, args.data_dir, work_dir))
    order = np.random.default_rng(args.seed).permutation(len(records))
    rows = tokenize_records((records[i] for i in order), tokenizer, **settings.sequence_settings)
    if name == "long_prompts":
        rows = lengthen_prompts(rows, min(LONG_PROMPT, settings.max_length - SHORT_RESPONSE))
    if args.mode == "training":
        rows = (row for row in rows if row["num_pairs"])
    rounds = draw_rounds(rows, 1 + args.rounds, args.batch_size * args.num_batches)
    contestants = []
    for contestant in args.contestants:
        trainer = make_trainer(contestant, model_path, tokenizer, settings, rounds[0], args)
        contestants.append(Contestant(contestant, trainer, args.mode))
    return summarize(race(contestants, rounds, args))


def make_model(args: argparse.Namespace, output_dir: Path) -> str:
    """Writes a random LLaMA whose tokenizer, at most 32,000 pieces, is trained on the data; returns its path."""
    pairs, _, sampled = find_files(args.data_dir)
    sizes = {"hidden_size": args.hidden_size, "num_layers": args.num_layers, "num_heads": args.hidden_size // 64 or 1}
    longest = args.max_length or max(WORKLOADS.values())
    flags = {"vocab_size": 32000, "max_position_embeddings": longest, "seed": args.seed, "output_dir": output_dir}
    run_tool("dev/make_tiny_llama.py", "--corpus", pairs, sampled, **sizes, **flags)
    return str(output_dir)


@exit_on_input_error
def main() -> None:
    """Measures every workload, prints a table of each, writes the numbers and a figure."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    args = parse_args()
    machine = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "cpu",
        "dtype": str(DTYPE).removeprefix("torch."),
        "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": git_commit(),
    }
    print(f"{args.mode} on {machine['device']}, {args.threads} threads, {machine['dtype']}, data of {args.data_dir}")
    summaries = {}
    with tempfile.TemporaryDirectory() as folder:
        model_path = args.model_name_or_path or make_model(args, Path(folder) / "model")
        for name in args.workload:
            summaries[name] = run_workload(name, args, model_path, Path(folder))
            print(f"\n{name}, micro-batches of {args.batch_size}\n\n{format_race(summaries[name])}", flush=True)
    flags = {**vars(args), "output_dir": str(args.output_dir), "data_dir": str(args.data_dir)}
    write_json(args.output_dir / "benchmark.json", {"flags": flags, "machine": machine, "results": summaries})
    panels = {name: {bar: x["items_per_second"] for bar, x in rows.items()} for name, rows in summaries.items()}
    plot_bars(args.output_dir / "benchmark.png", panels, "items per second")
    print(f"\nwritten: {args.output_dir / 'benchmark.json'}, {args.output_dir / 'benchmark.png'}")


if __name__ == "__main__":
    main()
