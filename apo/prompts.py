"""Prompts and responses as text: dialogues, chat messages, templates, and the form of a response in the data."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from apo.cli import BadField, describe, raise_bad_records

ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
REASONING_TAGS = [rf"(?:<{slash}(?:seed:)?(?i:think|thinking)>|\[{slash}THINK\])" for slash in ("", "/")]
REASONING_TAG = re.compile(REASONING_TAGS[0])
TURN = re.compile(rf"\n\n({'|'.join(ROLES)}):")
# Where a response ends, because the model continues as the user.
GOLDEN_STOP_STRINGS = ("\nHuman:",)  # "\nHumans need water" is part of a response
SAMPLE_STOP_STRINGS = ("\nHuman",)  # the reference's rule for the LLM's responses
DOUBTS = {  # about a pair, which is read all the same
    "no_prompt": "no prompt, each text is one whole sequence",
    "empty_preferred": "an empty response is preferred",
    "repeated_prompts": "all responses begin with the prompt",
    "turns_in_responses": "a response holds a turn of the dialogue, such as \\n\\nHuman:",
    "reasoning_in_responses": "a response holds reasoning, such as <think>",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, its id, and its place in its file ("record 3", "line 3")."""

    place: str
    query_id: str
    query: str

    @property
    def key(self) -> str:
        """A hash of id and text: kept responses are found by it, but not after the prompt was changed."""
        return hashlib.sha256(json.dumps([self.query_id, self.query]).encode()).hexdigest()[:32]


def hash_prompts(prompts: list[Prompt]) -> str:
    """Returns a hash of the ids and texts of all prompts; it does not depend on the format of their file."""
    return hashlib.sha256(json.dumps([(p.query_id, p.query) for p in prompts]).encode()).hexdigest()


def chat_messages(query: str) -> list[dict[str, str]]:
    """Splits a dialogue in the Helpful&Harmless format into chat messages.

    `"\\n\\nHuman: Hi\\n\\nAssistant: Yes?\\n\\nHuman: Why?\\n\\nAssistant:"` has three messages. A text without such
    turns is one user message. Empty turns are left out, and consecutive turns of one role are joined, because many
    chat templates accept neither.

    Raises:
        BadField: the last message is not the user's.
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
        expected = 'a dialogue that ends with a user turn, then "\\n\\nAssistant:" or nothing'
        raise BadField("query", describe(query[-40:]) + " at the end", expected)
    return messages


def llama_2_chat_text(query: str) -> str:
    """Returns a dialogue in the format of LLaMA-2-chat, without the first `<s>`, which the tokenizer adds."""
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


TEMPLATES = {"plain": str, "llama-2-chat": llama_2_chat_text, "chat": chat_messages}


def render_prompts(path: str, prompts: list[Prompt], template: str) -> list[str | list[dict[str, str]]]:
    """Returns the input of the model for each prompt, in order.

    That is a text (`plain`: as it is; `llama-2-chat`), or for `chat` the messages that the model's own template reads.

    Raises:
        InputError: dialogues that cannot become a chat; `path` is the file that it names.
    """
    rendered, problems = [], []
    for prompt in prompts:
        try:
            rendered.append(TEMPLATES[template](prompt.query))
        except BadField as error:
            problems.append(f"{prompt.place}: {error}")
    raise_bad_records(path, problems)
    return rendered


def stop_strings_of(template: str) -> tuple[str, ...]:
    """Returns the strings at which a sampled response ends, because the model continues as the user."""
    return (*SAMPLE_STOP_STRINGS, "[INST]") if template == "llama-2-chat" else SAMPLE_STOP_STRINGS


def count_cuts(texts: Iterable[str], stop_strings: tuple[str, ...]) -> int:
    """Counts the texts that `format_response` cuts."""
    return sum(any(stop_string in text for stop_string in stop_strings) for text in texts)


def format_response(text: str, stop_strings: tuple[str, ...]) -> str:
    """Returns a model's text as a response of the data: cut at the first stop string, stripped, one space in front.

    Golden and sampled responses must have the same form, or a reward model learns the space instead of the content.
    An empty response stays empty. An unpaired surrogate, which cannot be written as UTF-8, becomes a question mark.
    """
    for stop_string in stop_strings:
        text = text.split(stop_string, maxsplit=1)[0]
    text = text.encode(errors="replace").decode().strip()
    return f" {text}" if text else ""


def find_doubts(prompt: str, responses: list[str], scores: list[float]) -> list[str]:
    """Returns the names in `DOUBTS` of what is odd about the responses to a prompt; the prompt may be empty."""
    prompt, worst = prompt.strip(), min(scores)
    found = {
        "no_prompt": not prompt,
        "empty_preferred": any(s > worst and not text.strip() for s, text in zip(scores, responses, strict=True)),
        "repeated_prompts": prompt and all(text.lstrip().startswith(prompt) for text in responses),
        "turns_in_responses": prompt and any(map(TURN.search, responses)),
        "reasoning_in_responses": any(map(REASONING_TAG.search, responses)),
    }
    return [name for name in DOUBTS if found[name]]


def normalize_space(text: str) -> str:
    """Returns a text with single spaces; texts that differ in white space only become equal."""
    return " ".join(text.split())
