"""Builds the hh-split layout (docs/data.md) from Anthropic's hh-rlhf: RM, LLM, validation and test, by prompt.

example:
    python tools/build_hh_split.py --output_dir data/hh-split

downloads `helpful-base` and `harmless-base` of `Anthropic/hh-rlhf` from the Hub (Bai et al., arXiv:2204.05862). With
local files, nothing is downloaded:

    python tools/build_hh_split.py --output_dir data/hh-split \\
        --train_data_path hh-rlhf/helpful-base/train.jsonl.gz hh-rlhf/harmless-base/train.jsonl.gz \\
        --test_data_path hh-rlhf/helpful-base/test.jsonl.gz hh-rlhf/harmless-base/test.jsonl.gz

A record holds two dialogues that differ in their last response, {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...",
"rejected": ...}. Two texts are the same if they differ in white space only. No prompt is in two of the four parts; the
pairs of a prompt stay together. The query id is a hash of the pair, so that it is the same in every run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apo.cli import (
    BadField,
    InputError,
    OneLineParser,
    at_least,
    describe_counts,
    exit_on_input_error,
    replacing,
    sha256_of_file,
)
from apo.prompts import chat_messages, normalize_space
from apo.records import SEPARATOR, iter_valid, parse_plain_pair

HUB_REPO = "Anthropic/hh-rlhf"
SUBSETS = ("helpful-base", "harmless-base")  # as many pairs as the paper's data, about 86.3K and 4.66K
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MANIFEST = "hh_split_manifest.json"
REST = "llm"  # the part of all pairs that the other parts do not take
FILES = {  # file -> its parts
    "rm_data/hh_split_rm.train.json": ("rm",),
    "llm_data/hh_split_llm.train.json": ("llm",),
    "hh_cleaned_origin.train.json": ("rm", "llm"),
    "eval_data/hh_split_llm.valid.json": ("valid",),
    "eval_data/hh_cleaned_origin.test.json": ("test",),
}

Record = dict[str, Any]  # a text-scores record of two responses
Groups = dict[str, list[Record]]  # prompt (white space normalised) -> its pairs


def download(split: str) -> list[Path]:
    """Downloads `<subset>/<split>.jsonl.gz` of each subset from the Hub, or finds it in the Hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(HUB_REPO, f"{name}/{split}.jsonl.gz", repo_type="dataset")) for name in SUBSETS]
    except OSError as error:  # huggingface_hub: no network, file or permission
        advice = "give its files by --train_data_path and --test_data_path"
        raise InputError(f"{HUB_REPO}: cannot be downloaded ({normalize_space(str(error))}); {advice}") from error


def split_dialogue(dialogue: str) -> tuple[str, str]:
    """Splits a dialogue after its last "\\n\\nAssistant:"; the prompt is empty where there is none."""
    before, turn, response = dialogue.rpartition(ASSISTANT)
    return before + turn, response


def find_fault(prompt: str, other_prompt: str, chosen: str, rejected: str) -> str:
    """Returns why two split dialogues make no pair; an empty string if they do."""
    if not prompt or not other_prompt or HUMAN in chosen or HUMAN in rejected:
        return "no response at the end"
    if prompt != other_prompt and normalize_space(prompt) != normalize_space(other_prompt):
        return "prompts differ"
    try:
        chat_messages(prompt)
    except BadField:
        return "no question at the end"
    if not chosen.strip() or not rejected.strip():
        return "empty response"
    if normalize_space(chosen) == normalize_space(rejected):
        return "identical responses"
    return f"{SEPARATOR} in the text" if any(SEPARATOR in text for text in (prompt, chosen, rejected)) else ""


def group_by_prompt(dialogues: Iterable[tuple[str, str]], dropped: Counter[str]) -> Groups:
    """Returns the pairs of each prompt, both in file order; counts those left out in `dropped`, by reason."""
    groups: Groups = {}
    seen: set[str] = set()
    for chosen_dialogue, rejected_dialogue in dialogues:
        prompt, chosen = split_dialogue(chosen_dialogue)
        other_prompt, rejected = split_dialogue(rejected_dialogue)
        reason = find_fault(prompt, other_prompt, chosen, rejected)
        content = "\n".join(map(normalize_space, (prompt, chosen, rejected)))
        query_id = "hh_" + hashlib.sha256(content.encode()).hexdigest()[:16]  # 64 bits
        if reason or query_id in seen:
            dropped[reason or "duplicate"] += 1
            continue
        seen.add(query_id)
        record = {"text": [prompt + SEPARATOR + response for response in (chosen, rejected)], "scores": [1.0, 0.0]}
        groups.setdefault(normalize_space(prompt), []).append({**record, "query_id": query_id})
    return groups


