"""Trains, evaluates or scores with a reward model.

    python train.py --config configs/runs/sample_rm_base.yaml --output_dir outputs/rm_base
    torchrun --nproc_per_node=8 train.py --config configs/runs/llama7b_rm_apo.yaml

`configs/runs/` has a file for every run of the paper; `python train.py --help` lists every flag.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apo.cli import exit_on_input_error, sha256_of_file, write_json
from apo.launch import exit_worker, prepare_deepspeed, set_ranks_of_one_process, setup_logging
from apo.run_state import start_evaluation, start_training, weights_depend_on
from reward_datasets import RewardDataCollator, load_preference_dataset, merge_training_data, name_datasets

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from apo.tokenizer import RewardTokenizer
    from arguments import DataArguments, RewardTrainingArguments
    from trainer import RewardModelTrainer

logger = logging.getLogger("train")


def log_example(dataset: datasets.Dataset, tokenizer: RewardTokenizer) -> None:
    """Logs the first item as the model sees it."""
    item = dataset[0]
    for ids, score in zip(item["input_ids"], item["scores"], strict=True):
        logger.info("example, normalised score %.3f, %d tokens: %r", score, len(ids), tokenizer.decode(ids))


def load_data(
    data_args: DataArguments,
    args: RewardTrainingArguments,
    eval_paths: dict[str, str],
    tokenizer: RewardTokenizer,
    **sequence_settings: Any,
) -> tuple[datasets.Dataset | None, dict[str, datasets.Dataset]]:
    """Returns the training data, None without training, and {name: data} of the evaluation files {name: path}."""
    from apo.flags import check_training, check_types

    load = functools.partial(
        load_preference_dataset,
        tokenizer=tokenizer,
        data_type=data_args.data_type,
        response_keys=data_args.response_keys,
        cache_dir=data_args.cache_dir,
        num_records=args.num_records,
        **sequence_settings,
    )
    train_set = None
    if args.do_train:
        train_set = merge_training_data({path: load(path) for path in data_args.train_data_path})
        check_training(args, train_set)
        check_types(args, train_set)
        log_example(train_set, tokenizer)
    return train_set, {name: load(path) for name, path in eval_paths.items()}


def list_rewards(query_ids: Sequence[str], rewards: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Returns rewards and normalised scores (B, R) as a record for each item, without absent responses."""
    return [
        {"query_id": query_id, "rewards": own[present].tolist(), "scores": preferences[present].tolist()}
        for query_id, own, preferences in zip(query_ids, rewards, scores, strict=True)
        for present in [preferences >= 0]
    ]


def evaluate(trainer: RewardModelTrainer) -> dict[str, dict[str, float]]:
    """Evaluates each set under its own name, writes and prints the results; returns {name: metrics}."""
    from apo.evaluation import evaluate_all
    from apo.figures import save_calibration
    from apo.run_files import format_results
    from trainer import calibration_curve

    args = trainer.args
    origin = trainer.model.head_origin
    is_random = origin.startswith("init") and not args.do_train
    outputs = evaluate_all(trainer, **({"reward_head": origin} if is_random else {}))
    results = {name: output.metrics for name, output in outputs.items()}
    if trainer.is_world_process_zero():
        rewards_of = {}
        for name, output in outputs.items():
            rewards, scores = output.predictions[0], output.label_ids[0]
            rewards_of[name] = list_rewards(trainer.eval_dataset[name]["query_id"], rewards, scores)
            if args.save_calibration:
                curves = {bins: calibration_curve(rewards, scores, bins) for bins in args.calibration_bins}
                save_calibration(args.output_dir, name, curves)
        write_json(os.path.join(args.output_dir, "eval_rewards.json"), rewards_of)
        print(format_results({os.path.basename(os.path.normpath(args.output_dir)): results}, args.calibration_bins[0]))
    return results


@exit_on_input_error
def main() -> None:
    """Runs the command line."""
    with contextlib.ExitStack() as stack:  # the lock and the recorded state of a training run
        run(stack)


