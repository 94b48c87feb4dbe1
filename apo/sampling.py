"""Seeded sampling from an LLM on this machine: the same seed gives the same responses on any number of processes.

Every response has its own random stream, seeded by the prompt's id and the number of the response. Batches are formed
over the whole file, and processes share whole batches. Another number of threads or batch size changes the rounding:
in float32 another batch size leaves responses the same, but in bfloat16 a token may change.

B prompts, N = B x samples sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.generation import logits_process
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from apo.adapters import refuse_adapter
from apo.cli import InputError
from apo.generation import BrokenOff, Decoding, derive_seed
from apo.launch import count_processes, process_rank
from apo.prompts import Prompt, count_cuts, hash_prompts, stop_strings_of
from apo.resume import model_version

logger = logging.getLogger(__name__)

TEMPLATE_SECONDS = 10  # that the model's chat template may take for a prompt


def _reason(error: Exception) -> str:
    return " ".join(str(error).split("\n", maxsplit=1)[0].split()) or type(error).__name__


def load_tokenizer(path: str, template: str) -> PreTrainedTokenizerBase:
    """Loads the LLM's tokenizer.

    Raises:
        InputError: it cannot be loaded, or `template` is `chat` and it has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones for a tokenizer.json it cannot read
        raise InputError(f"{path}: no usable tokenizer ({_reason(error)})") from error
    if template == "chat" and not tokenizer.chat_template:
        raise InputError(f"{path}: found no chat template in the tokenizer; --prompt_template plain needs none")
    tokenizer.model_max_length = int(1e30)  # no warning: LocalEngine compares lengths
    return tokenizer


