"""Write a small random LLaMA with a sentencepiece tokenizer of its own, for trials and tests without a download.

    python tools/dev/make_tiny_llama.py --output_dir checkpoints/tiny_llama --hidden_size 64 --num_layers 2

The tokenizer is trained on the given texts with LLaMA's settings (byte-pair encoding, byte fallback, digits split, no
normalisation), so that `<unk>` is 0, `<s>` 1, `</s>` 2 and the 256 bytes start at 3, as in LLaMA-1 and LLaMA-2.
"""

import argparse
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from apo.cli import InputError, OneLineParser, exit_on_input_error, write_json
from apo.records import SEPARATOR, read_records

REPO_ROOT = Path(__file__).resolve().parents[2]

# Training files only: no text of a validation or test prompt shapes the vocabulary.
DEFAULT_CORPUS = tuple(
    REPO_ROOT / "data" / "sample" / name
    for name in (
        "hh_cleaned_origin.train.json",
        "rm_data/hh_split_rm.golden.json",
        "rm_data/hh_split_rm_llm_v0.sample.json",
    )
)
NOT_TEXT = ("query_id", "type", "scores")
NUM_SPECIAL_AND_BYTE_PIECES = 3 + 256


def strings_in(value: object) -> Iterator[str]:
    """Yields every string inside nested lists and dicts, fields that hold no text left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in NOT_TEXT:
                yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def read_corpus(paths: Iterable[str | Path]) -> list[str]:
    """Returns the lines of text files and of all texts in JSON, JSONL or parquet records.

    Args:
        paths: files; one that ends in `.txt` is read as it is, any other as records.

    Raises:
        InputError: a file cannot be read, or there is no text at all.
    """
    paths = list(paths)
    lines: list[str] = []
    for path in paths:
        lines.extend(read_lines(Path(path)))
    lines = [line for line in lines if line.strip()]
    if not lines:
        names = ", ".join(map(str, paths)) or "no file"
        raise InputError(f"{names}: no text found, expected at least one line to train the tokenizer on")
    return lines


def read_lines(path: Path) -> list[str]:
    """Returns the lines of one corpus file; the separator of text-scores items is a boundary, too."""
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    texts = (text for _, record in read_records(path) for text in strings_in(record))
    return [line for text in texts for part in text.split(SEPARATOR) for line in part.splitlines()]


def train_tokenizer(lines: list[str], vocab_size: int) -> bytes:
    """Trains a sentencepiece model with LLaMA's settings; the same lines give the same bytes.

    Returns:
        the contents of `tokenizer.model`; never more than `vocab_size` pieces, fewer when the text offers no more.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_surface=" \u2047 ",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(output_dir: Path, model: bytes, model_max_length: int) -> None:
    """Writes `tokenizer.model` and `tokenizer_config.json`."""
    temporary = output_dir / "tokenizer.model.tmp"
    temporary.write_bytes(model)
    os.replace(temporary, output_dir / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": model_max_length,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    write_json(output_dir / "tokenizer_config.json", config)


def check_sizes(hidden_size: int, num_heads: int, vocab_size: int, **positive: int) -> None:
    """Refuses sizes that make no LLaMA.

    Raises:
        InputError: with the flag, its value and what is needed.
    """
    for name, value in {"hidden_size": hidden_size, "num_heads": num_heads, **positive}.items():
        if value < 1:
            raise InputError(f"--{name} {value}: expected a positive number")
    if hidden_size % (2 * num_heads):
        raise InputError(
            f"--hidden_size {hidden_size} --num_heads {num_heads}: expected a hidden size that is a multiple of twice "
            f"the heads (rotary positions turn pairs), for example --hidden_size {2 * num_heads * 8}"
        )
    if vocab_size <= NUM_SPECIAL_AND_BYTE_PIECES:
        raise InputError(
            f"--vocab_size {vocab_size}: expected more than {NUM_SPECIAL_AND_BYTE_PIECES} "
            "(<unk>, <s>, </s> and 256 bytes come first), for example 1024"
        )


def make_tiny_llama(
    output_dir: str | Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    vocab_size: int = 1024,
    max_position_embeddings: int = 512,
    seed: int = 42,
    corpus: Iterable[str | Path] = DEFAULT_CORPUS,
) -> Path:
    """Writes a random `LlamaForCausalLM` and its tokenizer; the same arguments give the same files.

    Args:
        output_dir: made if it is not there.
        hidden_size: a multiple of `2 * num_heads`.
        vocab_size: rows of the embedding; the tokenizer has at most as many pieces.
        max_position_embeddings: the tokenizer's `model_max_length` as well.
        seed: of the weights; the caller's random state is left as it was.
        corpus: files to train the tokenizer on, see `read_corpus`.

    Returns:
        `output_dir` as a path.

    Raises:
        InputError: sizes that do not fit together, or a corpus without text.
    """
    check_sizes(
        hidden_size,
        num_heads,
        vocab_size,
        num_layers=num_layers,
        max_position_embeddings=max_position_embeddings,
    )
    tokenizer_model = train_tokenizer(read_corpus(corpus), vocab_size)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir)
    write_tokenizer(output_dir, tokenizer_model, max_position_embeddings)
    return output_dir


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(
        description="Write a small random LLaMA with a sentencepiece tokenizer of its own.",
        epilog="example:\n"
        "  python tools/dev/make_tiny_llama.py --output_dir checkpoints/tiny_llama --hidden_size 64 --num_layers 2",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--hidden_size", type=int, default=64, help="a multiple of twice the heads (default: 64)")
    parser.add_argument("--num_layers", type=int, default=2, help="transformer layers (default: 2)")
    parser.add_argument("--num_heads", type=int, default=4, help="attention heads (default: 4)")
    parser.add_argument("--vocab_size", type=int, default=1024, help="pieces, 259 fixed ones included (default: 1024)")
    parser.add_argument("--max_position_embeddings", type=int, default=512, help="longest input (default: 512)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the random weights (default: 42)")
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=DEFAULT_CORPUS,
        help="files to train the tokenizer on: .txt, or JSON, JSONL and parquet records (default: data/sample)",
    )
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Writes the model and say how large it is."""
    args = parse_args()
    output_dir = make_tiny_llama(**vars(args))
    weights = (output_dir / "model.safetensors").stat().st_size
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    print(
        f"LLaMA of {config['num_hidden_layers']} layers x {config['hidden_size']}, {config['vocab_size']} tokens, "
        f"{weights / 1e6:.1f} MB: {output_dir}"
    )


if __name__ == "__main__":
    main()