def run(stack: contextlib.ExitStack) -> None:
    """Parse -> data -> model -> trainer -> train, evaluate, score -> save; the caller closes `stack`."""
    setup_logging()
    from arguments import build_arguments, parse_flags

    flags = parse_flags()
    if flags.deepspeed:
        set_ranks_of_one_process()
    model_args, data_args, args = build_arguments(flags)

    # The rest of the heavy imports, once the command line is known to be right.
    import torch

    from apo.evaluation import dtype_of_computation
    from apo.figures import plot_training_curves
    from apo.resumable import train_and_save
    from apo.resume import model_version
    from apo.run_files import write_manifest, write_model_card
    from apo.scoring import name_score_files, score_dataset
    from apo.tokenizer import load_reward_tokenizer
    from apo.tree import batching_of, choose_attention
    from models import load_config, load_reward_model, resolve_settings
    from trainer import RewardModelTrainer

    # ---- what scoring must repeat: flags, or what the checkpoint records
    model_path = model_args.model_name_or_path
    config = load_config(model_path)
    names = ("pooling_type", "max_length", "truncation_side", "add_sep_token", "tokenizer_backend")
    settings = resolve_settings(config, **{name: getattr(model_args, name) for name in names})
    tokenizer = load_reward_tokenizer(model_args.tokenizer_path or model_path, config, settings.tokenizer_backend)
    settings.sep_token_id = tokenizer.sep_token_id

    # ---- data
    data_paths = name_datasets(data_args.eval_data_path)
    train_set, eval_sets = load_data(data_args, args, data_paths, tokenizer, **settings.sequence_settings)
    if args.task_type == "inference":
        score_paths = name_score_files(args.output_dir, list(eval_sets), data_args.data_suffix)

    # ---- where training starts
    if args.deepspeed:
        prepare_deepspeed(args.device.type)
    version = model_version(model_path, getattr(config, "_commit_hash", None)) if args.process_index == 0 else None
    rewards_depend_on = {"model": version, "tokenizer": tokenizer.fingerprint, **asdict(settings)}
    depends_on: dict[str, Any] = {}
    if args.do_train:
        more = {"dtype": model_args.storage, "lora": args.lora, "num_processes": args.world_size}
        paths = data_args.train_data_path, data_args.eval_data_path
        depends_on = weights_depend_on(args.to_dict(), *paths, **rewards_depend_on, **more)
        if not start_training(args, depends_on, paths[1], stack):
            return
    elif args.task_type != "inference":
        start_evaluation(args, model_path, stack)

    # ---- model
    dtype = getattr(torch, model_args.dtype)
    compute_dtype = dtype_of_computation(args, dtype)
    attention = choose_attention(config, args.batching, args.device, compute_dtype)
    loading = {"seed": args.seed, "dtype": dtype, "attention": attention, "will_train": args.do_train}
    loading |= {"with_lm_head": args.lm_loss_coeff > 0, "needs_trained_head": args.task_type == "inference"}
    loading |= {"lora": args.lora, "load_in_4bit": model_args.load_in_4bit}
    model = load_reward_model(model_path, config, tokenizer, settings, **loading)

    # ---- trainer
    batching = batching_of(attention)
    trainer = RewardModelTrainer(
        model=model,
        args=args,
        data_collator=RewardDataCollator(tokenizer.pad_token_id, model_args.padding_side, batching),
        train_dataset=train_set,
        eval_dataset=eval_sets or None,
        processing_class=tokenizer,
    )
    trainer.depends_on = depends_on
    is_main = trainer.is_world_process_zero()
    if is_main:
        arguments = {**asdict(model_args), **asdict(data_args), **args.to_dict(), "world_size": args.world_size}
        write_manifest(args.output_dir, arguments, [*data_args.train_data_path, *data_args.eval_data_path])

    # ---- train, then evaluate; or score
    if args.do_train:
        train_and_save(trainer)
    if args.task_type == "inference":
        rewards_depend_on |= {"model_name_or_path": model_path, "deepspeed": bool(args.deepspeed)}
        rewards_depend_on |= {"dtype": [model_args.storage, str(compute_dtype)], "keys": data_args.response_keys}
        rewards_depend_on |= {"attention": [attention, model_args.padding_side], "data_type": data_args.data_type}
        for name, path in data_paths.items():
            inputs = {"data_sha256": sha256_of_file(path), **rewards_depend_on}
            score_dataset(trainer, eval_sets[name], score_paths[name], inputs)
    else:
        results = evaluate(trainer) if eval_sets else {}
        if args.do_train and is_main:
            plot_training_curves(args.output_dir, trainer.state.log_history)
            write_model_card(args.output_dir, model_path, asdict(settings), results)
            print(f"model and results: {args.output_dir}; train.py --task_type inference scores with this model")
    trainer.end()


if __name__ == "__main__":
    main()
    exit_worker()
