"""Golden responses to the prompts of a file, from a strong model behind an OpenAI-compatible server.

    python tools/annotate_golden.py --model gpt-4o --data_path data/sample/rm_data/hh_split_rm.train.json \\
        --price_per_million 2.5 10 --output_path outputs/hh_split_rm.golden.json

writes the file that `tools/apo_data_converter.py --golden_data_path` reads, in the order of the data:

    {"query_id": "...", "query": "<prompt>", "golden": " <response>"}

The largest possible cost of all prompts is logged before the first request; `--dry_run` ends there. An interrupted run
resumes when it is started again, and a finished one requests only prompts that are new, were changed since, or have no
response; docs/data.md says what counts as one. After a failure and Ctrl-C requests in progress are completed and kept;
a kill loses these, at most `--concurrency` of them.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable
from pathlib import Path

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error
from apo.generation import generate_responses
from apo.prompts import GOLDEN_STOP_STRINGS, render_prompts
from apo.records import load_prompts
from apo.resume import ResultStore, refuse_overwriting
from apo.server import ServerEngine, add_server_flags

logger = logging.getLogger("annotate_golden")

BYTES_PER_TOKEN = 3  # of UTF-8: English has about 4, Chinese and Japanese one character of 3
TOKENS_PER_MESSAGE = 4  # role and delimiters


def estimate_prompt_tokens(dialogues: Iterable[list[dict[str, str]]]) -> int:
    """Estimates the prompt tokens of chats, rather high: one token for 3 bytes, and 4 for each message."""
    messages = [message for dialogue in dialogues for message in dialogue]
    return sum(math.ceil(len(m["content"].encode()) / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE for m in messages)


def parse_args() -> argparse.Namespace:
    """Reads the command line; raises an InputError if flags do not fit together."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="name of the model on the server")
    add("--data_path", required=True, help="prompts: text-scores records, or records with a query")
    add("--output_path", type=Path, required=True, help="the file to write, a JSON list")
    add("--system_prompt", help="first message of every chat: how to respond")
    add("--temperature", type=at_least(0.0), help="(default: that of the server; some models accept no other)")
    add("--max_new_tokens", type=at_least(1), default=512, help="tokens of a response (default: 512)")
    add("--seed", type=int, help="the server gets one for each response, and may ignore it (default: none)")
    add("--price_per_million", nargs=2, type=at_least(0.0), metavar=("INPUT", "OUTPUT"), help="of tokens, to estimate")
    add("--dry_run", action="store_true", help="estimate the cost, send no request")
    add_server_flags(parser)
    args = parser.parse_args()
    if args.output_path.suffix != ".json":
        raise InputError(f"--output_path {args.output_path}: expected a name that ends in .json")
    refuse_overwriting(args.data_path, args.output_path)
    return args


@exit_on_input_error
def main() -> None:
    """Parse -> prompts -> estimate of the cost -> responses -> result."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = parse_args()
    prompts = load_prompts(args.data_path)
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    rendered = render_prompts(args.data_path, prompts, "chat")
    dialogues = {prompt: system + messages for prompt, messages in zip(prompts, rendered, strict=True)}

    # ---- estimate
    num_in, num_out = estimate_prompt_tokens(dialogues.values()), len(prompts) * args.max_new_tokens
    words = f"{len(prompts)} prompts: at most about {num_in:,} prompt tokens and {num_out:,} completion tokens"
    if args.price_per_million:
        price_in, price_out = args.price_per_million
        words += f", {(num_in * price_in + num_out * price_out) / 1e6:,.2f} at the given prices"
    logger.info(words)
    if args.dry_run:
        return

    # ---- responses
    body = {"model": args.model, "max_completion_tokens": args.max_new_tokens}
    body |= {} if args.temperature is None else {"temperature": args.temperature}
    engine = ServerEngine(dialogues, body, args, 1, GOLDEN_STOP_STRINGS)
    names = ("model", "system_prompt", "temperature", "max_new_tokens", "seed")
    settings = {name: getattr(args, name) for name in names}
    store = ResultStore(args.output_path, settings, notes=engine.notes)
    records = generate_responses(store, prompts, engine, ["golden"], may_miss=args.skip_refused)
    if records is not None:
        print(f"{args.output_path}: {len(records)} golden responses")


if __name__ == "__main__":
    main()
