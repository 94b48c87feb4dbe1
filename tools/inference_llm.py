"""The LLM's responses to the prompts of a file: four per prompt for the game, or one for testing.

    python tools/inference_llm.py --model_name_or_path outputs/llm --task_type sampling \\
        --data_path data/sample/llm_data/hh_split_llm.train.json --data_suffix hh_llm --output_dir outputs/samples

writes `<output_dir>/<model_prefix>_<task_type>_<data_suffix>_results.json`, in the order of the data:

    {"query_id": "...", "query": "<prompt>", "sample_0": " <response>", "sample_1": ...}

With `--engine transformers` (`python`, or `torchrun` for several GPUs) the same seed gives the same responses on any
number of processes and after any interruption; docs/differences.md has the limits. With `--engine openai` a server
generates them (vLLM, SGLang), and of a changed file only the new prompts.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error
from apo.generation import DECODING, LLAMA_2_CHAT_SAMPLING, Decoding, Engine, generate_responses
from apo.launch import count_processes, process_rank
from apo.prompts import TEMPLATES, Prompt, render_prompts, stop_strings_of
from apo.records import load_prompts
from apo.resume import ResultStore, refuse_overwriting
from apo.server import ServerEngine, add_server_flags


def parse_args() -> tuple[argparse.Namespace, Decoding]:
    """Reads the command line, fills in the defaults that depend on other flags; returns how to decode, too."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder or Hub name of the LLM, or its name on the server")
    add("--model_prefix", help="first part of the result's name (default: last part of the model's name)")
    add("--data_path", required=True, help="prompts: text-scores records, or records with a query")
    add("--data_suffix", help="last part of the result's name (default: name of the data file up to its first dot)")
    add("--output_dir", type=Path, required=True, help="folder to write to; created if it does not exist")
    add("--task_type", choices=DECODING, required=True, help="sampling: four responses; testing: one, nearly greedy")
    add("--engine", choices=("transformers", "openai"), default="transformers", help="(default: transformers)")
    add("--prompt_template", choices=TEMPLATES, default="plain", help="plain: as in the file; chat: the model's own")
    add("--seed", type=int, default=42, help="a server gets one for each response and may ignore it (default: 42)")
    add = parser.add_argument_group("decoding", "default: sampling / testing / LLaMA-2-chat sampling").add_argument
    add("--num_samples", type=at_least(1), help="responses per prompt (default: 4 / 1 / 4)")
    add("--temperature", type=at_least(0.0), help="0: greedy (default: 1.2 / 0.3 / 0.6)")
    add("--top_k", type=at_least(0), help="0: all tokens (default: 50 / 5 / 50)")
    add("--top_p", type=at_least(0.0), help="1: all tokens (default: 1 / 0.85 / 0.9)")
    add("--repetition_penalty", type=at_least(0.01), help="1: none (default: 1 / 1.05 / 1)")
    add("--max_new_tokens", type=at_least(1), help="tokens of a response (default: 256 / 512 / 256)")
    add = parser.add_argument_group("engine transformers").add_argument
    add("--max_length", type=at_least(1), default=512, help="prompt tokens; only the last are kept (default: 512)")
    add("--per_device_eval_batch_size", type=at_least(1), default=8, help="prompts at a time (default: 8)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's")
    add_server_flags(parser)

    args = parser.parse_args()
    args.model_prefix = args.model_prefix or Path(args.model_name_or_path).name
    args.data_suffix = args.data_suffix or Path(args.data_path).name.split(".")[0]
    is_llama_2_chat = (args.task_type, args.prompt_template) == ("sampling", "llama-2-chat")
    decoding = LLAMA_2_CHAT_SAMPLING if is_llama_2_chat else DECODING[args.task_type]
    given = {field.name: getattr(args, field.name) for field in fields(Decoding)}
    decoding = replace(decoding, **{name: value for name, value in given.items() if value is not None})
    if not 0 < decoding.top_p <= 1:
        raise InputError(f"--top_p {decoding.top_p:g}: expected more than 0 and at most 1")
    if decoding.temperature == 0 and decoding.num_samples > 1:
        raise InputError(f"--temperature 0 --num_samples {decoding.num_samples}: expected 1, all would be the same")
    return args, decoding


def make_engine(args: argparse.Namespace, decoding: Decoding, rendered: dict[Prompt, Any]) -> Engine:
    """Returns the engine that the flags name; raises an InputError if flags, model and prompts do not fit."""
    if args.engine == "openai":
        if count_processes() > 1:
            raise InputError(f"--engine openai in {count_processes()} processes: expected one; see --concurrency")
        stop_strings = stop_strings_of(args.prompt_template)
        body = {"model": args.model_name_or_path, "temperature": decoding.temperature, "top_p": decoding.top_p}
        body |= {"max_tokens": decoding.max_new_tokens, "stop": list(stop_strings)}
        # Fields of vLLM and SGLang are sent only if they change something: OpenAI's own models refuse them.
        off = {"top_k": 0, "repetition_penalty": 1}
        body |= {name: getattr(decoding, name) for name, value in off.items() if getattr(decoding, name) != value}
        return ServerEngine(rendered, body, args, decoding.num_samples, stop_strings)

    from apo.sampling import LocalEngine
    from models import load_config

    return LocalEngine(rendered, load_config(args.model_name_or_path), decoding, args)


@exit_on_input_error
def main() -> None:
    """Parse -> prompts -> engine -> responses -> result."""
    args, decoding = parse_args()
    rank = process_rank()
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(levelname)s: %(message)s")
    result_path = args.output_dir / f"{args.model_prefix}_{args.task_type}_{args.data_suffix}_results.json"
    refuse_overwriting(args.data_path, result_path)
    prompts = load_prompts(args.data_path)
    rendered = dict(zip(prompts, render_prompts(args.data_path, prompts, args.prompt_template), strict=True))
    engine = make_engine(args, decoding, rendered)

    # ---- responses
    names = ("engine", "model_name_or_path", "task_type", "prompt_template", "seed")
    settings = {name: getattr(args, name) for name in names} | asdict(decoding) | engine.settings
    sample_fields = [f"sample_{i}" for i in range(decoding.num_samples)]
    store = ResultStore(result_path, settings, rank, engine.notes)
    records = generate_responses(store, prompts, engine, sample_fields, may_miss=args.skip_refused)
    if records is not None:
        num_empty = sum(not record[field] for record in records for field in sample_fields)
        print(f"{result_path}: {len(records)} prompts x {decoding.num_samples} responses, {num_empty} of them empty")


if __name__ == "__main__":
    main()
