"""Writes a small random LLaMA and a sentencepiece tokenizer, for trials and tests without a download.

    python tools/dev/make_tiny_llama.py --output_dir checkpoints/tiny_llama --hidden_size 64 --num_layers 2

The tokenizer is trained on the given texts with LLaMA's settings (byte-pair encoding, byte fallback, single digits, no
normalisation): `<unk>` is 0, `<s>` 1, `</s>` 2 and the 256 bytes start at 3, as in LLaMA-1 and LLaMA-2.
"""

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error, replacing, write_json
from apo.records import SEPARATOR, read_records

SAMPLE_DIR = Path(__file__).resolve().parents[2] / "data" / "sample"
# Training files only: no text of a validation or test prompt shapes the vocabulary.
DEFAULT_CORPUS = (
    SAMPLE_DIR / "hh_cleaned_origin.train.json",
    SAMPLE_DIR / "rm_data" / "hh_split_rm.golden.json",
    SAMPLE_DIR / "rm_data" / "hh_split_rm_llm_v0.sample.json",
)
NOT_TEXT = ("query_id", "type", "scores")
NUM_FIXED_PIECES = 3 + 256  # special tokens and bytes


def strings_in(value: object) -> Iterator[str]:
    """Yields every string inside nested lists and dicts, except fields that hold no text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_in([inner for key, inner in value.items() if key not in NOT_TEXT])
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def read_lines(path: Path) -> list[str]:
    """Returns the lines of one corpus file; `<sep>` ends a line too."""
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    texts = (text for _, record in read_records(path) for text in strings_in(record))
    return [line for text in texts for part in text.split(SEPARATOR) for line in part.splitlines()]


def read_corpus(paths: Iterable[str | Path]) -> list[str]:
    """Returns the non-empty lines of all texts: `.txt` files are read as they are, all others as records."""
    paths = [Path(path) for path in paths]
    lines = [line for path in paths for line in read_lines(path) if line.strip()]
    if not lines:
        raise InputError(f"{', '.join(map(str, paths))}: no text found, expected at least one line")
    return lines


def train_tokenizer(lines: list[str], vocab_size: int) -> bytes:
    """Returns a `tokenizer.model` of at most `vocab_size` pieces; the same lines give the same bytes."""
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
    with replacing(output_dir / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
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


def check_sizes(hidden_size: int, num_heads: int, vocab_size: int) -> None:
    """Raises an `InputError` for sizes that do not make a LLaMA."""
    if hidden_size % (2 * num_heads):
        raise InputError(
            f"--hidden_size {hidden_size} --num_heads {num_heads}: expected a hidden size that is a multiple of twice "
            f"the heads (rotary positions rotate pairs), for example --hidden_size {2 * num_heads * 8}"
        )
    if vocab_size <= NUM_FIXED_PIECES:
        raise InputError(f"--vocab_size {vocab_size}: expected more than {NUM_FIXED_PIECES} (special tokens, bytes)")


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
        hidden_size: a multiple of `2 * num_heads`.
        vocab_size: rows of the embedding; the tokenizer has at most as many pieces.
        max_position_embeddings: also the tokenizer's `model_max_length`.
        seed: of the weights; the caller's random state does not change.
        corpus: files to train the tokenizer on, see `read_corpus`.

    Raises:
        InputError: sizes that do not fit together, or a corpus without text.
    """
    check_sizes(hidden_size, num_heads, vocab_size)
    tokenizer_model = train_tokenizer(read_corpus(corpus), vocab_size)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)

    output_dir = Path(output_dir)
    model.save_pretrained(output_dir)
    write_tokenizer(output_dir, tokenizer_model, max_position_embeddings)
    return output_dir


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for the model and its tokenizer")
    add("--hidden_size", type=at_least(1), default=64, help="a multiple of twice the heads (default: 64)")
    add("--num_layers", type=at_least(1), default=2, help="transformer layers (default: 2)")
    add("--num_heads", type=at_least(1), default=4, help="attention heads (default: 4)")
    add("--vocab_size", type=int, default=1024, help="pieces, 259 fixed ones included (default: 1024)")
    add("--max_position_embeddings", type=at_least(1), default=512, help="longest input (default: 512)")
    add("--seed", type=int, default=42, help="seed of the random weights (default: 42)")
    files = "texts for the tokenizer: .txt, or JSON, JSONL and parquet records (default: data/sample)"
    add("--corpus", nargs="+", default=DEFAULT_CORPUS, help=files)
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Writes the model and prints its size."""
    args = parse_args()
    output_dir = make_tiny_llama(**vars(args))
    weights = (output_dir / "model.safetensors").stat().st_size
    sizes = f"{args.num_layers} layers x {args.hidden_size}, {args.vocab_size} tokens, {weights / 1e6:.1f} MB"
    print(f"LLaMA of {sizes}: {output_dir}")


if __name__ == "__main__":
    main()
