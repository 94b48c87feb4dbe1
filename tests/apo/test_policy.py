"""The LLM's losses: by hand, against plain loops, and against TRL on the same ids."""

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import assert_same_gradients, gradients_of, logps_of, make_policy, random_items
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from apo.policy import alignment_metrics, dpo_loss, rrhf_loss, sft_loss

# ------------------------------------------------------------------------------------------------ by hand


def test_sft_loss_is_the_mean_over_tokens():
    """Responses of 1 and 3 tokens: (2 + 3) / (1 + 3)."""
    assert sft_loss(torch.tensor([-2.0, -3.0]), torch.tensor([1, 3])).item() == 1.25


def test_dpo_loss_by_hand():
    """Margin 0.5 * ((-1 + 2) - (-3 + 3)) = 0.5 and 0.5 * ((0 - 0) - (4 - 2)) = -1."""
    logps, reference = torch.tensor([[-1.0, -3.0], [0.0, 4.0]]), torch.tensor([[-2.0, -3.0], [0.0, 2.0]])
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.0))) / 2
    assert dpo_loss(logps, reference, beta=0.5).item() == pytest.approx(expected)


def test_rrhf_loss_by_hand():
    """The example of its docstring, with lengths of 2, 4 and 1."""
    logps, lengths, scores = torch.tensor([[-2.0, -2.0, -2.0]]), torch.tensor([[2, 4, 1]]), torch.tensor([[3.0, 2, 2]])
    assert rrhf_loss(logps, lengths, scores).item() == 1.5


def loop_rrhf_loss(logps: list[list[float]], lengths: list[list[int]], scores: list[list[float]]) -> float:
    total = 0.0
    for prompt_logps, prompt_lengths, rewards in zip(logps, lengths, scores, strict=True):
        p = [logp / length for logp, length in zip(prompt_logps, prompt_lengths, strict=True)]
        for i in range(len(p)):
            for j in range(len(p)):
                if rewards[i] < rewards[j]:
                    total += max(0.0, p[i] - p[j])
        total -= p[rewards.index(max(rewards))]
    return total / len(logps)


responses = st.lists(st.tuples(st.floats(-50, 0), st.integers(1, 20), st.sampled_from([-1.0, 0.0, 2.5])), min_size=1)


@given(st.lists(responses.filter(lambda r: len(r) <= 5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_rrhf_loss_is_that_of_a_loop_over_pairs(prompts):
    """Prompts with 1 to 5 responses; ties among the rewards; what an absent response holds has no effect."""
    logps, lengths, scores = ([[response[k] for response in prompt] for prompt in prompts] for k in range(3))
    width = max(map(len, prompts))

    def fill(rows: list[list], value: float) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.float64)

    loss = rrhf_loss(fill(logps, -9.0), fill(lengths, 0), fill(scores, 7.0))
    assert loss.item() == pytest.approx(loop_rrhf_loss(logps, lengths, scores))


def test_metrics_by_hand():
    """Scores 3, 1, 1: two pairs, with the weight 2 each; and 5, 4, with the weight 1. The second pair is wrong."""
    values = torch.tensor([[1.0, 0.0, 1.5], [0.0, -1.0, 9.0]])
    scores, lengths = torch.tensor([[3.0, 1, 1], [5, 4, 0]]), torch.tensor([[4, 1, 1], [2, 2, 0]])
    expected = {
        "response_length": 2.0,
        "accuracy": 2 / 3,
        "reward_weighted_accuracy": 3 / 5,
        "margin": 0.5,
        "pairs": 3,
    }
    assert alignment_metrics(values, lengths, scores) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ against TRL


def plain_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    return plain


TRL_FLAGS = {"bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False, "max_length": None}


@pytest.mark.parametrize("batching", ["tree", "padded"])
def test_dpo_loss_and_gradients_are_those_of_trl(tmp_path, batching, base_llama):
    """On the same ids, with a reference that is another model."""
    trl = pytest.importorskip("trl")

    class SameIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: object) -> Dataset:
            return dataset

    items = random_items()
    model, reference = make_policy("tree_branches" if batching == "tree" else "sdpa"), make_policy(seed=1)
    reference_logps = logps_of(reference, items)[0].detach()
    logps, _ = logps_of(model, items, batching)
    loss = dpo_loss(logps, reference_logps, beta=0.1)

    columns = {"prompt_ids": "prompt_ids", "chosen_ids": 0, "rejected_ids": 1}
    rows = [{k: item[c] if c == k else item["response_ids"][c] for k, c in columns.items()} for item in items]
    trainer = SameIds(
        model=plain_copy(model).eval(),
        ref_model=plain_copy(reference).eval(),
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=0.1, **TRL_FLAGS),
        processing_class=tokenizer_of(base_llama),
        train_dataset=Dataset.from_list(rows),
    )
    their_loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert loss.item() != pytest.approx(math.log(2), abs=1e-2)
    assert_same_gradients(gradients_of(loss, model), gradients_of(their_loss, trainer.model))


def test_sft_loss_and_gradients_are_those_of_trl_on_completions(tmp_path, base_llama):
    trl = pytest.importorskip("trl")
    items, model = random_items(num_responses=1), make_policy()
    logps, batch = logps_of(model, items)
    loss = sft_loss(logps[:, 0], batch["lengths"][:, 0])
    rows = [
        {
            "input_ids": item["prompt_ids"] + item["response_ids"][0],
            "labels": [-100] * len(item["prompt_ids"]) + item["response_ids"][0],
        }
        for item in items
    ]
    trainer = trl.SFTTrainer(
        model=plain_copy(model).eval(),
        args=trl.SFTConfig(output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **TRL_FLAGS),
        processing_class=tokenizer_of(base_llama),
        train_dataset=Dataset.from_list(rows),
    )
    their_loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert_same_gradients(gradients_of(loss, model), gradients_of(their_loss, trainer.model))


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
