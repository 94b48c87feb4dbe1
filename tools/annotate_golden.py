"""Golden answers to the prompts of a file, from a strong model behind an OpenAI-compatible server.

    python tools/annotate_golden.py --model gpt-4o --data_path data/sample/rm_data/hh_split_rm.train.json \\
        --price_per_million_input 2.5 --price_per_million_output 10 --output_path outputs/hh_split_rm.golden.json

writes what `tools/apo_data_converter.py --golden_data_path` reads, in the order of the data:

    {"query_id": "...", "query": "<prompt>", "golden": " <response>"}

What it may cost is said before the first request; `--dry_run` says no more than that. A run that breaks off goes on
where it was when it is started again, and prompts that are new or were mended since are all that a finished one asks
for: an answer that has arrived is kept. A failure and Ctrl-C wait for the answers under way; only a kill loses these,
at most `--concurrency` of them.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apo.cli import InputError, OneLineParser, exit_on_input_error
from apo.prompts import (
    GOLDEN_STOP_STRINGS,
    Prompt,
    answered_prompts,
    count_cuts,
    derive_seed,
    format_response,
    render_prompts,
)
from apo.records import DATA_TYPES, load_prompts
from apo.resume import ResultStore, refuse_overwriting
from apo.server import Completion, CompletionClient, add_server_flags, check_server_flags, complete_all

logger = logging.getLogger("annotate_golden")

BYTES_PER_TOKEN = 3  # of UTF-8: English has more, about 4, Chinese and Japanese a character of 3
TOKENS_PER_MESSAGE = 4  # role and delimiters
Messages = list[dict[str, str]]


def estimate_prompt_tokens(dialogues: Iterable[Messages]) -> int:
    """Estimates the prompt tokens of chats, rather too many: a token for 3 bytes, and 4 for each message."""
    messages = [message for dialogue in dialogues for message in dialogue]
    return sum(math.ceil(len(m["content"].encode()) / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE for m in messages)


def describe_cost(prompt_tokens: int, completion_tokens: int, prices: tuple[float, float] | None) -> str:
    """Puts token counts, and what they cost at (input, output) prices per million, into words."""
    words = f"{prompt_tokens:,} prompt tokens and {completion_tokens:,} completion tokens"
    if prices is None:
        return words
    return f"{words}: {(prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6:,.2f} at the given prices"


def make_requests(
    prompts: Iterable[tuple[Prompt, Messages]],
    *,
    model: str,
    temperature: float | None,
    max_new_tokens: int,
    seed: int | None,
) -> dict[Prompt, list[dict[str, Any]]]:
    """Returns one chat request for each prompt; what is None is left to the server."""
    common: dict[str, Any] = {"model": model, "max_completion_tokens": max_new_tokens}
    if temperature is not None:
        common["temperature"] = temperature
    requests = {}
    for prompt, messages in prompts:
        seeded = {} if seed is None else {"seed": derive_seed(seed, prompt.query_id, 0)}
        requests[prompt] = [{**common, **seeded, "messages": messages}]
    return requests


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="Golden answers to the prompts of a file, from a strong model behind an OpenAI-compatible server.",
        epilog="example:\n"
        "  OPENAI_API_KEY=... python tools/annotate_golden.py --model gpt-4o --dry_run \\\n"
        "      --data_path data/sample/rm_data/hh_split_rm.train.json \\\n"
        "      --price_per_million_input 2.5 --price_per_million_output 10 \\\n"
        "      --output_path outputs/golden/hh_split_rm.golden.json",
    )
    add = parser.add_argument
    add("--model", required=True, help="name of the model on the server")
    add("--data_path", required=True, help="prompts: text-scores records, or records with a query")
    add("--data_type", choices=DATA_TYPES, help="reject_sample: records with a query (default: as the first record)")
    add("--output_path", type=Path, required=True, help="the file to write, a JSON list")
    add("--system_prompt", help="first message of every chat: how to answer")
    add("--temperature", type=float, help="(default: the server's; some models take no other)")
    add("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    add("--seed", type=int, help="the server gets one for each answer, and may ignore it (default: none)")
    add("--price_per_million_input", type=float, help="price of a million prompt tokens, in any currency")
    add("--price_per_million_output", type=float, help="price of a million completion tokens")
    add("--dry_run", action="store_true", help="estimate the cost, ask nothing")
    add_server_flags(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> tuple[float, float] | None:
    """Refuses values that cannot work, and returns the prices of input and output.

    Raises:
        InputError: with flag, value and what is expected.
    """
    prices = args.price_per_million_input, args.price_per_million_output
    if (prices[0] is None) != (prices[1] is None):
        raise InputError("expected --price_per_million_input and --price_per_million_output together, found one")
    for name in ("price_per_million_input", "price_per_million_output", "temperature"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"--{name} {value}: expected 0 or more, and finite")
    if args.max_new_tokens < 1:
        raise InputError(f"--max_new_tokens {args.max_new_tokens}: expected at least 1")
    if args.output_path.suffix != ".json":
        raise InputError(f"--output_path {args.output_path}: expected a name that ends in .json")
    refuse_overwriting(args.data_path, args.output_path)
    if not args.dry_run:
        check_server_flags(args)
    return None if None in prices else prices


def log_use(received: list[Completion], max_new_tokens: int, prices: tuple[float, float] | None) -> None:
    """Says what this start of the run has used, by the server's own count."""
    used = sum(c.prompt_tokens for c in received), sum(c.completion_tokens for c in received)
    num_retries = sum(c.num_retries for c in received)
    logger.info("%d answers, %d requests repeated, %s", len(received), num_retries, describe_cost(*used, prices))
    num_truncated = sum(c.is_truncated for c in received)
    if num_truncated:
        logger.warning("%d answers break off at --max_new_tokens %d", num_truncated, max_new_tokens)
    num_turns = count_cuts((c.text for c in received), GOLDEN_STOP_STRINGS)
    if num_turns:
        logger.warning("%d answers cut where they go on to play the user", num_turns)


