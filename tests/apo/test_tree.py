"""A tree gives the rewards and gradients of separate, padded sequences, and runs no token twice."""

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, E2E, TINY_SIZES, forward, load_model, run_main, training_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen2MoeConfig

from apo.tree import TREE_ATTENTIONS, build_token_tree, choose_attention
from models import POOLING_TYPES, RewardModel, RewardSettings
from reward_datasets import RewardDataCollator

TOKENS = st.integers(5, 12)  # few, so that prefixes coincide
VOCAB_SIZE = 64
MAX_LENGTH = 40


# ------------------------------------------------------------------------------------------------ the tree


@st.composite
def items(draw: st.DrawFn) -> list[list[int]]:
    """The sequences of an item: 1 to 8 responses to a prompt that may be empty, over-long ones cut on the left."""
    prompt = draw(st.lists(TOKENS, max_size=30))
    responses = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=8))
    return [[1, *prompt, 4, *response, 2][-MAX_LENGTH:] for response in responses]


BATCHES = st.lists(items(), min_size=1, max_size=4)


def test_docstring_example_holds():
    p0, p1, p2, a0, a1, b0 = range(10, 16)
    tree = {
        name: tensor.tolist() for name, tensor in build_token_tree([[p0, p1, p2, a0, a1], [p0, p1, p2, b0]]).items()
    }
    assert tree == {
        "input_ids": [[p0, p1, p2, a0, a1, b0]],
        "position_ids": [[0, 1, 2, 3, 4, 3]],
        "subtree_ends": [6, 6, 6, 5, 5, 6],
        "paths": [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "branches": [[0, 5, 5], [1, 4, 1]],
    }


@given(BATCHES)
@settings(max_examples=100, deadline=None)
def test_paths_spell_the_sequences_at_their_positions(batch):
    sequences = [sequence for item in batch for sequence in item]
    tree = build_token_tree(sequences)
    for sequence, path, mask in zip(sequences, tree["paths"], tree["attention_mask"], strict=True):
        path = path[mask.bool()]
        assert tree["input_ids"][0, path].tolist() == sequence
        assert tree["position_ids"][0, path].tolist() == list(range(len(sequence)))


@given(BATCHES)
@settings(max_examples=100, deadline=None)
def test_a_token_attends_to_itself_and_those_before_it_on_its_path(batch):
    tree = build_token_tree([sequence for item in batch for sequence in item])
    size = tree["input_ids"].shape[1]
    expected = np.zeros((size, size), dtype=bool)
    for path, mask in zip(tree["paths"].numpy(), tree["attention_mask"].numpy(), strict=True):
        path = path[: mask.sum()]
        expected[np.repeat(path, len(path)), np.tile(path, len(path))] |= np.tri(len(path), dtype=bool).ravel()
    index, ends = np.arange(size), tree["subtree_ends"].numpy()
    assert ((index <= index[:, None]) & (index[:, None] < ends)).tolist() == expected.tolist()


@given(BATCHES)
@settings(max_examples=100, deadline=None)
def test_shared_prefix_is_stored_once(batch):
    """The size of the tree is the number of different prefixes."""
    sequences = [sequence for item in batch for sequence in item]
    prefixes = {tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)}
    assert build_token_tree(sequences)["input_ids"].shape[1] == len(prefixes)


def test_pairs_of_one_golden_response_share_it():
    """Four pairs of a prompt of 20 tokens, golden response of 10, samples of 6: 20 + 10 + 4 x 6, not 4 x (30 + 26)."""
    prompt, golden = list(range(10, 30)), list(range(30, 40))
    pairs = [[[*prompt, *golden], [*prompt, *range(first, first + 6)]] for first in (40, 46, 52, 58)]
    assert build_token_tree([s for pair in pairs for s in pair])["input_ids"].shape[1] == 54


# ------------------------------------------------------------------------------------------------ rewards, gradients


