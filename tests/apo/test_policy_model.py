"""The policy's forward pass: the log-probabilities of transformers, on trees and in chunks; models that it refuses."""

import pytest
import torch
import torch.nn.functional as F
from tiny_policy import assert_same_gradients, gradients_of, logps_of, make_policy, random_items
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import apo.policy_model
from apo.cli import InputError
from apo.policy_model import (
    check_saved_policy,
    load_policy,
    policy_class,
    probe_logprobs,
    response_logprobs,
    token_tensors,
)
from apo.tree import choose_attention

SIZES = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# What these models do after the head: scale, divide, squash; a head with a bias; attention with a window and a cap.
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 9, "attn_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
}


def save_model(folder, kind: str, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | ARCHITECTURES[kind] | more))
    for weight in model.parameters():
        weight.data *= 3
    model.save_pretrained(folder)
    return model.eval()


def load(folder, attention: str = "tree_branches"):
    config = AutoConfig.from_pretrained(folder)
    if attention == "padded":
        attention = choose_attention(config, "padded", torch.device("cpu"), torch.float32)
    return load_policy(str(folder), config, dtype=torch.float32, attention=attention)


def test_tensors_of_a_tree_and_of_padded_rows():
    """The example of the docstring."""
    sequences, prompt_lengths = [[1, 2, 3, 4], [1, 2, 5]], [2, 2]
    tree = token_tensors(sequences, prompt_lengths, "tree")
    assert tree["input_ids"].tolist() == [[1, 2, 3, 4, 5]] and tree["rows"].tolist() == [1, 2, 1]
    padded = token_tensors(sequences, prompt_lengths, "padded")
    assert padded["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 5, 0]] and padded["rows"].tolist() == [1, 2, 5]
    assert tree["labels"].tolist() == padded["labels"].tolist() == [3, 4, 5]


@pytest.mark.parametrize("attention", ["tree_branches", "tree_mask", "padded"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logprobs_and_gradients_are_those_of_transformers(tmp_path, kind, attention):
    """Of each response by itself, without a tree, padding or chunks: 1e-5, and 1e-5 relative."""
    plain = save_model(tmp_path, kind)
    model, items = load(tmp_path, attention), random_items(num_responses=3)
    logps, _ = logps_of(model, items, "padded" if attention == "padded" else "tree")
    expected = []
    for item in items:
        for response in item["response_ids"]:
            ids = torch.tensor([item["prompt_ids"] + response])
            logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
            losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
            expected.append(-losses[-len(response) :].sum())
    expected = torch.stack(expected).view_as(logps)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    assert_same_gradients(
        gradients_of((logps * weights).sum(), model), gradients_of((expected * weights).sum(), plain)
    )


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_chunks_change_nothing_and_no_more_logits_exist_than_a_chunk(monkeypatch, chunk):
    monkeypatch.setattr(apo.policy_model, "CHUNK_TOKENS", chunk)
    config, sizes = make_policy().config, []
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(16, 50, bias=True), torch.randn(20, 16, requires_grad=True), torch.arange(20)
    expected = F.log_softmax(head(hidden), -1).gather(1, labels[:, None]).squeeze(1)
    weights = torch.randn(20)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [hidden, *head.parameters()])
    head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    logprobs = response_logprobs(hidden, labels, head, config)
    gradients = torch.autograd.grad((logprobs * weights).sum(), [hidden, *head.parameters()])
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    num_again = 20 - sizes[-(-20 // chunk) - 1]  # in the backward pass, all chunks but the last
    assert max(sizes) <= chunk and sum(sizes) == 20 + num_again


def test_head_runs_for_response_tokens_only():
    model, items, sizes = make_policy(), random_items(num_responses=4), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        _, batch = logps_of(model, items)
    assert sum(sizes) == batch["lengths"].sum()


def test_model_is_saved_as_a_plain_causal_lm(tmp_path):
    save_model(tmp_path / "start", "llama")
    model = load(tmp_path / "start")
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(reloaded) is LlamaForCausalLM and reloaded.config.architectures == ["LlamaForCausalLM"]
    check_saved_policy(tmp_path / "saved", probe_logprobs(model), torch.float32, tolerance=1e-3)
    model.lm_head.weight.data[7] += 1.0
    with pytest.raises(InputError, match="the saved model gives other log-probabilities than the one in memory"):
        check_saved_policy(tmp_path / "saved", probe_logprobs(model), torch.float32, tolerance=1e-3)


def test_adapter_starts_as_its_base_and_has_the_gradient_of_the_chain_rule(tmp_path):
    """With B = 0 and W + alpha / r * B A in place of W, the gradient of B is alpha / r * G A^T, G that of W."""
    save_model(tmp_path, "llama")
    base, items = load(tmp_path), random_items(num_responses=3)
    names = ("lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "lora_dropout")
    lora = dict(zip(names, (4, 12, ["v_proj", "down_proj"], [], 0.0), strict=True))
    config = AutoConfig.from_pretrained(tmp_path)
    loading = {"dtype": torch.float32, "attention": "tree_branches", "lora": lora}
    model, again, other = (load_policy(str(tmp_path), config, **loading, seed=seed) for seed in (1, 1, 2))
    weights = [next(w for n, w in m.named_parameters() if "lora_A" in n) for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    logps, expected = logps_of(model, items)[0], logps_of(base, items)[0]
    torch.testing.assert_close(logps, expected, atol=1e-6, rtol=1e-6)
    logps.sum().backward()
    gradients = gradients_of(expected.sum(), base)
    adapted = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_B")}
    assert len(adapted) == 2 * 2
    for name, layer in adapted.items():
        by_chain_rule = 3 * gradients[f"{name}.weight"] @ layer.lora_A.default.weight.T
        torch.testing.assert_close(layer.lora_B.default.weight.grad, by_chain_rule, atol=1e-5, rtol=1e-4)


def test_logits_that_are_changed_after_the_head_in_an_unknown_way_are_refused(tmp_path, monkeypatch):
    """As they would be in a model that this project does not know."""
    save_model(tmp_path, "granite")
    monkeypatch.setattr(apo.policy_model, "final_logits", lambda hidden, head, config: head(hidden))
    with pytest.raises(InputError, match="log-probabilities of granite come out other than transformers has them"):
        load(tmp_path)


def test_incomplete_model_is_refused(tmp_path):
    save_model(tmp_path, "llama").base_model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 weights \(lm_head.weight\); expected a complete language model"):
        load(tmp_path)


def test_plain_forward_pass_is_still_there():
    """For generation, and for whoever gets the trained object."""
    model = make_policy("sdpa")
    assert isinstance(model, LlamaForCausalLM) and policy_class(LlamaForCausalLM) is type(model)
    assert model(input_ids=torch.tensor([[1, 5, 7]])).logits.shape == (1, 3, 100)