@exit_on_input_error
def main() -> None:
    """Reads the prompts, says what they may cost, asks for answers that are not there yet, writes the file."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = parse_args()
    prices = check(args)
    prompts = load_prompts(args.data_path, args.data_type)
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    dialogues = [system + messages for messages in render_prompts(args.data_path, prompts, "chat")]

    client = None
    if not args.dry_run:
        client = CompletionClient(args.base_url, timeout=args.timeout, max_retries=args.max_retries)

    # ---- what is there already, each answer under its prompt
    names = ("model", "system_prompt", "temperature", "max_new_tokens", "seed")
    settings = {name: getattr(args, name) for name in names}
    store = ResultStore(args.output_path, settings, notes=client and {"base_url": client.base_url})
    parts = store.load()
    result = {Prompt("", r["query_id"], r["query"]).key: [r["golden"]] for r in store.load_result()}
    if list(result) == [prompt.key for prompt in prompts]:
        print(f"{args.output_path}: there already, with these settings; delete it to ask again")
        return
    done = result | parts
    todo = [(prompt, d) for prompt, d in zip(prompts, dialogues, strict=True) if prompt.key not in done]
    store.log_state(len(prompts) - len(todo), len(prompts), "prompts")

    # ---- what the rest may cost
    estimate = estimate_prompt_tokens(d for _, d in todo), len(todo) * args.max_new_tokens
    logger.info("%d prompts to ask, at most about %s", len(todo), describe_cost(*estimate, prices))
    if client is None:
        return

    # ---- asking
    requests = make_requests(
        todo, model=args.model, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    store.open()
    received: list[Completion] = []
    with tqdm(total=len(prompts), initial=len(prompts) - len(todo), unit="prompt") as progress:

        def keep(prompt: Prompt, completions: list[Completion]) -> None:
            store.append(prompt.key, [format_response(c.text, GOLDEN_STOP_STRINGS) for c in completions])
            received.extend(completions)
            progress.update()

        try:
            complete_all(client, requests, keep=keep, concurrency=args.concurrency, skip_refused=args.skip_refused)
        finally:
            log_use(received, args.max_new_tokens, prices)

    # ---- the result
    responses = done | store.load()
    golden = [
        {"query_id": prompt.query_id, "query": prompt.query, "golden": responses[prompt.key][0]}
        for prompt in answered_prompts(prompts, responses)
    ]
    store.finish(golden)
    num_empty = sum(not record["golden"] for record in golden)
    print(f"{args.output_path}: {len(golden)} golden answers, {num_empty} of them empty")


if __name__ == "__main__":
    main()
