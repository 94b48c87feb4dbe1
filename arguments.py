"""The command line: three groups of flags, parsed by `HfArgumentParser`, checked before anything loads.

Flags keep the spelling of the reference; those of `transformers.TrainingArguments` keep theirs. Flags whose default is
None follow the checkpoint (`models.RewardSettings`), and the reference's default where it records nothing.
"""

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import is_bitsandbytes_available, strtobool

from apo.cli import InputError, OneLineParser, read_config, read_json, suggest
from apo.flags import check_flags, check_packages
from apo.launch import count_processes

logger = logging.getLogger(__name__)

# Flags that the reference accepts and reads nowhere.
UNUSED_FLAGS = (
    *("reward_domain", "data_dir", "data_path", "data_prefix", "format_mode", "contrast_loss_coeff", "batch_size"),
    *("micro_batch_size", "valid_data_size", "max_response_num"),
)
# Flags of older transformers releases, with what replaced them.
RENAMED_FLAGS = {
    "--overwrite_output_dir": "gone; choose an empty --output_dir, or resume with --resume_from_checkpoint true",
    "--no_cuda": "now --use_cpu",
    "--warmup_ratio": "now --warmup_steps, which also takes a ratio below 1",
    "--group_by_length": "now --train_sampling_strategy group_by_length",
    "--logging_dir": "now the environment variable TENSORBOARD_LOGGING_DIR",
    "--save_safetensors": "gone; weights are always saved as safetensors",
    "--per_gpu_train_batch_size": "now --per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "now --per_device_eval_batch_size",
}
LORA_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")


@dataclass
class ModelArguments:
    """The model and its tokenizer."""

    model_name_or_path: str = HfArg(help="Folder or Hub name of a pretrained decoder, a reward model or an adapter.")
    model_type: Literal["reward"] = HfArg(default="reward", help="What to build: a reward model.")
    tokenizer_path: str | None = HfArg(default=None, help="Where the tokenizer is, if not with the model.")
    pooling_type: Literal["last", "eos", "average", "max"] | None = HfArg(
        default=None, help="Which tokens give the reward: last is the token before eos (reference default: average)."
    )
    padding_side: Literal["right", "left"] = HfArg(default="right", help="Side of the padding; changes no reward.")
    truncation_side: Literal["left", "right"] | None = HfArg(
        default=None, help="Side that is cut off beyond max_length (reference default: left)."
    )
    max_length: int | None = HfArg(default=None, help="Longest sequence in tokens (reference default: 256).")
    add_sep_token: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Put a separator token between prompt and response (reference default: False).",
    )
    tokenizer_backend: Literal["sentencepiece", "transformers"] | None = HfArg(
        default=None,
        help="Token ids for a checkpoint with tokenizer.model: sentencepiece's, as in the reference, or those of "
        "transformers 5, which differ after a space (default: sentencepiece).",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="Type of the weights in memory; --bf16 computes in bfloat16 on float32 weights."
    )
    load_in_4bit: bool = HfArg(default=False, help="Keep the decoder in 4 bits on the GPU, with bitsandbytes.")

    def __post_init__(self) -> None:
        check_flags(self)
        if self.load_in_4bit and not is_bitsandbytes_available():
            raise InputError("--load_in_4bit needs the package bitsandbytes; install it, or leave the flag out")

    @property
    def storage(self) -> str:
        """How the weights are kept in memory."""
        return f"{self.dtype}, 4 bits" if self.load_in_4bit else self.dtype


