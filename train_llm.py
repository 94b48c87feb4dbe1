"""Aligns an LLM on scored responses, by rejection sampling (RJS), DPO, RRHF or on golden responses (SFT).

    python train_llm.py --model_name_or_path outputs/llm --align_type dpo --do_train True \\
        --train_data_path outputs/rejection_sampling/best_text_scores.json --output_dir outputs/llm_1
    torchrun --nproc_per_node=8 train_llm.py --config llm.yaml

The result is a folder of transformers, which `AutoModelForCausalLM` and `tools/inference_llm.py` load.
`python train_llm.py --help` lists every flag.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apo.cli import InputError, exit_on_input_error
from apo.launch import exit_worker, prepare_deepspeed, set_ranks_of_one_process, setup_logging
from apo.run_state import start_evaluation, start_training, weights_depend_on
from reward_datasets import name_datasets

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from apo.policy import PolicyTrainer
    from arguments import CommonTrainingArguments
    from llm_arguments import LLMArguments, LLMDataArguments

logger = logging.getLogger("train_llm")


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, llm_args: LLMArguments) -> None:
    """Refuses a reference model with another vocabulary, which would read other texts from the same ids."""
    from apo.sampling import load_tokenizer

    reference = load_tokenizer(llm_args.reference_model, "plain")
    if reference.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--reference_model {llm_args.reference_model}: its vocabulary is another than that of "
            f"{llm_args.model_name_or_path}; expected an earlier state of the same model"
        )


def load_data(
    llm_args: LLMArguments,
    data_args: LLMDataArguments,
    args: CommonTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    eval_paths: dict[str, str],
) -> tuple[datasets.Dataset | None, dict[str, datasets.Dataset]]:
    """Returns the training data, None without training, and {name: data} of the evaluation files {name: path}."""
    import datasets

    from apo.flags import check_training
    from apo.policy_data import load_policy_dataset

    load = functools.partial(
        load_policy_dataset,
        tokenizer=tokenizer,
        align_type=llm_args.align_type,
        template=llm_args.prompt_template,
        max_length=llm_args.max_length,
        cache_dir=data_args.cache_dir,
        num_records=args.num_records,
    )
    train_set = None
    if args.do_train:
        train_set = datasets.concatenate_datasets([load(path) for path in data_args.train_data_path])
        check_training(args, train_set)
        prompt, response = train_set[0]["prompt_ids"], train_set[0]["response_ids"][0]
        logger.info("example: prompt %r, best response %r", tokenizer.decode(prompt), tokenizer.decode(response))
    return train_set, {name: load(path) for name, path in eval_paths.items()}


def evaluate(trainer: PolicyTrainer) -> None:
    """Evaluates each set under its own name, writes and prints the results."""
    from apo.evaluation import evaluate_all
    from apo.run_files import format_table

    columns = ("loss", "accuracy", "reward_weighted_accuracy", "margin", "pairs", "response_length")
    rows = []
    for name, output in evaluate_all(trainer).items():
        values = [output.metrics.get(f"eval_{name}_{column}") for column in columns]
        rows.append((name, *("-" if value is None else f"{value:.4g}" for value in values)))
    if trainer.is_world_process_zero():
        print(format_table(("evaluation set", *columns), rows))


@exit_on_input_error
def main() -> None:
    """Runs the command line."""
    with contextlib.ExitStack() as stack:  # the lock and the recorded state of a training run
        run(stack)


def run(stack: contextlib.ExitStack) -> None:
    """Parse -> data -> reference -> model -> trainer -> train, evaluate -> save; the caller closes `stack`."""
    setup_logging()
    from llm_arguments import build_llm_arguments, parse_llm_flags

    flags = parse_llm_flags()
    if flags.deepspeed:
        set_ranks_of_one_process()
    llm_args, data_args, args = build_llm_arguments(flags)

    # The rest of the heavy imports, once the command line is known to be right.
    import torch
    from accelerate.utils import broadcast_object_list

    from apo.evaluation import dtype_of_computation
    from apo.figures import plot_training_curves
    from apo.policy import PolicyTrainer
    from apo.policy_data import PolicyDataCollator, fingerprint
    from apo.policy_model import load_policy
    from apo.reference import add_reference_logps
    from apo.resumable import train_and_save
    from apo.resume import model_version
    from apo.run_files import write_manifest
    from apo.sampling import load_tokenizer
    from apo.tree import batching_of, choose_attention
    from models import count_positions, load_config

    # ---- model and tokenizer, by their files
    model_path = llm_args.model_name_or_path
    config = load_config(model_path)
    if llm_args.max_length > count_positions(config):
        raise InputError(f"--max_length {llm_args.max_length}: the model has {count_positions(config):g} positions")
    tokenizer = load_tokenizer(model_path, llm_args.prompt_template)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{model_path}: the tokenizer has no eos token, which ends every response")
    if llm_args.reference_model not in (None, model_path):
        check_same_tokens(tokenizer, llm_args)

    # ---- data
    eval_paths = name_datasets(data_args.eval_data_path)
    train_set, eval_sets = load_data(llm_args, data_args, args, tokenizer, eval_paths)

    # ---- where training starts
    if args.deepspeed:
        prepare_deepspeed(args.device.type)
    is_main = args.process_index == 0
    configs = {path: load_config(path) for path in (model_path, llm_args.reference_model) if path}
    commits = {path: getattr(found, "_commit_hash", None) for path, found in configs.items()}
    versions = {path: model_version(path, commit) for path, commit in commits.items()} if is_main else None
    [versions] = broadcast_object_list([versions])
    depends_on: dict[str, Any] = {}
    if args.do_train:
        more = {**asdict(llm_args), "model_name_or_path": versions[model_path], "tokenizer": fingerprint(tokenizer)}
        more |= {"reference_model": versions.get(llm_args.reference_model), "lora": args.lora}
        more["num_processes"] = args.world_size
        depends_on = weights_depend_on(args.to_dict(), data_args.train_data_path, data_args.eval_data_path, **more)
        if not start_training(args, depends_on, data_args.eval_data_path, stack):
            return
    else:
        start_evaluation(args, model_path, stack)

    # ---- the reference model, alone in memory
    dtype = getattr(torch, llm_args.dtype)
    compute_dtype = dtype_of_computation(args, dtype)
    attention = choose_attention(config, args.batching, args.device, compute_dtype)
    if reference_path := llm_args.reference_model:
        data_sets = [*eval_sets.values(), *([train_set] if train_set else [])]
        data_sets = add_reference_logps(
            data_sets,
            reference_path,
            configs[reference_path],
            args,
            version=versions[reference_path],
            dtype=dtype,
            attention=attention,
            max_length=llm_args.max_length,
            cache_dir=data_args.cache_dir,
        )
        eval_sets = dict(zip(eval_sets, data_sets, strict=False))
        train_set = data_sets[-1] if train_set else None

    # ---- model and trainer
    model = load_policy(model_path, config, dtype=dtype, attention=attention, lora=args.lora, seed=args.seed)
    trainer = PolicyTrainer(
        model=model,
        args=args,
        align_type=llm_args.align_type,
        beta=llm_args.beta,
        max_length=llm_args.max_length,
        data_collator=PolicyDataCollator(batching_of(attention)),
        train_dataset=train_set,
        eval_dataset=eval_sets or None,
        processing_class=tokenizer,
    )
    trainer.depends_on = depends_on
    if is_main:
        arguments = {**asdict(llm_args), **asdict(data_args), **args.to_dict(), "world_size": args.world_size}
        write_manifest(args.output_dir, arguments, [*data_args.train_data_path, *data_args.eval_data_path])

    # ---- train, then evaluate
    if args.do_train:
        train_and_save(trainer)
    if eval_sets:
        evaluate(trainer)
    if args.do_train and is_main:
        plot_training_curves(args.output_dir, trainer.state.log_history)
        print(f"model and results: {args.output_dir}; tools/inference_llm.py samples from this model")
    trainer.end()


if __name__ == "__main__":
    main()
    exit_worker()
