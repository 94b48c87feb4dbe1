"""A reward model of this project -> a folder that transformers, TRL, RewardBench, vLLM and SGLang load, checked.

example:
    python tools/export_reward_model.py --model_name_or_path outputs/rm_base --output_dir outputs/rm_base_exported

The folder holds the base model's own class, such as LlamaForSequenceClassification, with one label, the tokenizer, a
chat template and a model card, whose code blocks show how each library is called. Before it gets its name, it is
loaded again, and the rewards of 32 conversations are compared with this project's, from token ids and from text.

Only the pooling types last and eos have this form. `train.py` reads the folder too, with the same settings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import operator
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from apo.cli import InputError, OneLineParser, exit_on_input_error, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from apo.tokenizer import RewardTokenizer
    from models import RewardModel, RewardSettings

CARD = Path(__file__).with_name("exported_model_card.md")
INSTEAD = "score with train.py --task_type inference"  # where other libraries cannot
POOLING_TYPES = ("last", "eos")
TOLERANCE = 1e-5  # of a reward, relative above 1
BATCH_SIZE = 4
CONTENTS = (
    "Why?",
    "Because it  has two spaces, and a long end.",
    " spaces around \n",
    "a tab\tand\n\n\nlines\r\n",
    "30 € 猫 🙂 ﷽ e\u0301 \u200b \u00a0 \x00\x01 ｆｕｌｌ",
    "-----===== 1234567890 ..........",
    "a" * 40,
    "<|x|> {{ y }} [INST] <0x0A> ▁ \\n",
)


# ------------------------------------------------------------------------------------------------ what can be exported


def find_class(path: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the sequence classification class of a config.

    Raises:
        InputError: transformers has none for this type of model.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        found = (
            f"found the architecture {config.model_type}, which has no sequence classification class in transformers"
        )
        raise InputError(f"{path}: {found}, so that no other library can load it; {INSTEAD}")
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def check_settings(path: str, settings: RewardSettings, tokenizer: RewardTokenizer) -> None:
    """Raises an InputError for settings whose rewards other libraries cannot give."""
    if settings.pooling_type not in POOLING_TYPES:
        reason = "a sequence classification class reads one token, the last"
        expected = f"expected {' or '.join(POOLING_TYPES)}: {reason}; train with --pooling_type last"
        raise InputError(f"{path}: found pooling_type {settings.pooling_type}, {expected}")
    if tokenizer.uses_sentencepiece and not settings.add_sep_token:
        reason = "sentencepiece puts a space of its own before a response, which no text of a whole sequence has"
        raise InputError(f"{path}: found no separator, expected one: {reason}; train with --add_sep_token true")


def make_conversations(max_length: int) -> list[list[dict[str, str]]]:
    """Returns 32 conversations that end with a response, of one or more turns; the last 8 are beyond `max_length`."""
    pairs = list(zip(CONTENTS, (*CONTENTS[1:], CONTENTS[0]), strict=True))
    long = [[" ".join([text] * max_length) for text in pair] for pair in pairs]
    turns = [
        *([("user", prompt), ("assistant", response)] for prompt, response in pairs),
        *([("system", response), ("user", prompt), ("assistant", response)] for prompt, response in pairs),
        *([("user", a), ("assistant", b), ("user", "And now?"), ("assistant", a)] for a, b in pairs),
        *([("user", prompt), ("assistant", "Because.")] for prompt, _ in long[:4]),
        *([("user", "Why?"), ("assistant", response)] for _, response in long[4:]),
    ]
    return [[{"role": role, "content": content} for role, content in conversation] for conversation in turns]


def split_conversations(conversations: list[list[dict[str, str]]]) -> tuple[list[str], list[str]]:
    """Returns the prompts and the responses, as training reads them."""
    from apo.records import parse_record

    sides = ({"chosen": messages, "rejected": messages} for messages in conversations)
    records = [parse_record(record, "none", kind="comparison_pair") for record in sides]
    return [record.prompts[0] for record in records], [record.responses[0] for record in records]


def check_ids(
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    conversations: list[list[dict[str, str]]],
    sequences: list[list[int]],
) -> None:
    """Raises an InputError if the exported tokenizer gives a conversation other ids than `sequences`."""
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    found = tokenizer(texts, truncation=True).input_ids
    if num_wrong := sum(map(operator.ne, found, sequences)):
        difference = f"found other token ids than in training for {num_wrong} of {len(texts)} texts"
        raise InputError(f"{path}: {difference}, expected the same from tokenizer.json; {INSTEAD}")


# ------------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` and renames it at the end; after an error nothing is left.

    Raises:
        InputError: there is something already.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"--output_dir {path}: found files, expected a new folder; give another one, or delete it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(
    model: RewardModel,
    model_class: type[PreTrainedModel],
    pad_token_id: int,
    dtype: torch.dtype | None,
    output_dir: Path,
) -> None:
    """Writes config and weights, in `dtype`, None: as they are, but the reward head, `score.weight`, in its own."""
    import torch

    config = model.config
    config.update({"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}})
    config.update({"problem_type": "regression", "pad_token_id": pad_token_id})  # else pipelines apply a sigmoid
    weights = {name: weight.to(dtype or weight.dtype) for name, weight in model.state_dict().items()}
    del weights["reward_head.weight"]
    weights["score.weight"] = model.reward_head.weight
    with torch.device("meta"):
        exported = model_class(config)
    exported.load_state_dict(weights, assign=True)
    exported.save_pretrained(output_dir)
    _add_older_names(output_dir / "config.json")


def _add_older_names(path: Path) -> None:
    """Adds the names of transformers 4, which RewardBench uses; it would take a default base of the rotations."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rotations = config.get("rope_parameters") or {}
    if "rope_theta" in rotations:
        scaling = {name: value for name, value in rotations.items() if name != "rope_theta"}
        config["rope_theta"] = rotations["rope_theta"]
        config["rope_scaling"] = scaling if rotations["rope_type"] != "default" else None
    write_json(path, config)