@dataclass
class DataArguments:
    """The data files."""

    data_type: Literal["comparison_pair", "reject_sample"] = HfArg(
        default="comparison_pair",
        help="comparison_pair: text-scores or prompt/chosen/rejected records; reject_sample: responses to score.",
    )
    train_data_path: list[str] = field(default_factory=list, metadata={"help": "Training files."})
    eval_data_path: list[str] = field(
        default_factory=list, metadata={"help": "Evaluation files, each evaluated under its own name; files to score."}
    )
    response_keys: list[str] = field(default_factory=list, metadata={"help": "Fields to score besides sample_<n>."})
    data_suffix: str = HfArg(default="reward_model", help="Names the model in <data>_pred_<suffix>_results.json.")
    cache_dir: str | None = HfArg(default=None, help="Cache of tokenised data (default: the one of datasets).")


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """What training takes for a reward model and for an LLM; everything else is `transformers.TrainingArguments`."""

    eval_at_start: bool = HfArg(default=False, help="Evaluate before the first step too.")
    batching: Literal["tree", "padded"] = HfArg(
        default="tree",
        help="tree: a shared prefix is computed once, without padding; padded: one padded row a response.",
    )
    eval_token_budget: int | None = HfArg(
        default=None,
        help="Tokens of a batch per device outside of training, padding included; a larger item runs alone "
        "(default: 2 x max_length x per_device_eval_batch_size; on a CPU 2048 if that is less).",
    )
    use_peft: bool = HfArg(
        default=False, help="Train a LoRA adapter, and the head of a reward model, and not the whole model."
    )
    lora_r: int | None = HfArg(default=None, help="Rank of a new adapter (default: 16).")
    lora_alpha: int | None = HfArg(default=None, help="A new adapter is scaled by alpha / rank (default: 32).")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapter; above 0, batches are padded.")
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of the layers with an adapter, or all-linear (default: PEFT's for the model type)."},
    )
    lora_modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "Further modules to train and save whole."}
    )
    logging_nan_inf_filter: bool = HfArg(default=False, help="No effect: a loss that is not finite ends the run.")
    debug_mode: bool = HfArg(default=False, help="Use the first 64 records of each file only.")
    allow_changes: bool = HfArg(
        default=False, help="Resume from a checkpoint of other data or flags; replace a result of another model."
    )
    eval_strategy: str = HfArg(default="no", aliases=["--evaluation_strategy"], help="Evaluate: no, steps or epoch.")
    remove_unused_columns: bool = HfArg(default=False, help="No effect: the columns of the data are fixed.")
    include_num_input_tokens_seen: Literal["non_padding", "all", "no"] = HfArg(
        default="non_padding", help="Tokens to count in the log: non_padding, all or no."
    )

    @property
    def num_records(self) -> int | None:
        """Records to use of each file; None: all."""
        return 64 if self.debug_mode else None

    @property
    def lora(self) -> dict[str, Any] | None:
        """The flags of the adapter to train; None if there is none."""
        return {name: getattr(self, name) for name in LORA_FLAGS} if self.use_peft else None

    def _settle_lora(self) -> None:
        if not self.use_peft and (given := [name for name in LORA_FLAGS if getattr(self, name)]):
            logger.warning("--%s has no effect without --use_peft true", ", --".join(given))
        if self.use_peft and not self.do_train:
            logger.warning("--use_peft has no effect without --do_train true")
            self.use_peft = False
        if self.use_peft and self.lora_dropout and self.batching == "tree":
            logger.info("--batching padded: a token that responses share cannot be dropped for each (--lora_dropout)")
            self.batching = "padded"

    def __post_init__(self) -> None:
        check_flags(self)
        self._settle_lora()
        if self.deepspeed:
            if not self.use_cpu and not torch.accelerator.is_available():
                raise InputError("--deepspeed, but no accelerator was found; add --use_cpu true to train on the CPU")
            if strtobool(os.environ.get("ACCELERATE_USE_CPU", "false")):
                raise InputError("found ACCELERATE_USE_CPU, which drops --deepspeed; unset it, add --use_cpu true")
            config = read_json(self.deepspeed)
            zero = config.get("zero_optimization", {})
            if not config or not isinstance(zero, dict) or zero.get("stage", 0) not in range(4):
                expected = 'a JSON object, and in it "zero_optimization", an object with a "stage" from 0 to 3'
                raise InputError(f"--deepspeed {self.deepspeed}: no such file, or its content is not {expected}")
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu" and not self.deepspeed:
            raise InputError("--fp16 true has no effect on a CPU; give --bf16 true, or neither")
        check_packages(self)
        if self.world_size != count_processes():
            found = f"{count_processes()} processes were launched, but each would train alone on all the data"
            raise InputError(f"{found}: no accelerator was found; add --use_cpu true to train on the CPU")
        if self.n_gpu > 1:
            advice = f"torchrun --nproc_per_node={self.n_gpu}, or choose one with CUDA_VISIBLE_DEVICES=0"
            raise InputError(f"one process was launched and sees {self.n_gpu} GPUs; launch one a GPU with {advice}")
        self.eval_on_start = self.eval_on_start or self.eval_at_start
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step uses every weight; a search takes time