def remove_prompts(groups: Groups, test_groups: Groups, dropped: Counter[str]) -> None:
    """Removes the groups of prompts that are in test, and counts their pairs."""
    for prompt in groups.keys() & test_groups.keys():
        dropped["prompt also in test"] += len(groups.pop(prompt))


def partition(groups: Groups, sizes: dict[str, int], seed: int) -> dict[str, list[Record]]:
    """Draws prompts into parts of given sizes (in pairs), and `REST`.

    A prompt goes, with all of its pairs, to the first part with enough room. So a part never has more pairs than its
    size, and fewer only if no prompt that fits is left. A part without a pair is an `InputError`.
    """
    parts: dict[str, list[Record]] = {name: [] for name in (*sizes, REST)}
    prompts = list(groups)
    random.Random(seed).shuffle(prompts)
    for prompt in prompts:
        pairs = groups[prompt]
        name = next((name for name, size in sizes.items() if len(parts[name]) + len(pairs) <= size), REST)
        parts[name] += pairs
    if empty := ", ".join(name for name, pairs in parts.items() if not pairs):
        flags = " ".join(f"--{name}_size {size}" for name, size in sizes.items())
        raise InputError(
            f"found {sum(map(len, groups.values()))} training pairs after cleaning, none of which is left for {empty} "
            f"or fits there ({flags}), expected more, because the pairs of a prompt stay together; give other sizes"
        )
    return parts


def write_split(output_dir: Path, parts: dict[str, list[Record]], manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes the five files and the manifest, which get their names once all are complete, the manifest last.

    Returns the manifest's entry of each file.
    """
    outputs: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:  # renames what was entered first last
        manifest_file = stack.enter_context(replacing(output_dir / MANIFEST))
        for name, file_parts in FILES.items():
            temporary = stack.enter_context(replacing(output_dir / name))
            pairs = [pair for part in file_parts for pair in parts[part]]
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(pairs, file, ensure_ascii=False, indent=1)
            num_prompts = len({normalize_space(pair["text"][0].split(SEPARATOR)[0]) for pair in pairs})
            outputs[name] = {"pairs": len(pairs), "prompts": num_prompts, "sha256": sha256_of_file(temporary)}
        manifest_file.write_text(json.dumps({**manifest, "outputs": outputs}, indent=1), encoding="utf-8")
    return outputs


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    add = (parser := OneLineParser(description=__doc__)).add_argument
    add("--output_dir", type=Path, required=True, help="folder to write to; made if it does not exist")
    train_help = 'records of "chosen", "rejected": .jsonl.gz, .jsonl, .json (default: from the Hub)'
    add("--train_data_path", type=Path, nargs="+", help=train_help)
    add("--test_data_path", type=Path, nargs="+", help="the same, for the test part")
    add("--rm_size", type=at_least(1), default=20_000, help="pairs for the reward model (default: 20000)")
    add("--valid_size", type=at_least(1), default=10_000, help="pairs for validation (default: 10000)")
    add("--seed", type=int, default=42, help="of the partition (default: 42)")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads, cleans, partitions, writes, prints the counts."""
    args = parse_args()
    if bool(args.train_data_path) != bool(args.test_data_path):
        raise InputError("found one of --train_data_path and --test_data_path, expected both or none")
    inputs: dict[str, dict[str, Any]] = {}
    dropped: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    groups: dict[str, Groups] = {}
    for split, paths in {"train": args.train_data_path, "test": args.test_data_path}.items():
        pairs = {path: [pair for _, pair in iter_valid(path, parse_plain_pair)] for path in paths or download(split)}
        inputs[split] = {str(p): {"pairs": len(pairs[p]), "sha256": sha256_of_file(p)} for p in pairs}
        groups[split] = group_by_prompt(itertools.chain(*pairs.values()), dropped[split])
    remove_prompts(groups["train"], groups["test"], dropped["train"])
    if not groups["test"]:
        raise InputError(f"no test pair is left after cleaning; dropped: {describe_counts(dropped['test'], 'pairs')}")

    sizes = {"rm": args.rm_size, "valid": args.valid_size}
    parts = partition(groups["train"], sizes, args.seed)
    parts["test"] = [pair for pairs in groups["test"].values() for pair in pairs]

    manifest = {"inputs": inputs, "dropped": dropped, "sizes": sizes, "seed": args.seed}
    outputs = write_split(args.output_dir, parts, manifest)
    for split, counts in dropped.items():
        num_read = sum(source["pairs"] for source in inputs[split].values())
        print(f"{split}: {num_read} pairs read, {describe_counts(counts, 'pairs')} dropped")
    for name, output in outputs.items():
        print(f"{args.output_dir / name}: {output['pairs']} pairs, {output['prompts']} prompts")


if __name__ == "__main__":
    main()
