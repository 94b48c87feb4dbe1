"""The flags of `train_llm.py`: three groups, parsed as those of `train.py` are."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field
from typing import Literal

from transformers.hf_argparser import HfArg

from apo.cli import InputError
from apo.flags import check_flags
from arguments import CommonTrainingArguments, build_groups, check_adapter_place, check_dtype, check_paths, parse_flags

logger = logging.getLogger(__name__)


@dataclass
class LLMArguments:
    """The LLM, its reference, and the method."""

    model_name_or_path: str = HfArg(help="Folder or Hub name of the LLM to start from.")
    align_type: Literal["rjs", "dpo", "rrhf", "sft"] = HfArg(
        help="rjs: likelihood of the best response; dpo: best over worst; rrhf: the ranking of all responses, and the "
        "best; sft: likelihood of golden responses. PPO and GRPO are in TRL, OpenRLHF and verl."
    )
    beta: float = HfArg(default=0.1, help="Weight of the KL constraint of dpo.")
    reference_model: str | None = HfArg(
        default=None, help="Folder or Hub name of the reference model of dpo (default: the model to start from)."
    )
    prompt_template: Literal["plain", "llama-2-chat", "chat"] = HfArg(
        default="plain", help="How a prompt is rendered: as in tools/inference_llm.py, which sampled the responses."
    )
    max_length: int = HfArg(
        default=512,
        help="Tokens of a prompt and a response; a longer prompt loses its first ones. For exactly the prompts of "
        "tools/inference_llm.py give the sum of its --max_length and --max_new_tokens.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="Type of the weights in memory; --bf16 computes in bfloat16 on float32 weights."
    )

    def __post_init__(self) -> None:
        check_flags(self)
        if self.align_type != "dpo":
            if self.reference_model or self.beta != type(self).beta:
                logger.warning("--beta and --reference_model have no effect with --align_type %s", self.align_type)
            self.reference_model = None
        else:
            self.reference_model = self.reference_model or self.model_name_or_path


@dataclass
class LLMDataArguments:
    """The data files: text-scores records whose scores are rewards; golden records for sft."""

    train_data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Training files, as tools/rejection_sampling.py --to_pairs writes *_text_scores.json."},
    )
    eval_data_path: list[str] = field(
        default_factory=list,
        metadata={"help": "Evaluation files of the same form, each evaluated under its own name."},
    )
    cache_dir: str | None = HfArg(default=None, help="Cache of tokenised data (default: the one of datasets).")


GROUPS = (LLMArguments, LLMDataArguments, CommonTrainingArguments)


def parse_llm_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; see `arguments.parse_flags`."""
    return parse_flags(argv, GROUPS, unused=())


def build_llm_arguments(
    flags: argparse.Namespace,
) -> tuple[LLMArguments, LLMDataArguments, CommonTrainingArguments]:
    """Builds the groups; see `arguments.build_groups`."""
    llm_args, data_args, args = build_groups(flags, GROUPS)
    check_paths(data_args, args)
    check_dtype(llm_args.dtype, args)
    check_adapter_place(llm_args.model_name_or_path, args)
    if llm_args.reference_model == llm_args.model_name_or_path and not args.do_train:
        raise InputError(
            "--align_type dpo without --do_train compares a model with its reference, here itself; give as "
            "--reference_model what it was trained from"
        )
    return llm_args, data_args, args