@dataclass
class RewardTrainingArguments(CommonTrainingArguments):
    """What to do, the loss, the evaluation."""

    task_type: Literal["training", "hh_split", "apo", "inference"] = HfArg(
        default="training", help="training, hh_split: ranking loss; apo: APO loss; inference: score --eval_data_path."
    )
    apo_loss_type: Literal["ranking", "diff"] = HfArg(
        default="ranking", help="Loss on golden-over-sampled pairs: ranking, or diff, the score difference (Eq. 12)."
    )
    apo_loss_coeff: float = HfArg(default=0.0, help="Weight of the loss on golden-over-sampled pairs.")
    apo_sample_num: int = HfArg(default=1, help="Sampled responses per golden response; divides apo_loss_coeff.")
    rm_kl_coeff: float = HfArg(default=1.0, help="Weight of the ranking loss on human pairs under --task_type apo.")
    lm_loss_coeff: float = HfArg(
        default=0.0,
        help="Weight of the language-modelling loss on good responses; its LM head always runs on padded rows.",
    )
    lm_score_thresh: float = HfArg(default=0.85, help="Normalised score above which a response is modelled.")
    rm_calibration: bool = HfArg(default=False, help="Report calibration errors (ECE, ACE, MCE).")
    calibration_bins: list[int] = field(
        default_factory=lambda: [10], metadata={"help": "Numbers of bins of the calibration errors."}
    )
    save_calibration: bool = HfArg(default=False, help="Save the reliability diagram of each evaluation set.")

    def __post_init__(self) -> None:
        if self.greater_is_better is None and "_calibration_" in (self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()
        self._check_loss()

    def _check_loss(self) -> None:
        if self.task_type == "apo" and self.apo_loss_coeff == 0:
            logger.warning("--task_type apo with --apo_loss_coeff 0: golden-over-sampled pairs are not learnt from")
        if self.task_type != "apo" and (self.apo_loss_coeff, self.rm_kl_coeff) != (0, 1):
            logger.warning("--apo_loss_coeff and --rm_kl_coeff have no effect with --task_type %s", self.task_type)
        if self.save_calibration and not self.rm_calibration:
            logger.warning("--save_calibration turns --rm_calibration on")
            self.rm_calibration = True


GROUPS = (ModelArguments, DataArguments, RewardTrainingArguments)


class _FlagParser(OneLineParser, HfArgumentParser):
    """`HfArgumentParser` with the errors of `OneLineParser`."""


def read_run_file(path: str) -> list[str]:
    """Returns the settings of a YAML run file as the words of a command line; a null is a flag that is not given."""
    words = []
    for name, value in read_config(path).items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            words += [f"--{name}", *map(str, values)]
    return words


def parse_flags(
    argv: list[str] | None = None, groups: tuple[type, ...] = GROUPS, unused: tuple[str, ...] = UNUSED_FLAGS
) -> argparse.Namespace:
    """Parses the command line, by default that of this process; flags win over those of a `--config` file.

    Args:
        groups: the dataclasses whose fields are flags.
        unused: flags that are accepted and have no effect.

    Raises:
        InputError: an unknown flag (with a suggestion), or a value of the wrong type.
    """
    parser = _FlagParser(dataclass_types=groups, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", help="YAML file of flags, without their dashes; flags given here win over it.")
    for name in unused:
        parser.add_argument(f"--{name}", nargs="*", help="Accepted because the reference has it; no effect.")
    finder = OneLineParser(add_help=False)
    finder.add_argument("--config")
    argv = sys.argv[1:] if argv is None else argv
    config = finder.parse_known_args(argv)[0].config
    namespace, unknown = parser.parse_known_args((read_run_file(config) if config else []) + argv)
    if unknown:
        raise InputError(_unknown_flag(unknown[0], list(parser._option_string_actions)))
    for name in unused:
        if getattr(namespace, name) is not None:
            logger.warning("--%s has no effect; it is accepted because the reference has it", name)
    return namespace


def build_groups(flags: argparse.Namespace, groups: tuple[type, ...]) -> list[Any]:
    """Builds the groups of arguments from parsed flags; under DeepSpeed and torchrun, joins the other processes.

    Raises:
        InputError: flags that contradict each other or the machine.
    """
    try:
        return [
            group(**{field.name: getattr(flags, field.name) for field in fields(group) if field.init})
            for group in groups
        ]
    except (ValueError, ImportError, TypeError) as error:  # transformers checks its own flags
        raise InputError(" ".join(str(error).split())) from error


def build_arguments(flags: argparse.Namespace) -> tuple[ModelArguments, DataArguments, RewardTrainingArguments]:
    """Builds the groups of `train.py`; see `build_groups`."""
    model_args, data_args, args = build_groups(flags, GROUPS)
    _check_task(data_args, args)
    check_dtype(model_args.dtype, args)
    check_adapter_place(model_args.model_name_or_path, args)
    return model_args, data_args, args


def check_dtype(dtype: str, args: CommonTrainingArguments) -> None:
    """Refuses to train float16 weights."""
    if args.do_train and dtype == "float16" and not args.deepspeed:
        raise InputError("--dtype float16: such weights overflow in training; give --fp16 true, or bfloat16")


def check_adapter_place(model_path: str, args: CommonTrainingArguments) -> None:
    """Refuses to save a new adapter, which needs its base model, into the folder of that."""
    is_adapter = os.path.isfile(os.path.join(model_path, "adapter_config.json"))
    if args.use_peft and not is_adapter and os.path.realpath(args.output_dir) == os.path.realpath(model_path):
        found = "found the base model of the adapter"
        raise InputError(f"--output_dir {args.output_dir}: {found}, expected another folder")


def _unknown_flag(flag: str, known: list[str]) -> str:
    name = flag.split("=")[0]
    if name in RENAMED_FLAGS:
        return f"{name} is no flag of transformers 5: {RENAMED_FLAGS[name]}"
    if not name.startswith("-"):
        return f'"{flag}" belongs to no flag; expected --flag value'
    return f"unknown flag {name}; {suggest(name, known) or 'see --help'}"


def _check_task(data_args: DataArguments, args: RewardTrainingArguments) -> None:
    if data_args.response_keys and data_args.data_type != "reject_sample":
        raise InputError("--response_keys is for --data_type reject_sample, the records with responses to score")
    if args.task_type == "inference":
        if args.do_train:
            raise InputError("--task_type inference scores --eval_data_path; it takes no --do_train True")
        if not data_args.eval_data_path:
            raise InputError("--task_type inference needs the files to score in --eval_data_path")
        return
    if data_args.data_type != "comparison_pair":
        raise InputError(f"--data_type {data_args.data_type} is for --task_type inference; expected comparison_pair")
    check_paths(data_args, args)


def check_paths(data_args: Any, args: CommonTrainingArguments) -> None:
    """Refuses a run without the files that its flags need; they are `train_data_path` and `eval_data_path`."""
    if args.do_train and not data_args.train_data_path:
        raise InputError("--do_train True without training data; give --train_data_path")
    if not args.do_train and not data_args.eval_data_path:
        raise InputError("nothing to do: give --do_train True with --train_data_path, or --eval_data_path")
    if (args.do_eval or args.eval_on_start) and not data_args.eval_data_path:
        raise InputError("--do_eval, --eval_at_start or --eval_strategy without --eval_data_path")
    if (args.metric_for_best_model or args.save_strategy == "best") and args.eval_strategy == "no":
        raise InputError("--metric_for_best_model and --save_strategy best need --eval_strategy steps or epoch")
    if args.save_strategy == "best" and not args.metric_for_best_model:
        raise InputError("--save_strategy best needs --metric_for_best_model")