def write_card(path: str, settings: RewardSettings, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Writes `README.md`: what the model is, the text that it expects, and how each library is called."""
    from apo.run_files import MARKDOWN_ESCAPES, format_table

    example = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    text = tokenizer.apply_chat_template(example, tokenize=False)
    card = Template(CARD.read_text(encoding="utf-8")).substitute(
        source=path.translate(MARKDOWN_ESCAPES),
        text=text.replace("\n", "\\n"),
        special=", ".join(f"`{token}`" for token in tokenizer.all_special_tokens),
        length=tokenizer.model_max_length,
        side=tokenizer.truncation_side,
        settings=format_table(("setting", "value"), [(k, str(v)) for k, v in asdict(settings).items()], 2),
    )
    (output_dir / "README.md").write_text(card, encoding="utf-8")


def check_folder(
    folder: Path, conversations: list[list[dict[str, str]]], sequences: list[list[int]], expected: torch.Tensor
) -> float:
    """Loads a folder as any other program does, and compares its rewards from ids and from text.

    Args:
        sequences: the ids of the conversations in training.
        expected: (N,) this project's rewards.

    Returns:
        The largest difference.

    Raises:
        InputError: it is above the tolerance, or not a number.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    rewards: dict[str, list[torch.Tensor]] = {"ids": [], "text": []}
    for start in range(0, len(texts), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        batches = {
            "ids": tokenizer.pad({"input_ids": sequences[rows]}, return_tensors="pt"),
            "text": tokenizer(texts[rows], truncation=True, padding=True, return_tensors="pt"),
        }
        with torch.no_grad():
            for source, batch in batches.items():
                rewards[source].append(model(**batch).logits[:, 0])
    differences = {source: (torch.cat(found) - expected).abs().max().item() for source, found in rewards.items()}
    for source, difference in differences.items():
        if not difference <= TOLERANCE * max(1, expected.abs().max().item()):
            found = f"found rewards from {source} that differ by {difference:.2g}, expected at most {TOLERANCE:g}"
            raise InputError(f"{type(model).__name__}: {found}; {INSTEAD}")
    return max(differences.values())


# ------------------------------------------------------------------------------------------------ command line


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub name of a reward model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, a new one")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Checks the settings, writes the folder, loads it again and compares rewards."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args()

    import torch
    from transformers.utils import find_adapter_config_file

    from apo.fast_tokenizer import make_fast_tokenizer, save_fast_tokenizer
    from apo.tokenizer import load_reward_tokenizer
    from models import RewardModel, load_config, resolve_settings
    from reward_datasets import build_sequence

    # ---- what other libraries can repeat
    path = args.model_name_or_path
    config = load_config(path)
    model_class, settings = find_class(path, config), resolve_settings(config)
    tokenizer = load_reward_tokenizer(path, config, settings.tokenizer_backend)
    check_settings(path, settings, tokenizer)
    fast_tokenizer = make_fast_tokenizer(tokenizer, pooling_type=settings.pooling_type, **settings.sequence_settings)
    conversations = make_conversations(settings.max_length)
    prompts, responses = split_conversations(conversations)
    ids = zip(tokenizer.encode(prompts), tokenizer.encode(responses), strict=True)
    sequences = [build_sequence(*pair, tokenizer, **settings.sequence_settings) for pair in ids]
    if settings.pooling_type == "last":  # does not read the last token: eos, or what a cut on the right leaves
        sequences = [sequence[:-1] for sequence in sequences]
    check_ids(path, fast_tokenizer, conversations, sequences)

    # ---- the folder
    with complete_folder(args.output_dir) as folder:
        model = RewardModel.from_pretrained(path)
        expected = torch.tensor(model.score(prompts, responses, BATCH_SIZE))
        dtype = None if find_adapter_config_file(path) else config.dtype  # a merged weight has no room in bfloat16
        write_model(model, model_class, fast_tokenizer.pad_token_id, dtype, folder)
        write_card(path, model.settings, fast_tokenizer, folder)
        del model  # room for the other one
        save_fast_tokenizer(fast_tokenizer, folder)
        if tokenizer.uses_sentencepiece:
            shutil.copyfile(tokenizer.sentencepiece_path, folder / "tokenizer.model")
        difference = check_folder(folder, conversations, sequences, expected)
    compared = f"{len(sequences)} rewards differ by at most {difference:.1g} from this project's"
    print(f"{args.output_dir}: {model_class.__name__}; {compared}; README.md says how to load it")


if __name__ == "__main__":
    main()
