"""Seeded sampling from an LLM on this machine: the same seed gives the same responses on any number of processes.

Every response has a random stream of its own, whose seed comes from its prompt and its number. Batches are formed over
the whole file and processes share whole ones, so whoever computes a batch computes the same, as long as it does so
with the same number of threads. Another batch size changes the rounding: in float32 responses stay the same, in
bfloat16 rounding may flip a token.

B prompts, N = B x samples sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from apo.cli import InputError
from apo.prompts import Decoding, Prompt, derive_seed

logger = logging.getLogger(__name__)

STOP_STRING_TOKENS = 16  # hold any stop string, even byte by byte


# ------------------------------------------------------------------------------------------------ loading


def _reason(error: Exception) -> str:
    return " ".join(str(error).split("\n", maxsplit=1)[0].split()) or type(error).__name__


def load_tokenizer(path: str, template: str) -> PreTrainedTokenizerBase:
    """Loads the LLM's tokenizer.

    Raises:
        InputError: there is none, or it has no chat template where one is asked for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises bare ones for a tokenizer.json it cannot read
        raise InputError(f"{path}: no usable tokenizer ({_reason(error)})") from error
    if template == "chat" and not tokenizer.chat_template:
        raise InputError(f"{path}: found no chat template in the tokenizer; --prompt_template plain needs none")
    tokenizer.model_max_length = int(1e30)  # lengths are ours to check
    return tokenizer


def load_llm(path: str, dtype: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Loads the LLM onto this process's device; how it decodes is not left to its `generation_config.json`.

    Raises:
        InputError: weights that cannot be read, or that are incomplete, such as those of a reward model.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be loaded ({_reason(error)})") from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{path}: the checkpoint lacks weights ({names}); expected a complete language model")
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos[0] if isinstance(eos, list) else eos)
    num_gpus = torch.cuda.device_count()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % num_gpus}" if num_gpus else "cpu"
    return model.eval().to(device)


# ------------------------------------------------------------------------------------------------ tokenising, batching


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rendered: list[Any], template: str, max_length: int
) -> list[list[int]]:
    """Encodes rendered prompts; of one that is longer than `max_length` tokens the front is cut, bos kept.

    Raises:
        InputError: the model's chat template refuses a dialogue, for example for its system message.
    """
    if template == "chat":
        try:
            rendered = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in rendered]
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses a prompt ({error}); --prompt_template plain needs none"
            ) from error
    token_ids = tokenizer(rendered, add_special_tokens=template != "chat").input_ids
    num_cut = sum(len(ids) > max_length for ids in token_ids)
    if num_cut:
        logger.warning("%d of %d prompts cut in front to %d tokens", num_cut, len(token_ids), max_length)
    return [ids if len(ids) <= max_length else _cut_front(ids, max_length, tokenizer) for ids in token_ids]


def _cut_front(ids: list[int], max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = ids[: ids[0] == tokenizer.bos_token_id]
    return bos + ids[len(ids) - max_length + len(bos) :]


def check_positions(token_ids: list[list[int]], max_new_tokens: int, num_positions: int) -> None:
    """Refuses prompts that leave the model no room for its answer."""
    longest = max(map(len, token_ids))
    if longest + max_new_tokens > num_positions:
        raise InputError(
            f"the longest prompt has {longest} tokens and --max_new_tokens is {max_new_tokens}, the model has "
            f"{num_positions} positions; expected together at most that: lower --max_length or --max_new_tokens"
        )


def form_batches(token_ids: list[list[int]], batch_size: int) -> list[list[int]]:
    """Groups prompts (indices) by length, the longest first: what does not fit into the memory fails at once."""
    order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# ------------------------------------------------------------------------------------------------ generating


class GumbelNoise(LogitsProcessor):
    """The last step before the argmax: adds Gumbel noise, which turns the argmax into a draw from the softmax.

    Each row takes its noise from a generator of its own, so that a response depends on no other row.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, T), (N, V) -> (N, V); -log of an exponential variable is a Gumbel variable."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()


class UserTurn(StoppingCriteria):
    """Stops a row that goes on to play the user: what follows would be cut off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, stop_strings: tuple[str, ...]) -> None:
        self._tokenizer, self._prompt_length, self._stop_strings = tokenizer, prompt_length, stop_strings

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """(N, T) -> (N,) bool."""
        begin = max(self._prompt_length, input_ids.shape[1] - STOP_STRING_TOKENS)
        texts = self._tokenizer.batch_decode(input_ids[:, begin:])
        is_done = [any(stop_string in text for stop_string in self._stop_strings) for text in texts]
        return torch.tensor(is_done, device=input_ids.device)


