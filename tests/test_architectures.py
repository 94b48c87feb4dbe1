"""Every architecture of `TREE_MODELS`: trees against padded rows, and training, saving and scoring."""

from pathlib import Path

import pytest
import torch
from conftest import E2E, ON_CPU, forward, make_bpe_tokenizer, read_json, run_main, training_losses
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from apo.tree import TREE_ATTENTIONS, TREE_MODELS, choose_attention, try_flex
from apo.tree_attention import Attend, Layer
from models import RewardModel, RewardSettings
from reward_datasets import RewardDataCollator

VOCAB_SIZE = 300
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
HEADS = GATED | {"head_dim": 8}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
# name: model type and sizes. Windows of 9 are shorter than the sequences, caps of 0.5 bend most scores.
BASES = {
    "cohere": ("cohere", GATED),
    "cohere2": ("cohere2", GATED | {"sliding_window": 9}),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", HEADS | {"sliding_window": 9, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4}),
    "gemma3": ("gemma3_text", HEADS | {"sliding_window": 9, "sliding_window_pattern": 2}),
    "gpt2": ("gpt2", SMALL | {"n_inner": 48, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt_neox": ("gpt_neox", SMALL | {"intermediate_size": 48}),
    "gpt_oss": (
        "gpt_oss",
        HEADS | {"sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN},
    ),
    "granite": ("granite", GATED),
    "llama": ("llama", GATED),
    "mistral": ("mistral", GATED | {"sliding_window": None}),
    "mistral, window": ("mistral", GATED | {"sliding_window": 9}),
    "olmo2": ("olmo2", GATED),
    "olmo3": ("olmo3", GATED | {"sliding_window": 9}),
    "opt": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "opt, projected": ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "phi3": ("phi3", GATED | {"sliding_window": 9}),
    "qwen2": ("qwen2", GATED),
    "qwen2, window": ("qwen2", GATED | QWEN_WINDOW),
    "qwen3": ("qwen3", HEADS | QWEN_WINDOW),
    "qwen3_moe": ("qwen3_moe", HEADS | QWEN_WINDOW | EXPERTS),
    "smollm3": ("smollm3", GATED | QWEN_WINDOW | {"no_rope_layer_interval": 2}),
}
EACH_BASE = pytest.mark.parametrize("base", BASES)


def make_config(base: str, **changes: object) -> PreTrainedConfig:
    model_type, sizes = BASES[base]
    return AutoConfig.for_model(model_type, **(sizes | changes), attn_implementation="eager")


def make_model(config: PreTrainedConfig) -> RewardModel:
    """Weights so large that tokens attend to some more than to others."""
    config.reward_settings = {**vars(RewardSettings()), "pooling_type": "eos"}
    torch.manual_seed(0)
    model = RewardModel(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def items() -> list[dict]:
    """Two prompts of 25 tokens with five responses each, two of which share their first 6 tokens."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()

    items = []
    for _ in range(2):
        prompt, start = tokens(25), tokens(6)
        responses = [tokens(3), tokens(9), tokens(20), [*start, *tokens(6)], [*start, *tokens(5)]]
        sequences = [[*prompt, *response] for response in responses]
        items.append({"input_ids": sequences, "scores": [0.5] * len(sequences), "is_apo": False})
    return items


@pytest.fixture
def differentiable_flex(monkeypatch):
    """Lets flex attention compute gradients on a CPU: it refuses, though its uncompiled form has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)


def run(model: RewardModel, items: list[dict], attention: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rewards (N,) and the gradients of a weighted sum of them."""
    batching = "tree" if attention in TREE_ATTENTIONS else "padded"
    model.set_attn_implementation(attention)
    model.zero_grad()
    rewards = forward(model, RewardDataCollator(0, "right", batching)(items)).rewards
    (rewards * torch.linspace(-1, 2, len(rewards))).sum().backward()
    return rewards.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ trees


def test_every_architecture_of_the_table_is_tested():
    assert {model_type for model_type, _ in BASES.values()} == set(TREE_MODELS)


@EACH_BASE
@pytest.mark.usefixtures("differentiable_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_tree_gives_the_rewards_and_gradients_of_padded_rows(base, items):
    """Gradients within 1e-5 of the largest entry of each weight, or 1e-6: for the keys' bias of OPT they are 0."""
    config = make_config(base)
    model = make_model(config)
    padded = choose_attention(config, "padded", torch.device("cpu"), torch.float32)
    rewards, gradients = run(model, items, padded)
    for attention in TREE_ATTENTIONS:
        tree_rewards, tree_gradients = run(model, items, attention)
        torch.testing.assert_close(tree_rewards, rewards, rtol=0, atol=1e-5)
        assert tree_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            difference = (tree_gradients[name] - gradient).abs().max()
            assert difference <= 1e-5 * gradient.abs().max() + 1e-6, (attention, name)


@EACH_BASE
@torch.no_grad()
def test_layers_need_what_the_table_says(base, items, monkeypatch):
    """And it matters here: rewards differ where trees ignore windows, caps and sinks."""
    from apo.tree import prepare_attention

    found = set()

    def prepare_plain(tree: dict, kind: str) -> Attend:
        attend = prepare_attention(tree, kind)

        def attend_plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: Layer) -> torch.Tensor:
            found.update(name for name in ("window", "softcap", "sinks") if getattr(layer, name) is not None)
            return attend(query, key, value, Layer(layer.scaling))

        return attend_plainly

    config = make_config(base)
    model = make_model(config)
    model.set_attn_implementation("tree_branches")
    batch = RewardDataCollator(0, batching="tree")(items)
    rewards = forward(model, batch).rewards
    monkeypatch.setattr("models.prepare_attention", prepare_plain)
    difference = (forward(model, batch).rewards - rewards).abs().max()
    expected = set(TREE_MODELS[config.model_type])
    assert found == expected - ({"window"} if base in ("mistral", "qwen2") else set())
    assert difference > 1e-2 if found else difference == 0


@EACH_BASE
@pytest.mark.usefixtures("differentiable_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_trial_of_flex_attention_fits_the_config(base):
    """Otherwise a GPU would run the slower attention with a mask."""
    try_flex(make_config(base), torch.device("cpu"), torch.float32)


# ------------------------------------------------------------------------------------------------ dropout


@EACH_BASE
def test_a_model_with_any_dropout_is_padded(base):
    """Of any name: every field that changes a module of the model, and no other, makes padding necessary."""

    def is_padded(config: PreTrainedConfig) -> bool:
        return choose_attention(config, "tree", torch.device("cpu"), torch.float32) not in TREE_ATTENTIONS

    def has_dropout(config: PreTrainedConfig) -> bool:
        return any(
            (isinstance(module, nn.Dropout) and module.p > 0)
            or any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())
            for module in RewardModel(config).modules()
        )

    config = make_config(base)
    assert not has_dropout(config) and not is_padded(config)
    changes = [{name: 0.1} for name in config.to_dict() if "drop" in name]
    assert any(has_dropout(make_config(base, **change)) for change in changes)
    for change in changes:
        config = make_config(base, **change)
        assert is_padded(config) or not has_dropout(config), change


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def base_folder(base, tmp_path) -> Path:
    """A pretrained model in the making; Qwen's tokenizers have no bos."""
    folder = tmp_path / "base"
    tokenizer = make_bpe_tokenizer(["<|bos|>", "<|eos|>"])
    if base.startswith("qwen"):
        tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(base)).save_pretrained(folder)
    return folder


@EACH_BASE
def test_trained_model_reloads_to_the_same_scores(base, base_folder, tmp_path, monkeypatch):
    """Ten steps on trees and on padded rows give the same losses, and `score` the mean reward that a run reports."""
    monkeypatch.setattr("apo.figures.plot_training_curves", lambda *_: None)  # a third of the time, not asked for here
    records = read_json(E2E / "eval_a.json")
    texts = [text.split("<sep>") for record in records for text in record["text"]]
    for batching in ("tree", "padded"):
        run_main(
            **ON_CPU,
            model_name_or_path=base_folder,
            do_train=True,
            train_data_path=E2E / "train.json",
            eval_data_path=E2E / "eval_a.json",
            pooling_type="last",
            add_sep_token=True,
            max_length=48,
            per_device_train_batch_size=2,
            max_steps=10,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            batching=batching,
            output_dir=tmp_path / batching,
        )
        model = RewardModel.from_pretrained(tmp_path / batching)
        rewards = model.score(*map(list, zip(*texts, strict=True)), batch_size=32)
        reported = read_json(tmp_path / batching / "final_eval_results.json")["eval_a.json"]
        mean_reward = reported["eval_eval_a.json_mean_reward"]
        assert sum(rewards) / len(rewards) == pytest.approx(mean_reward, abs=1e-5)
    losses = training_losses(tmp_path / "tree")
    assert len(losses) == 10 and len(set(losses)) == 10
    assert losses == pytest.approx(training_losses(tmp_path / "padded"), abs=1e-4)
