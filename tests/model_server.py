"""A server of the OpenAI protocol with a model behind it, for models that take milliseconds.

python tests/model_server.py MODEL_FOLDER PORT [SERVED_NAME]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from completion_server import CompletionServer
from transformers import AutoModelForCausalLM

from apo.sampling import load_tokenizer


class ModelServer(CompletionServer):
    """Responds with what the model generates; one request at a time."""

    def __init__(self, folder: str, port: int, served_name: str) -> None:
        super().__init__(port, served_name)
        self.tokenizer = load_tokenizer(folder, "plain")
        self.llm = AutoModelForCausalLM.from_pretrained(folder)

    def complete(self, body: dict[str, Any]) -> str:
        """Returns the text after the prompt of a request."""
        ids = torch.tensor([self.tokenizer(body["prompt"])["input_ids"]])
        with self.lock:
            torch.manual_seed(body["seed"])
            settings = {"temperature": body["temperature"], "max_new_tokens": body["max_tokens"], "do_sample": True}
            output = self.llm.generate(ids, **settings)
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    folder, port, *name = sys.argv[1:]
    ModelServer(folder, int(port), (name or [folder])[0]).serve_forever()
