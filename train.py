"""Trains, evaluates or scores with a reward model.

    torchrun --nproc_per_node=2 train.py --task_type apo --do_train True --use_cpu true \\
        --model_name_or_path <llama> --train_data_path <human pairs> <golden-over-sampled pairs> \\
        --eval_data_path <test> --apo_loss_coeff 0.1 --apo_sample_num 4 --output_dir <folder>

See README.md for the three reward models of the paper, and `python train.py --help` for every flag.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from apo.cli import InputError, exit_on_input_error, sha256_of_file, write_json
from apo.launch import end_distributed, prepare_deepspeed, set_ranks_of_one_process, setup_logging
from reward_datasets import RewardDataCollator, load_preference_dataset, name_datasets

if TYPE_CHECKING:
    import datasets

    from apo.tokenizer import RewardTokenizer
    from trainer import RewardModelTrainer

logger = logging.getLogger("train")

NUM_DEBUG_RECORDS = 64


def merge_training_data(parts: list[datasets.Dataset], paths: list[str]) -> datasets.Dataset:
    """Concatenates the training files, in order.

    Raises:
        InputError: there is nothing to learn, because no item has two different scores.
    """
    import datasets

    for path, part in zip(paths, parts, strict=True):
        if not any(part["num_pairs"]):
            raise InputError(
                f'{path}: field "scores": found equal scores within each of the {len(part)} records, '
                "expected at least one preferred response"
            )
    return datasets.concatenate_datasets(parts)


def log_example(dataset: datasets.Dataset, tokenizer: RewardTokenizer) -> None:
    """Logs the first item as the model sees it."""
    item = dataset[0]
    for ids, score in zip(item["input_ids"], item["scores"], strict=True):
        logger.info("example, normalised score %.3f, %d tokens: %r", score, len(ids), tokenizer.decode(ids))


def evaluate_all(trainer: RewardModelTrainer, eval_sets: dict[str, datasets.Dataset]) -> dict[str, dict[str, float]]:
    """Evaluates each set under its own name and writes the results; returns {name: metrics}."""
    from apo.figures import save_calibration
    from apo.run_files import write_results
    from trainer import calibration_curve

    args = trainer.args
    results = {}
    for name, eval_set in eval_sets.items():
        output = trainer.predict(eval_set, metric_key_prefix=f"eval_{name}")
        logs = dict(output.metrics)
        trainer.log(logs)
        results[name] = {metric: logs[metric] for metric in output.metrics if metric in logs}
        if args.save_calibration and trainer.is_world_process_zero():
            rewards, scores = output.predictions[0], output.label_ids[0]
            curves = {bins: calibration_curve(rewards, scores, bins) for bins in args.calibration_bins}
            save_calibration(args.output_dir, name, curves)
    if trainer.is_world_process_zero():
        write_json(os.path.join(args.output_dir, "final_eval_results.json"), results)
        write_results(args.output_dir, "eval", {key: value for r in results.values() for key, value in r.items()})
    return results


@exit_on_input_error
def main() -> None:
    """Parse -> data -> model -> trainer -> train, evaluate, score -> save."""
    setup_logging()
    from arguments import build_arguments, parse_flags

    flags = parse_flags()
    if flags.deepspeed:
        set_ranks_of_one_process()
    model_args, data_args, args = build_arguments(flags)

    # The rest of the heavy imports, once the command line is known to be right.
    import torch

    from apo.figures import plot_training_curves
    from apo.resume import model_version
    from apo.run_files import write_manifest, write_model_card, write_results
    from apo.scoring import check_query_ids, name_score_files, score_dataset
    from apo.tokenizer import load_reward_tokenizer
    from apo.tree import TREE_ATTENTIONS, choose_attention
    from models import load_config, load_reward_model, resolve_settings
    from trainer import RewardModelTrainer

    # ---- what scoring must repeat: flags, or what the checkpoint records
    config = load_config(model_args.model_name_or_path)
    settings = resolve_settings(
        config,
        pooling_type=model_args.pooling_type,
        max_length=model_args.max_length,
        truncation_side=model_args.truncation_side,
        add_sep_token=model_args.add_sep_token,
        tokenizer_backend=model_args.tokenizer_backend,
    )
    tokenizer_path = model_args.tokenizer_path or model_args.model_name_or_path
    tokenizer = load_reward_tokenizer(tokenizer_path, config, settings.tokenizer_backend)
    settings.sep_token_id = tokenizer.sep_token_id

    # ---- data
    def load(path: str) -> datasets.Dataset:
        dataset = load_preference_dataset(
            path,
            tokenizer,
            data_type=data_args.data_type,
            max_length=settings.max_length,
            truncation_side=settings.truncation_side,
            add_sep_token=settings.add_sep_token,
            cache_dir=data_args.cache_dir,
        )
        return dataset.select(range(min(len(dataset), NUM_DEBUG_RECORDS))) if args.debug_mode else dataset

    train_set = None
    if args.do_train:
        train_parts = [load(path) for path in data_args.train_data_path]
        train_set = merge_training_data(train_parts, data_args.train_data_path)
        log_example(train_set, tokenizer)
    data_paths = name_datasets(data_args.eval_data_path)
    eval_sets = {name: load(path) for name, path in data_paths.items()}
    if args.task_type == "inference":
        score_paths = name_score_files(args.output_dir, list(eval_sets), data_args.data_suffix)
        if data_args.data_type == "reject_sample":
            for name, eval_set in eval_sets.items():
                check_query_ids(data_paths[name], eval_set["query_id"][:])

    # ---- model
    if args.deepspeed:
        prepare_deepspeed(args.device.type)
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else getattr(torch, model_args.dtype)
    attention = choose_attention(config, args.batching, args.device, compute_dtype)
    model, head_loaded = load_reward_model(
        model_args.model_name_or_path,
        config,
        tokenizer,
        settings,
        seed=args.seed,
        with_lm_head=args.lm_loss_coeff > 0,
        dtype=getattr(torch, model_args.dtype),
        attention=attention,
    )
    if args.task_type == "inference" and not head_loaded:
        raise InputError(
            f"{model_args.model_name_or_path}: found no reward head (reward_head.weight), so scores would be random; "
            "give a trained reward model"
        )

    # ---- trainer
    trainer = RewardModelTrainer(
        model=model,
        args=args,
        data_collator=RewardDataCollator(
            tokenizer.pad_token_id, model_args.padding_side, "tree" if attention in TREE_ATTENTIONS else "padded"
        ),
        train_dataset=train_set,
        eval_dataset=eval_sets or None,
        processing_class=tokenizer,
    )
    assert bool(args.deepspeed) == trainer.is_deepspeed_enabled, "the DeepSpeed config was dropped"
    if trainer.is_world_process_zero():
        arguments = {**asdict(model_args), **asdict(data_args), **args.to_dict(), "world_size": args.world_size}
        write_manifest(args.output_dir, arguments, [*data_args.train_data_path, *data_args.eval_data_path])

    # ---- train
    if args.do_train:
        train_metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            write_results(args.output_dir, "train", train_metrics)

    # ---- score, or evaluate
    if args.task_type == "inference":
        rewards_depend_on = {
            "model": model_version(model_args.model_name_or_path, getattr(config, "_commit_hash", None)),
            "tokenizer": tokenizer.fingerprint,
            **asdict(settings),
            "dtype": [model_args.dtype, str(compute_dtype)],
            "attention": [attention, model_args.padding_side],
            "deepspeed": bool(args.deepspeed),
            "data_type": data_args.data_type,
        }
        for name, path in data_paths.items():
            inputs = {"data_sha256": sha256_of_file(path), **rewards_depend_on}
            score_dataset(trainer, eval_sets[name], score_paths[name], inputs)
    else:
        results = evaluate_all(trainer, eval_sets) if eval_sets else {}
        if args.do_train and trainer.is_world_process_zero():
            plot_training_curves(args.output_dir, trainer.state.log_history)
            write_model_card(args.output_dir, model_args.model_name_or_path, asdict(settings), results)
    trainer.end()
    end_distributed()


if __name__ == "__main__":
    main()