def load_llm(path: str, dtype: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Loads the LLM onto the device of this process; of its `generation_config.json` only the end tokens are used.

    Raises:
        InputError: weights that cannot be read, or that are incomplete, such as those of a reward model; an adapter.
    """
    refuse_adapter(path)
    try:
        options = {"output_loading_info": True, "trust_remote_code": False}
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be loaded ({_reason(error)})") from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{path}: the checkpoint lacks weights ({names}); expected a complete language model")
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos[0] if isinstance(eos, list) else eos)
    num_gpus = torch.cuda.device_count()
    device = f"cuda:{process_rank() % num_gpus}" if num_gpus else "cpu"
    return model.eval().to(device)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rendered: list[Any], template: str, max_length: int
) -> list[list[int]]:
    """Encodes rendered prompts; of more than `max_length` tokens the first are cut, but not bos.

    Raises:
        InputError: the model's chat template refuses a dialogue, such as for its system message, or does not end.
    """
    if template == "chat":
        render = functools.partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        try:
            default = (signal.SIGTERM, signal.SIG_DFL)  # a template is a program, and may not end; this kills it
            with multiprocessing.get_context("fork").Pool(1, signal.signal, default) as pool:
                texts = pool.imap(render, rendered)
                rendered = [texts.next(TEMPLATE_SECONDS) for _ in rendered]
        except Exception as error:  # it can raise anything
            found = f"refuses a prompt ({_reason(error)}), for which it has {TEMPLATE_SECONDS} s"
            raise InputError(f"the model's chat template {found}; --prompt_template plain needs none") from error
    token_ids = tokenizer(rendered, add_special_tokens=template != "chat").input_ids
    too_long = [ids for ids in token_ids if len(ids) > max_length]
    for ids in too_long:
        num_bos = int(ids[0] == tokenizer.bos_token_id)
        del ids[num_bos : num_bos + len(ids) - max_length]
    if too_long:
        logger.warning("%d of %d prompts cut to their last %d tokens", len(too_long), len(token_ids), max_length)
    return token_ids


class GumbelNoise(logits_process.LogitsProcessor):
    """Adds Gumbel noise to the logits, so that their argmax is a draw from the softmax.

    Each row has its own generator, so that a response does not depend on other rows.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(N, T), (N, V) -> (N, V); -log of an exponential variable is a Gumbel variable."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log_()


def sampling_steps(decoding: Decoding, seeds: list[int], device: torch.device) -> logits_process.LogitsProcessorList:
    """Returns the logits processors, in the order in which transformers samples; greedy search follows."""
    steps = logits_process.LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.temperature > 0:
        steps.append(logits_process.TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k:
            steps.append(logits_process.TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            steps.append(logits_process.TopPLogitsWarper(decoding.top_p))
        steps.append(GumbelNoise(seeds, device))
    return steps


class LocalEngine:
    """An `apo.generation.Engine` with an LLM on this machine, in one of several processes."""

    def __init__(
        self, rendered: dict[Prompt, Any], config: PreTrainedConfig, decoding: Decoding, flags: argparse.Namespace
    ) -> None:
        """Tokenises all prompts of the file: `rendered` has the text of each, or the messages of a chat.

        Raises:
            InputError: the tokenizer cannot be loaded, or the prompts do not fit the model.
        """
        self.path, self.template, self.dtype = flags.model_name_or_path, flags.prompt_template, flags.dtype
        self.decoding, self.seed = decoding, flags.seed
        self.tokenizer = load_tokenizer(self.path, self.template)
        token_ids = tokenize(self.tokenizer, list(rendered.values()), self.template, flags.max_length)
        self.token_ids = dict(zip(rendered, token_ids, strict=True))
        num_tokens = max(map(len, token_ids)) + decoding.max_new_tokens
        if num_tokens > config.max_position_embeddings:
            found = f"{num_tokens} tokens of a prompt and its response, {config.max_position_embeddings} positions"
            raise InputError(f"found up to {found}; lower --max_length or --max_new_tokens")
        # The longest first: a batch that is too large for memory fails at once.
        order = sorted(rendered, key=lambda prompt: -len(self.token_ids[prompt]))
        batch_size = flags.per_device_eval_batch_size
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.batches = batches[process_rank() :: count_processes()]
        self.share = [prompt for batch in self.batches for prompt in batch]
        self.notes: dict[str, Any] = {}
        self.stop_strings = stop_strings_of(self.template)
        self.missing: Counter[str] = Counter()
        self.settings = {
            "max_length": flags.max_length,
            "dtype": self.dtype,
            "model_version": model_version(self.path, getattr(config, "_commit_hash", None)),
            "prompts_sha256": hash_prompts(list(rendered)),  # another prompt changes the batches
        }

    def generate(self, prompts: list[Prompt], keep: Callable[[Prompt, list[str]], None]) -> None:
        """See `Engine`; a batch of which some prompts are finished is computed again as a whole.

        Raises:
            InputError: the weights cannot be loaded, or a batch does not fit into the GPU's memory.
        """
        if not prompts:
            return
        todo, num_samples = set(prompts), self.decoding.num_samples
        model = load_llm(self.path, self.dtype, self.tokenizer)
        for batch in self.batches:
            if todo.isdisjoint(batch):
                continue
            seeds = [derive_seed(self.seed, prompt.query_id, n) for prompt in batch for n in range(num_samples)]
            try:
                texts = self.continue_prompts(model, [self.token_ids[prompt] for prompt in batch], seeds)
            except torch.OutOfMemoryError as error:
                found = f"{len(batch)} prompts x {num_samples} responses do not fit into the GPU's memory"
                expected = "expected a smaller --per_device_eval_batch_size; finished responses are kept"
                raise InputError(f"{found}; {expected}") from error
            for i, prompt in enumerate(batch):
                if prompt in todo:
                    keep(prompt, texts[i * num_samples : (i + 1) * num_samples])

    @torch.no_grad()
    def continue_prompts(self, model: PreTrainedModel, token_ids: list[list[int]], seeds: list[int]) -> list[str]:
        """Continues B prompts, `decoding.num_samples` times each; returns N texts, one for each seed, in order."""
        num_tokens, num_samples = max(map(len, token_ids)), self.decoding.num_samples
        # Padding is a prompt's own first token, so that the repetition penalty sees no other token.
        padded = [ids[:1] * (num_tokens - len(ids)) + ids for ids in token_ids]
        input_ids = torch.tensor(padded, device=model.device)  # (B, T)
        mask = torch.tensor([[0] * (num_tokens - len(ids)) + [1] * len(ids) for ids in token_ids], device=model.device)
        cache = DynamicCache(config=model.config)
        if num_tokens > 1:  # reads a prompt once for all its responses, up to the last token, for generate()
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            start = {"input_ids": input_ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
            model(**start, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(num_samples)
        sequences = model.generate(
            input_ids=input_ids.repeat_interleave(num_samples, 0),  # (N, T)
            attention_mask=mask.repeat_interleave(num_samples, 0),
            past_key_values=cache,
            max_new_tokens=self.decoding.max_new_tokens,
            logits_processor=sampling_steps(self.decoding, seeds, model.device),
            stop_strings=list(self.stop_strings),
            tokenizer=self.tokenizer,
        )
        responses = sequences[:, num_tokens:]  # padded with an end token
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        if responses.shape[1] < self.decoding.max_new_tokens:
            return texts
        eos = model.generation_config.eos_token_id
        ends = torch.tensor([] if eos is None else eos, device=responses.device)
        has_end = torch.isin(responses[:, -1], ends).tolist()
        return [
            text if ended or count_cuts([text], self.stop_strings) else BrokenOff(text)
            for text, ended in zip(texts, has_end, strict=True)
        ]
