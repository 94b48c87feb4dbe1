"""The LLM's answers to the prompts of a file: four samples a prompt for the game, or one for testing.

    python tools/inference_llm.py --model_name_or_path outputs/llm --task_type sampling \\
        --data_path data/sample/llm_data/hh_split_llm.train.json --data_suffix hh_llm --output_dir outputs/samples

writes `<output_dir>/<model_prefix>_<task_type>_<data_suffix>_results.json`, in the order of the data:

    {"query_id": "...", "query": "<prompt>", "sample_0": " <response>", "sample_1": ...}

With `--engine transformers` (`python`, or `torchrun` for several GPUs) the same seed gives the same answers on any
number of processes and after any interruption, as long as each computes with the same number of threads; with another
batch size, in float32 only: in bfloat16 rounding may flip a token. With `--engine openai` a server of one's own
answers (vLLM, SGLang), and of a changed file only the new prompts are asked.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apo.cli import InputError, OneLineParser, exit_on_input_error
from apo.prompts import (
    TEMPLATES,
    Decoding,
    Prompt,
    answered_prompts,
    count_cuts,
    derive_seed,
    format_response,
    hash_prompts,
    render_prompts,
    stop_strings_of,
)
from apo.records import DATA_TYPES, load_prompts
from apo.resume import ResultStore, model_version, refuse_overwriting
from apo.server import CompletionClient, add_server_flags, check_server_flags, complete_all

logger = logging.getLogger("inference_llm")

# The reference's settings. Its sampling names no top_k; the transformers of its time then took 50.
DECODING = {
    "sampling": Decoding(
        num_samples=4, temperature=1.2, top_k=50, top_p=1.0, repetition_penalty=1.0, max_new_tokens=256
    ),
    "testing": Decoding(
        num_samples=1, temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05, max_new_tokens=512
    ),
}
LLAMA_2_CHAT_SAMPLING = {"temperature": 0.6, "top_p": 0.9}
DECODING_HELP = {
    "num_samples": "answers per prompt",
    "temperature": "0: greedy; LLaMA-2-chat sampling: 0.6",
    "top_k": "0: all tokens",
    "top_p": "LLaMA-2-chat sampling: 0.9",
    "repetition_penalty": "1: none",
    "max_new_tokens": "longest answer",
}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="The LLM's answers to the prompts of a file.",
        epilog="examples:\n"
        "  torchrun --nproc_per_node 8 tools/inference_llm.py --model_name_or_path outputs/llm --model_prefix llm \\\n"
        "      --data_path data/sample/llm_data/hh_split_llm.train.json --data_suffix hh_llm_train \\\n"
        "      --task_type sampling --output_dir outputs/samples\n"
        "  python tools/inference_llm.py --engine openai --base_url http://localhost:8000/v1 --concurrency 64 \\\n"
        "      --model_name_or_path llm --data_path data/sample/eval_data/hh_cleaned_origin.test.json \\\n"
        "      --task_type testing --output_dir outputs/samples",
    )
    add = parser.add_argument
    add(
        "--model_name_or_path", required=True, help="folder or Hub name of the LLM; with openai its name on the server"
    )
    add("--model_prefix", help="first part of the result's name (default: last part of the model's)")
    add("--data_path", required=True, help="prompts: text-scores records, or records with a query")
    add("--data_type", choices=DATA_TYPES, help="reject_sample: records with a query (default: as the first record)")
    add("--data_suffix", help="last part of the result's name (default: the data file's up to its first dot)")
    add("--output_dir", type=Path, required=True, help="folder to write to; made if it is not there")
    add("--task_type", choices=DECODING, required=True, help="sampling: four answers; testing: one, nearly greedy")
    add("--engine", choices=("transformers", "openai"), default="transformers", help="(default: transformers)")
    add(
        "--prompt_template",
        choices=TEMPLATES,
        help="plain: as in the file; chat: the model's own (default: plain; llama-2-chat if that is the model_prefix)",
    )
    for field in fields(Decoding):
        sampling, testing = (getattr(DECODING[task], field.name) for task in DECODING)
        default = f"{DECODING_HELP[field.name]} (default: sampling {sampling}, testing {testing})"
        add(f"--{field.name}", type=type(sampling), help=default)
    add("--seed", type=int, default=42, help="of all answers; a server gets one for each and may ignore it (42)")
    local = parser.add_argument_group("engine transformers")
    local.add_argument("--max_length", type=int, default=512, help="prompt tokens; the front is cut (default: 512)")
    local.add_argument(
        "--per_device_eval_batch_size",
        type=int,
        default=8,
        help="prompts at a time; in bfloat16 another number may flip a token (default: 8)",
    )
    local.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's"
    )
    add_server_flags(parser)
    return parser.parse_args()


def settle(args: argparse.Namespace) -> Decoding:
    """Fills in the defaults that depend on other flags, and returns how to decode.

    Raises:
        InputError: a value that cannot work.
    """
    args.model_prefix = args.model_prefix or Path(args.model_name_or_path).name
    args.data_suffix = args.data_suffix or Path(args.data_path).name.split(".")[0]
    args.prompt_template = args.prompt_template or ("llama-2-chat" if args.model_prefix == "llama-2-chat" else "plain")
    decoding = DECODING[args.task_type]
    if args.task_type == "sampling" and args.prompt_template == "llama-2-chat":
        decoding = replace(decoding, **LLAMA_2_CHAT_SAMPLING)
    given = {field.name: getattr(args, field.name) for field in fields(Decoding)}
    decoding = replace(decoding, **{name: value for name, value in given.items() if value is not None})
    decoding.check()
    for name in ("max_length", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.engine == "openai":
        check_server_flags(args)
    return decoding


def make_requests(
    prompts: dict[Prompt, Any], *, model: str, template: str, decoding: Decoding, seed: int
) -> dict[Prompt, list[dict[str, Any]]]:
    """Returns the requests to a server for rendered prompts, one for each response."""
    extra = {}  # of vLLM and SGLang; OpenAI's own models refuse them
    if decoding.top_k:
        extra["top_k"] = decoding.top_k
    if decoding.repetition_penalty != 1:
        extra["repetition_penalty"] = decoding.repetition_penalty
    common = {
        "model": model,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "max_tokens": decoding.max_new_tokens,
        "stop": list(stop_strings_of(template)),
        "extra_body": extra,
    }
    field = "messages" if template == "chat" else "prompt"
    return {
        prompt: [
            {**common, field: text, "seed": derive_seed(seed, prompt.query_id, sample)}
            for sample in range(decoding.num_samples)
        ]
        for prompt, text in prompts.items()
    }


@exit_on_input_error
def main() -> None:
    """Reads the prompts, answers those that no earlier run has, and writes the result when all processes are done."""
    args = parse_args()
    decoding = settle(args)
    rank, num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(levelname)s: %(message)s")
    if args.engine == "openai" and num_processes > 1:
        raise InputError(f"--engine openai in {num_processes} processes: expected one; --concurrency asks for more")
    result_path = args.output_dir / f"{args.model_prefix}_{args.task_type}_{args.data_suffix}_results.json"
    refuse_overwriting(args.data_path, result_path)
    stop_strings = stop_strings_of(args.prompt_template)
    prompts = load_prompts(args.data_path, args.data_type)
    rendered = render_prompts(args.data_path, prompts, args.prompt_template)
    names = ("engine", "model_name_or_path", "task_type", "prompt_template", "seed")
    settings = {name: getattr(args, name) for name in names} | asdict(decoding)

    # ---- this process's share: whole batches
    share, notes = prompts, None
    if args.engine == "openai":
        client = CompletionClient(args.base_url, timeout=args.timeout, max_retries=args.max_retries)
        notes = {"base_url": client.base_url}
    else:
        from apo import sampling as llm_sampling
        from models import load_config

        config = load_config(args.model_name_or_path)
        version = model_version(args.model_name_or_path, getattr(config, "_commit_hash", None))
        settings |= {"max_length": args.max_length, "dtype": args.dtype, "model_version": version}
        settings["prompts_sha256"] = hash_prompts(prompts)  # another prompt is another batch
        tokenizer = llm_sampling.load_tokenizer(args.model_name_or_path, args.prompt_template)
        token_ids = llm_sampling.tokenize(tokenizer, rendered, args.prompt_template, args.max_length)
        llm_sampling.check_positions(token_ids, decoding.max_new_tokens, config.max_position_embeddings)
        batches = llm_sampling.form_batches(token_ids, args.per_device_eval_batch_size)[rank::num_processes]
        share = [prompts[i] for batch in batches for i in batch]

    # ---- what is there already, the answers of each prompt under its key
    store = ResultStore(result_path, settings, rank, notes)
    parts = store.load()
    result = {
        Prompt("", r["query_id"], r["query"]).key: [r[f"sample_{i}"] for i in range(decoding.num_samples)]
        for r in store.load_result()
    }
    if list(result) == [prompt.key for prompt in prompts]:
        if rank == 0:
            print(f"{result_path}: there already, with these settings; delete it to sample again")
        return
    done = result | parts
    todo = [prompt for prompt in share if prompt.key not in done]
    store.log_state(sum(prompt.key in done for prompt in prompts), len(prompts), "prompts")

    # ---- the rest
    counts: Counter[str] = Counter()
    if todo:
        store.open()
        if args.engine == "transformers":
            model = llm_sampling.load_llm(args.model_name_or_path, args.dtype, tokenizer)
        with tqdm(total=len(share), initial=len(share) - len(todo), unit="prompt", disable=rank != 0) as progress:

            def keep(prompt: Prompt, texts: list[str]) -> None:
                store.append(prompt.key, [format_response(text, stop_strings) for text in texts])
                counts["cut"] += count_cuts(texts, stop_strings)
                progress.update()

            if args.engine == "openai":
                requests = make_requests(
                    {p: text for p, text in zip(prompts, rendered, strict=True) if p.key not in done},
                    model=args.model_name_or_path,
                    template=args.prompt_template,
                    decoding=decoding,
                    seed=args.seed,
                )
                complete_all(
                    client,
                    requests,
                    keep=lambda prompt, completions: keep(prompt, [c.text for c in completions]),
                    concurrency=args.concurrency,
                    skip_refused=args.skip_refused,
                )
            else:
                answers = llm_sampling.sample_batches(
                    model,
                    tokenizer,
                    prompts=prompts,
                    token_ids=token_ids,
                    batches=[batch for batch in batches if any(prompts[i].key not in done for i in batch)],
                    decoding=decoding,
                    seed=args.seed,
                    stop_strings=stop_strings,
                )
                for prompt, texts in answers:
                    if prompt.key not in done:  # of a batch that a kill has torn, computed again in the same shape
                        keep(prompt, texts)
        store.close()
    if counts["cut"]:
        logger.info("%d answers cut where they go on to play the user", counts["cut"])

    # ---- the result, by the process that ends last: no process waits for another
    responses = done | store.load()
    num_answered = sum(prompt.key in responses for prompt in prompts)
    if args.engine == "transformers" and num_answered < len(prompts):
        if not store.is_finished():
            logger.info(
                "%d of %d prompts answered here and before; the result is written by the process that finds all of "
                "them, under the same settings",
                num_answered,
                len(prompts),
            )
        return
    answered = answered_prompts(prompts, responses)
    store.finish(
        [
            {"query_id": p.query_id, "query": p.query} | {f"sample_{i}": r for i, r in enumerate(responses[p.key])}
            for p in answered
        ]
    )
    num_same = sum(len(set(responses[p.key])) == 1 for p in answered) if decoding.num_samples > 1 else 0
    if 2 * num_same > len(answered):
        logger.warning("%d prompts got the same answer every time; expected them to differ", num_same)
    num_empty = sum(not response for p in answered for response in responses[p.key])
    print(f"{result_path}: {len(answered)} prompts x {decoding.num_samples} answers, {num_empty} of them empty")


if __name__ == "__main__":
    main()
