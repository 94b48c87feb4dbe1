"""Writes a small random LLaMA and a sentencepiece tokenizer, for trials and tests without a download.

    python tools/dev/make_tiny_llama.py --output_dir checkpoints/tiny_llama --hidden_size 64 --num_layers 2

The tokenizer is trained on the given texts with LLaMA's settings (byte-pair encoding, byte fallback, single digits, no
normalisation): `<unk>` is 0, `<s>` 1, `</s>` 2 and the 256 bytes start at 3, as in LLaMA-1 and LLaMA-2.
"""

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from apo.cli import InputError, OneLineParser, at_least, exit_on_input_error, write_json
from apo.records import SEPARATOR, iter_records

SAMPLE_DIR = Path(__file__).resolve().parents[2] / "data" / "sample"
# Training files only: no text of a validation or test prompt shapes the vocabulary.
DEFAULT_CORPUS = (
    SAMPLE_DIR / "hh_cleaned_origin.train.json",
    SAMPLE_DIR / "rm_data" / "hh_split_rm.golden.json",
    SAMPLE_DIR / "rm_data" / "hh_split_rm_llm_v0.sample.json",
)
NOT_TEXT = ("query_id", "type")
NUM_FIXED_PIECES = 3 + 256  # special tokens and bytes


def read_corpus(paths: Iterable[str | Path]) -> list[str]:
    """Returns the non-empty lines of all fields that are texts or lists of texts; `<sep>` ends a line too."""
    fields = (field for path in paths for _, record in iter_records(path) for field in record.items())
    values = (value if isinstance(value, list) else [value] for name, value in fields if name not in NOT_TEXT)
    texts = (text for value in values for text in value if isinstance(text, str))
    lines = [line for text in texts for line in text.replace(SEPARATOR, "\n").splitlines() if line.strip()]
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


def parse_args() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder for the model and its tokenizer")
    add("--hidden_size", type=at_least(1), default=64, help="a multiple of twice the heads (default: 64)")
    add("--num_layers", type=at_least(1), default=2, help="transformer layers (default: 2)")
    add("--num_heads", type=at_least(1), default=4, help="attention heads (default: 4)")
    add("--vocab_size", type=at_least(NUM_FIXED_PIECES + 1), default=1024, help="embedding rows (default: 1024)")
    add("--max_position_embeddings", type=at_least(1), default=512, help="longest input (default: 512)")
    add("--seed", type=int, default=42, help="seed of the random weights (default: 42)")
    add("--corpus", nargs="+", default=DEFAULT_CORPUS, help="records to train the tokenizer on (default: data/sample)")
    args = parser.parse_args()
    if args.hidden_size % (2 * args.num_heads):  # rotary positions rotate pairs
        expected = f"expected a hidden size that is a multiple of twice the heads, such as {16 * args.num_heads}"
        raise InputError(f"--hidden_size {args.hidden_size} --num_heads {args.num_heads}: {expected}")
    return args


@exit_on_input_error
def main() -> None:
    """Writes the model and prints its size; the same flags give the same files."""
    args = parse_args()
    tokenizer_model = train_tokenizer(read_corpus(args.corpus), args.vocab_size)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.max_position_embeddings,
    )
    torch.manual_seed(args.seed)
    LlamaForCausalLM(config).save_pretrained(args.output_dir)
    (args.output_dir / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": args.max_position_embeddings}
    tokenizer_config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer_config |= {"add_bos_token": True, "add_eos_token": False}
    write_json(args.output_dir / "tokenizer_config.json", tokenizer_config)
    print(f"LLaMA of {args.num_layers} layers x {args.hidden_size}, {args.vocab_size} tokens: {args.output_dir}")


if __name__ == "__main__":
    main()