@pytest.fixture(scope="module", params=POOLING_TYPES)
def model(request) -> RewardModel:
    return make_model(request.param)


def make_model(pooling_type: str, **sizes: int) -> RewardModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, **(TINY_SIZES | sizes))
    config.reward_settings = {**vars(RewardSettings()), "pooling_type": pooling_type}
    return RewardModel(config, with_lm_head=True)


def collate(batch: list[list[list[int]]], batching: str, padding_side: str = "right") -> dict[str, torch.Tensor]:
    rows = [{"input_ids": item, "scores": [0.5] * len(item), "is_apo": False} for item in batch]
    return RewardDataCollator(3, padding_side, batching)(rows)


def run(
    model: RewardModel, batch: dict, attention: str, *, lm_loss: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rewards (N,), with the LM losses (2N,), and the gradients of a weighted sum of them."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    num_sequences = len(batch["attention_mask"])
    output = forward(model, batch, lm_mask=torch.arange(num_sequences) % 2 == 0 if lm_loss else None)
    values = torch.cat([output.rewards, output.lm_losses]) if lm_loss else output.rewards
    (values * torch.linspace(-1, 2, len(values))).sum().backward()
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    model: RewardModel, batch: list, attention: str, padding_side: str = "right", lm_loss: bool = False
) -> None:
    values, gradients = run(model, collate(batch, "padded", padding_side), "sdpa", lm_loss=lm_loss)
    tree_values, tree_gradients = run(model, collate(batch, "tree"), attention, lm_loss=lm_loss)
    assert tree_gradients.keys() == gradients.keys()
    torch.testing.assert_close(tree_values, values, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        difference = (tree_gradients[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-8, (name, difference, gradient.norm())


@given(BATCHES, st.sampled_from(["right", "left"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_tree_gives_the_rewards_and_gradients_of_padded_sequences(model, batch, padding_side, lm_loss):
    """Over-long items too: cut at different places, their sequences share no prefix."""
    assert_same(model, batch, "tree_branches", padding_side, lm_loss)


@given(BATCHES, st.booleans())
@settings(max_examples=20, deadline=None)
def test_attention_with_a_mask_gives_the_same(model, batch, lm_loss):
    assert_same(model, batch, "tree_mask", lm_loss=lm_loss)


def test_bfloat16_gives_the_same_within_its_precision():
    """Of 8 bits: rewards and gradients within 2 % of those of float32."""
    model, batch = make_model("eos"), collate([[[1, 5, 6, 7, 2], [1, 5, 6, 9, 9, 2], [1, 8, 2]]], "tree")
    rewards, gradients = run(model, batch, "tree_branches")
    with torch.autocast("cpu", torch.bfloat16):
        rounded_rewards, rounded_gradients = run(model, batch, "tree_branches")
    assert not torch.equal(rounded_rewards, rewards)
    torch.testing.assert_close(rounded_rewards, rewards, rtol=0.02, atol=0.02 * rewards.abs().max().item())
    for name, gradient in gradients.items():
        assert (rounded_gradients[name] - gradient).norm() <= 0.02 * gradient.norm(), name


@given(BATCHES)
@settings(max_examples=5, deadline=None)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gives_the_same_rewards(model, batch):
    """Forward only: flex attention has no backward on a CPU."""
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        rewards = forward(model, collate(batch, "padded")).rewards
        model.set_attn_implementation("tree_flex")
        torch.testing.assert_close(forward(model, collate(batch, "tree")).rewards, rewards, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["tree_branches", "tree_mask"])
def test_grouped_key_heads_give_the_same(attention):
    batch = [[[1, *range(10, 30), 31, 2], [1, *range(10, 30), 40, 41, 2]], [[1, 50, 2]]]
    assert_same(make_model("last", num_key_value_heads=2), batch, attention)


def test_gradient_checkpointing_gives_the_same():
    batch = [[[1, *range(10, 30), 31, 2], [1, *range(10, 30), 40, 41, 2]], [[1, 50, 2]]]
    model = make_model("last").train()
    _, gradients = run(model, collate(batch, "tree"), "tree_branches")
    model.gradient_checkpointing_enable()
    _, again = run(model, collate(batch, "tree"), "tree_branches")
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-6)


def test_same_tokens_tie_exactly():
    batch = [[[1, *range(10, 30), 2], [1, *range(10, 30), 2]]]
    model, _ = load_model(attention="tree_branches")
    rewards = forward(model, collate(batch, "tree")).rewards
    assert rewards[0] == rewards[1]


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.slow
@pytest.mark.parametrize("task", [["--task_type", "training"], ["--task_type", "apo", "--apo_loss_coeff", 0.1]])
def test_fifty_steps_of_both_batchings_agree(tmp_path, task):
    """Every loss to 1e-4, LM loss included."""
    flags = f"""--do_train True --model_name_or_path {CHECKPOINT} --add_sep_token True --pooling_type last
        --max_length 96 --train_data_path {E2E / "train.json"} {E2E / "apo.json"} --per_device_train_batch_size 4
        --max_steps 50 --learning_rate 1e-4 --logging_steps 1 --save_strategy no --report_to none --use_cpu True
        --lm_loss_coeff 0.01""".split()
    for batching in ("tree", "padded"):
        run_main(*task, *flags, batching=batching, output_dir=tmp_path / batching)
    losses = training_losses(tmp_path / "tree")
    assert len(losses) == 50
    assert losses == pytest.approx(training_losses(tmp_path / "padded"), abs=1e-4)


# ------------------------------------------------------------------------------------------------ choice


@pytest.mark.parametrize(
    "batching, dropout, device, expected",
    [
        ("tree", 0.0, "cpu", "tree_branches"),
        ("tree", 0.1, "cpu", "sdpa"),
        ("padded", 0.0, "cpu", "sdpa"),
        ("tree", 0.0, "meta", "tree_mask"),
    ],
)
def test_attention_fits_model_and_device(batching, dropout, device, expected, caplog):
    caplog.set_level("INFO")
    config = LlamaConfig(attention_dropout=dropout, **TINY_SIZES)
    assert choose_attention(config, batching, torch.device(device), torch.float32) == expected
    assert f"batching: {'tree' if expected in TREE_ATTENTIONS else 'padded'}, attention: {expected}" in caplog.text
    assert ("dropout" in caplog.text) == (dropout > 0)


@pytest.mark.parametrize(
    "config, expected, reason",
    [
        (Qwen2MoeConfig(), "sdpa", "trees are not tested for models of type qwen2_moe"),
        (BloomConfig(), "eager", "trees are not tested for models of type bloom"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "sdpa", "the model is not causal"),
        (LlamaConfig(is_causal=False), "sdpa", "the model is not causal"),
        (GPT2Config(attn_pdrop=0.0), "sdpa", "the model has dropout: resid_pdrop 0.1, embd_pdrop 0.1"),
        (Gemma2Config(attention_dropout=0.1), "eager", "the model has dropout: attention_dropout 0.1"),
    ],
)
def test_model_that_trees_do_not_fit_is_padded(config, expected, reason, caplog):
    """With `eager` attention where the architecture has no other."""
    caplog.set_level("INFO")
    assert choose_attention(config, "tree", torch.device("cpu"), torch.float32) == expected
    assert caplog.messages == [f"batching: padded, attention: {expected} ({reason})"]


def test_flex_attention_that_does_not_compile_falls_back_to_the_mask(caplog):
    """On this machine it fails at the first tensor: there is no such device."""
    config = LlamaConfig(**TINY_SIZES)
    assert choose_attention(config, "tree", torch.device("cuda"), torch.float32) == "tree_mask"
    assert "flex attention does not work here" in caplog.text
