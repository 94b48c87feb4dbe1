"""A tiny policy and random items, for the tests of the LLM's losses and of its forward pass."""

import torch
from conftest import TINY_SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from apo.policy import MODEL_INPUTS, sum_logprobs
from apo.policy_data import PolicyDataCollator
from apo.policy_model import policy_class


def random_items(num_items: int = 5, num_responses: int = 2, seed: int = 0) -> list[dict]:
    """Items of random ids; prompts of 1 to 9 tokens, responses of 1 to 12, the best first."""
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(3, 100, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": [1, *ids(8)],
            "response_ids": [[*ids(11), 2] for _ in range(num_responses)],
            "scores": [float(num_responses - i) for i in range(num_responses)],
            "query_id": str(number),
        }
        for number in range(num_items)
    ]


def make_policy(attention: str = "tree_branches", seed: int = 0) -> LlamaForCausalLM:
    """A tiny LLaMA whose log-probabilities differ from token to token."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=100, **TINY_SIZES)
    config._attn_implementation = attention
    model = policy_class(LlamaForCausalLM)(config)
    for weight in model.parameters():
        weight.data *= 3
    return model.eval()


def logps_of(model: LlamaForCausalLM, items: list[dict], batching: str = "tree") -> tuple[torch.Tensor, dict]:
    """Log-probabilities (B, R) and the batch that they are of."""
    batch = PolicyDataCollator(batching)(items)
    logprobs = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
    return sum_logprobs(logprobs, batch["lengths"]), batch


def gradients_of(loss: torch.Tensor, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