def sampling_steps(decoding: Decoding, seeds: list[int], device: torch.device) -> LogitsProcessorList:
    """What happens to the logits before the argmax, in the order of transformers' own sampling."""
    steps = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.temperature > 0:
        steps.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k:
            steps.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            steps.append(TopPLogitsWarper(decoding.top_p))
        steps.append(GumbelNoise(seeds, device))
    return steps


def _tensors(token_ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pads B prompts on the left; returns ids and mask, both (B, T).

    Each is padded with its own first token: attention does not see it, and to the repetition penalty, which asks what
    tokens a row holds, it is nothing new.
    """
    width = max(map(len, token_ids))
    rows = [ids[:1] * (width - len(ids)) + ids for ids in token_ids]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in token_ids]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    token_ids: list[list[int]],
    seeds: list[int],
    decoding: Decoding,
    stop_strings: tuple[str, ...],
) -> list[str]:
    """Continues B prompts, `decoding.num_samples` times each, every time with the random stream of a seed of its own.

    Args:
        model: the LLM.
        tokenizer: its tokenizer.
        token_ids: B prompts.
        seeds: N = B * num_samples, those of the first prompt first.
        decoding: how to draw.
        stop_strings: where a response ends because the model goes on to play the user.

    Returns:
        the N new texts, in the order of the seeds.
    """
    input_ids, mask = _tensors(token_ids, model.device)  # (B, T)
    cache = DynamicCache(config=model.config)
    if input_ids.shape[1] > 1:  # a prompt is read once for all its samples; its last token is left for generate()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        start = {"input_ids": input_ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
        model(**start, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(decoding.num_samples)
    sequences = model.generate(
        input_ids=input_ids.repeat_interleave(decoding.num_samples, 0),  # (N, T)
        attention_mask=mask.repeat_interleave(decoding.num_samples, 0),
        past_key_values=cache,
        max_new_tokens=decoding.max_new_tokens,
        logits_processor=sampling_steps(decoding, seeds, model.device),
        stopping_criteria=StoppingCriteriaList([UserTurn(tokenizer, input_ids.shape[1], stop_strings)]),
    )
    return tokenizer.batch_decode(sequences[:, input_ids.shape[1] :], skip_special_tokens=True)


def sample_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: list[Prompt],
    token_ids: list[list[int]],
    batches: list[list[int]],
    decoding: Decoding,
    seed: int,
    stop_strings: tuple[str, ...],
) -> Iterator[tuple[Prompt, list[str]]]:
    """Yields the prompts of the given batches (indices) with their texts, as the model gives them.

    Raises:
        InputError: a batch does not fit into the GPU's memory.
    """
    num_samples = decoding.num_samples
    for batch in batches:
        seeds = [derive_seed(seed, prompts[i].query_id, sample) for i in batch for sample in range(num_samples)]
        inputs = {"token_ids": [token_ids[i] for i in batch], "seeds": seeds}
        try:
            texts = generate(model, tokenizer, **inputs, decoding=decoding, stop_strings=stop_strings)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{len(batch)} prompts x {num_samples} samples at a time do not fit into the GPU's memory; expected a "
                "smaller --per_device_eval_batch_size; what is finished is kept"
            ) from error
        for place, i in enumerate(batch):
            yield prompts[i], texts[place * num_samples : (place + 1) * num_samples]
