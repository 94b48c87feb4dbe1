"""Prompts and their responses: the prompts of a file, and the forms that models read and data hold.

`tools/inference_llm.py` (the LLM's samples) and `tools/annotate_golden.py` (golden answers) share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from apo.cli import BadField, InputError, describe, first_few, raise_bad_records

logger = logging.getLogger(__name__)

TEMPLATES = ("plain", "llama-2-chat", "chat")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
TURN = re.compile(rf"\n\n({'|'.join(ROLES)}):")
GOLDEN_STOP_STRINGS = ("\nHuman:",)  # where a strong model plays the user: "\nHumans need water" is an answer
SAMPLE_STOP_STRINGS = ("\nHuman",)  # the reference's rule for the LLM's samples


# ------------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its id and where it stands in its file."""

    place: str
    query_id: str
    query: str

    @property
    def key(self) -> str:
        """What tells it from other prompts, and from itself before it was mended: kept answers stand under it."""
        return hashlib.sha256(json.dumps([self.query_id, self.query]).encode()).hexdigest()[:32]


def hash_prompts(prompts: list[Prompt]) -> str:
    """Identifies the ids and texts of all prompts, whatever the format of their file."""
    return hashlib.sha256(json.dumps([(p.query_id, p.query) for p in prompts]).encode()).hexdigest()


def answered_prompts(prompts: list[Prompt], responses: Mapping[str, list[str]]) -> list[Prompt]:
    """Returns the prompts whose key has responses, in order, and names the others, which the server refused.

    Raises:
        InputError: none has.
    """
    refused = [prompt.query_id for prompt in prompts if prompt.key not in responses]
    if len(refused) == len(prompts):
        raise InputError(f"the server refused all {len(prompts)} prompts; expected an answer to at least one")
    if refused:
        logger.warning(
            "%d prompts refused by the server, left out: %s; the same command asks them again",
            len(refused),
            first_few(refused),
        )
    return [prompt for prompt in prompts if prompt.key in responses]


def chat_messages(query: str) -> list[dict[str, str]]:
    """Splits a dialogue in the Helpful&Harmless form into the messages of a chat.

    `"\\n\\nHuman: Hi\\n\\nAssistant: Yes?\\n\\nHuman: Why?\\n\\nAssistant:"` has three messages. A text without such
    turns is one message of the user. Empty turns are left out, and two turns of one role after another become one,
    because many chat templates accept neither.

    Raises:
        BadField: the user does not have the last word.
    """
    lead, *turns = TURN.split(query)
    messages: list[dict[str, str]] = []
    for role, text in [("Human", lead), *zip(turns[::2], turns[1::2], strict=True)]:
        if not text.strip():
            continue
        if messages and messages[-1]["role"] == ROLES[role]:
            messages[-1]["content"] += f"\n\n{text.strip()}"
        else:
            messages.append({"role": ROLES[role], "content": text.strip()})
    if not messages or messages[-1]["role"] != "user":
        expected = 'a dialogue whose last words are the user\'s, then "\\n\\nAssistant:" or nothing'
        raise BadField("query", describe(query[-40:]) + " at the end", expected)
    return messages


def llama_2_chat_text(query: str) -> str:
    """Returns a dialogue in the format of LLaMA-2-chat, without the `<s>` that every tokenizer puts in front."""
    text, system = "", ""
    for message in chat_messages(query):
        if message["role"] == "system":
            system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            text += f"[INST] {system}{message['content']} [/INST]"
            system = ""
        else:
            text += f" {message['content']} </s><s>"
    return text


def render_prompts(path: str, prompts: list[Prompt], template: str) -> list[str | list[dict[str, str]]]:
    """Returns what the model reads: text, or for `chat` the messages that its own template is for.

    Raises:
        InputError: dialogues that make no chat.
    """
    render = {"plain": str, "llama-2-chat": llama_2_chat_text, "chat": chat_messages}[template]
    rendered, problems = [], []
    for prompt in prompts:
        try:
            rendered.append(render(prompt.query))
        except BadField as error:
            problems.append(f"{prompt.place}: {error}")
    raise_bad_records(path, problems)
    return rendered


def stop_strings_of(template: str) -> tuple[str, ...]:
    """Returns what an LLM writes when it goes on to play the user."""
    return (*SAMPLE_STOP_STRINGS, "[INST]") if template == "llama-2-chat" else SAMPLE_STOP_STRINGS


def count_cuts(texts: Iterable[str], stop_strings: tuple[str, ...]) -> int:
    """Counts the texts that `format_response` cuts."""
    return sum(any(stop_string in text for stop_string in stop_strings) for text in texts)


def format_response(text: str, stop_strings: tuple[str, ...]) -> str:
    """Brings a model's text into the form of a response in the data: cut where it goes on to play the user, no white
    space at the end, one space in front.

    Golden and sampled responses must not differ in this, or a reward model learns the space instead of the content.
    An empty answer stays empty. Half a surrogate pair, which no file can hold, becomes a question mark.
    """
    for stop_string in stop_strings:
        text = text.split(stop_string, maxsplit=1)[0]
    text = text.encode(errors="replace").decode().strip()
    return f" {text}" if text else ""


def derive_seed(seed: int, query_id: str, sample: int) -> int:
    """Returns the seed of one response, in [0, 2**31).

    It depends on nothing but the run's seed, the prompt's id and the number of the sample, so not on order, batches or
    processes.
    """
    key = json.dumps([seed, query_id, sample]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4]) >> 1


@dataclass(frozen=True, slots=True)
class Decoding:
    """How responses are drawn; the names are those of transformers, and of the flags.

    `temperature` 0 is greedy, `top_k` 0 all tokens, `top_p` 1 and `repetition_penalty` 1 are off.
    """

    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    max_new_tokens: int

    def check(self) -> None:
        """Refuses values that cannot work.

        Raises:
            InputError: with flag, value and what is expected.
        """
        for name, is_right, expected in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0 (1 is none)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not is_right:
                raise InputError(f"--{name} {getattr(self, name)}: expected {expected}")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(
                f"--temperature 0 --num_samples {self.num_samples}: expected 1, they would all be the same"
            )
