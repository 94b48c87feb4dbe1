"""The reward model: pooling, invariance to padding and company, tokenizer roles, loading and saving."""

import logging
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, copy_checkpoint, load_model, make_bpe_tokenizer, read_json, rewards_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
)

from apo.cli import InputError
from models import (
    POOLING_TYPES,
    RewardModel,
    count_positions,
    load_config,
    load_reward_model,
    pool_rewards,
    resolve_settings,
)

SEQUENCES = st.lists(st.lists(st.integers(5, 1023), min_size=2, max_size=20), min_size=1, max_size=5)


@pytest.fixture(scope="module", params=POOLING_TYPES)
def model(request) -> RewardModel:
    return load_model(pooling_type=request.param)[0]


# ------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize(
    "pooling_type, expected",
    [
        ("eos", [-4.0, -2.0, -5.0]),
        ("last", [-3.0, -6.0, -5.0]),
        ("average", [-2.5, -4.0, -5.0]),
        ("max", [-1.0, -2.0, -5.0]),
    ],
)
def test_pooling_by_hand(pooling_type, expected):
    """Rewards -1 -2 -3 -4 | -6 -2 pad pad | -5 pad pad pad, padding 9 and 0, which no pooling may take.

    eos: the last token. last: the one before it, or the only one. average: (-1 -2 -3 -4) / 4 = -2.5, (-6 -2) / 2 = -4.
    max: the largest, though 0 and 9 are larger.
    """
    rewards = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-6.0, -2.0, 9.0, 0.0], [-5.0, 9.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert pool_rewards(rewards, mask, pooling_type).tolist() == expected
    assert pool_rewards(rewards.flip(0), mask.flip(0), pooling_type).tolist() == expected[::-1]
    padded_left = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [9.0, 0.0, -6.0, -2.0], [9.0, 0.0, 0.0, -5.0]])
    assert pool_rewards(padded_left, mask.flip(1), pooling_type).tolist() == expected


# ------------------------------------------------------------------------------------------------ invariance


@given(SEQUENCES)
@settings(max_examples=15, deadline=None)
def test_padding_and_batch_mates_do_not_change_a_reward(model, sequences):
    """Each sequence by itself needs no padding at all."""
    alone = torch.cat([rewards_of(model, [sequence], 3) for sequence in sequences])
    torch.testing.assert_close(rewards_of(model, sequences, 3), alone, rtol=0, atol=1e-5)


@given(SEQUENCES)
@settings(max_examples=15, deadline=None)
def test_padding_side_does_not_change_a_reward(model, sequences):
    right, left = (rewards_of(model, sequences, 3, side) for side in ("right", "left"))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_rewards_of_different_sequences_differ(model):
    """So that the invariances above are not those of a constant; `max` may pick the same token of the first two."""
    rewards = rewards_of(model, [[1, 7, 8, 2], [1, 9, 8, 2], [9, 7, 8, 2]], 3).tolist()
    assert len(set(rewards)) >= (2 if model.settings.pooling_type == "max" else 3)


def test_pad_token_at_any_id_has_no_influence(model):
    sequences = [[1, 7, 8, 2], [1, 9, 2]]
    torch.testing.assert_close(rewards_of(model, sequences, 500), rewards_of(model, sequences, 3), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ LM loss


def test_lm_loss_is_the_mean_over_the_targets_of_each_sequence():
    """Each sequence by itself, log-softmax written out; a sequence of 5 tokens has 4 targets, padding has none."""
    model, _ = load_model(with_lm_head=True)
    sequences = [[1, 7, 8, 9, 2], [1, 10, 2]]
    input_ids = torch.tensor([sequences[0], [*sequences[1], 3, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        lm_losses = model(input_ids, mask, torch.tensor([True, True])).lm_losses
        for sequence, loss in zip(sequences, lm_losses, strict=True):
            logits = model.lm_head(model.model(torch.tensor([sequence])).last_hidden_state)[0]
            targets = [logits[i].logsumexp(0) - logits[i, token] for i, token in enumerate(sequence[1:])]
            assert loss.item() == pytest.approx(sum(targets).item() / len(targets), abs=1e-5)


def test_lm_loss_of_a_head_that_knows_nothing_is_the_logarithm_of_the_vocabulary():
    """A zero head gives each of the 1,024 tokens the same probability."""
    model, _ = load_model(with_lm_head=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    lm_losses = model(torch.tensor([[1, 7, 8, 2]] * 2), torch.ones(2, 4), torch.tensor([True, False])).lm_losses
    assert lm_losses.tolist() == pytest.approx([math.log(1024), 0.0])


def test_lm_head_is_used_only_with_the_lm_loss():
    model, _ = load_model(with_lm_head=True)
    without, _ = load_model()
    assert without.lm_head is None and "lm_head.weight" not in without.state_dict()
    torch.testing.assert_close(rewards_of(model, [[1, 7, 2]], 3), rewards_of(without, [[1, 7, 2]], 3), rtol=0, atol=0)


def test_tied_lm_head_stays_the_embedding(tmp_path):
    """As in SmolLM2: the checkpoint holds one table, which grows with the tokenizer, and the model trains one."""
    make_bpe_tokenizer(["<|bos|>", "<|eos|>"]).save_pretrained(tmp_path)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path, with_lm_head=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (302, 16)


# ------------------------------------------------------------------------------------------------ loading and saving


def test_saved_model_reloads_to_the_same_rewards_and_settings(tmp_path):
    flags = {"pooling_type": "eos", "max_length": 99, "truncation_side": "right", "add_sep_token": True}
    model, tokenizer = load_model(**flags)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_model(tmp_path)
    sequences = [[1, 7, 8, 2], [1, 9, 2]]
    assert rewards_of(again, sequences, 3).tolist() == rewards_of(model, sequences, 3).tolist()
    assert again.settings == model.settings
    recorded = read_json(tmp_path / "config.json")
    assert recorded["reward_settings"] == flags | {"tokenizer_backend": "sentencepiece", "sep_token_id": 4}
    assert recorded["pad_token_id"] == 3
    assert (tmp_path / "tokenizer.model").read_bytes() == (CHECKPOINT / "tokenizer.model").read_bytes()
    texts = ["Why?", " Because it is so."]
    assert tokenizer_again.encode(texts) == tokenizer.encode(texts)


@pytest.mark.parametrize("with_lm_head", [False, True])
def test_keys_are_those_of_the_reference_the_lm_head_only_with_its_loss(tmp_path, with_lm_head):
    model, _ = load_model(with_lm_head=with_lm_head)
    model.save_pretrained(tmp_path)
    expected = load_file(CHECKPOINT / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys() - (set() if with_lm_head else {"lm_head.weight"})
    assert saved["reward_head.weight"].shape == (1, 32)
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def test_lm_loss_on_a_checkpoint_without_lm_head_is_refused(tmp_path):
    """A head of random numbers would be trained in its place."""
    model, tokenizer = load_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 weights \(lm_head.weight\)"):
        load_model(tmp_path, with_lm_head=True)


def test_existing_head_is_never_initialised_again(caplog):
    expected = load_file(CHECKPOINT / "model.safetensors")["reward_head.weight"]
    with caplog.at_level(logging.INFO, logger="models"):
        for seed in (1, 2):
            assert torch.equal(load_model(seed=seed)[0].reward_head.weight, expected)
    assert caplog.text.count(f"reward head: loaded from {CHECKPOINT}") == 2
    assert "initialised" not in caplog.text


def test_loading_leaves_the_random_numbers_of_its_caller(base_llama):
    """Whether a head is drawn or not."""
    for load in (lambda: RewardModel.from_pretrained(CHECKPOINT), lambda: load_model(base_llama)):
        torch_state, state = torch.get_rng_state(), random.getstate()
        load()
        assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == state


def test_new_head_is_reproduced_by_its_seed(base_llama, caplog):
    with caplog.at_level(logging.INFO, logger="models"):
        heads = [load_model(base_llama, seed=seed)[0].reward_head.weight for seed in (42, 42, 43)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].abs().max() > 0
    assert "reward head: initialised (seed 42)" in caplog.text
    assert "loaded from" not in caplog.text


def test_flag_wins_over_the_checkpoint_with_a_warning(caplog):
    config = LlamaConfig(reward_settings={"pooling_type": "last", "max_length": 512})
    settled = resolve_settings(config, pooling_type="eos", max_length=None, truncation_side="left")
    assert (settled.pooling_type, settled.max_length, settled.truncation_side) == ("eos", 512, "left")
    assert "--pooling_type eos contradicts the checkpoint, which was trained with last" in caplog.text
    assert caplog.text.count("contradicts") == 1


def test_checkpoint_of_the_reference_takes_its_defaults():
    settled = resolve_settings(LlamaConfig())
    assert (settled.pooling_type, settled.max_length, settled.truncation_side) == ("average", 256, "left")
    assert settled.add_sep_token is False


def test_model_folder_without_config_is_refused(tmp_path):
    (copy_checkpoint(tmp_path) / "config.json").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: the model folder has no config.json"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_config_is_refused(tmp_path, content):
    (copy_checkpoint(tmp_path) / "config.json").write_text(content)
    with pytest.raises(InputError, match=str(tmp_path)) as error:
        load_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no/where: no model there") as error:
        load_config("no/where")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["./model", "outputs/rm_base", "a/b/c"])
def test_missing_local_folder_is_refused_without_asking_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{path}: no such folder"):
        load_config(path)


def test_architecture_that_is_no_decoder_of_text_is_refused(tmp_path):
    for config in (T5Config(), Gemma3Config()):
        config.save_pretrained(tmp_path)
        found = f"found the architecture {config.model_type}, expected a decoder of text alone"
        with pytest.raises(InputError, match=found):
            load_config(str(tmp_path))


def test_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """transformers would fill them with random numbers."""
    copy_checkpoint(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"lacks 1 weights \(model.layers.0.mlp.up_proj.weight\)"):
        load_model(tmp_path)


def rewrite_weights(folder, change) -> None:
    """Loads the weights of a model folder, changes them in place, and saves them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_checkpoint_with_weights_that_are_not_finite_is_refused(tmp_path, value):
    """One number of one weight is enough."""
    copy_checkpoint(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights["model.norm.weight"][3:4].fill_(value))
    with pytest.raises(InputError, match=r"1 of \d+ weights are NaN or infinite \(model.norm.weight\)"):
        load_model(tmp_path)


def save_classifier(folder: Path, num_labels: int = 1, **config: object) -> LlamaForSequenceClassification:
    """Saves what TRL, OpenRLHF and Skywork save: the class of transformers, its head called `score`."""
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT, num_labels=num_labels, **config)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return model.eval()


@pytest.mark.parametrize(("pad_token_id", "pooling_type"), [(3, "eos"), (2, "last")])
@torch.no_grad()
def test_head_of_another_library_is_the_reward_head(tmp_path, caplog, pad_token_id, pooling_type):
    """Its class reads the last token that is not padding: eos, or the one before it where eos is also the padding."""
    classifier = save_classifier(tmp_path, pad_token_id=pad_token_id)
    with caplog.at_level(logging.INFO, logger="models"):
        model, tokenizer = load_model(tmp_path)
    assert f"reward head: loaded from {tmp_path}" in caplog.text and "not read" not in caplog.text
    assert torch.equal(model.reward_head.weight, classifier.score.weight)
    assert model.settings.pooling_type == pooling_type
    ids = [[1, 300, 400, 2], [1, 9, 2]]
    expected = [classifier(torch.tensor([row])).logits.item() for row in ids]
    assert rewards_of(model, ids, tokenizer.pad_token_id).tolist() == pytest.approx(expected, abs=1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert "reward_head.weight" in load_file(tmp_path / "saved" / "model.safetensors")


def test_head_of_several_labels_is_refused(tmp_path):
    save_classifier(tmp_path, num_labels=3, pad_token_id=3)
    hint = r"reward_head.weight has the shape \(3, 32\), expected \(1, 32\); a reward head has one label"
    with pytest.raises(InputError, match=hint):
        load_model(tmp_path)


def test_weights_that_are_not_read_are_named(tmp_path, caplog):
    copy_checkpoint(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.update({"value_head.weight": torch.zeros(1, 32)}))
    load_model(tmp_path)
    assert "1 weights are not read (value_head.weight)" in caplog.text


def test_trained_model_scores_text_in_two_lines():
    """The same rewards one by one, in lists, and from the ids that training makes."""
    model = RewardModel.from_pretrained(CHECKPOINT)
    rewards = model.score(["Why?", "Why?", "Who?"], [" Because.", " No idea at all.", " Me."], batch_size=2)
    assert model.score("Why?", " No idea at all.") == pytest.approx(rewards[1], abs=1e-6)
    tokenizer = model.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer.encode(["Who?"])[0], *tokenizer.encode([" Me."])[0]]
    expected = rewards_of(model, [[*ids, tokenizer.eos_token_id]], tokenizer.pad_token_id)
    assert rewards[2] == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(InputError, match="two texts, or two lists"):
        model.score("Why?", [" a", " b"])
    with pytest.raises(InputError, match="found 1 prompts and 2 responses"):
        model.score(["Why?"], [" a", " b"])


def test_model_without_a_head_does_not_score(base_llama):
    with pytest.raises(InputError, match="found no reward head"):
        RewardModel.from_pretrained(base_llama)


def test_longer_sequences_than_the_model_has_positions_are_refused():
    config = LlamaConfig(max_position_embeddings=64)
    with pytest.raises(InputError, match="max_length 65: the model has 64 positions; lower --max_length"):
        resolve_settings(config, max_length=65)
    assert resolve_settings(config, max_length=64).max_length == 64


def test_scaled_rotations_have_the_positions_of_the_scaled_model():
    """LLaMA 3 records the scaled number, Qwen the original one."""
    scaling = {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    llama_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaling}
    assert count_positions(LlamaConfig(max_position_embeddings=512, rope_parameters=llama_3)) == 512
    yarn = {"rope_type": "yarn", **scaling}
    assert count_positions(LlamaConfig(max_position_embeddings=64, rope_parameters=yarn)) == 512


def test_pad_that_is_one_of_several_eos_is_skipped_by_the_class_of_transformers():
    config = LlamaConfig(architectures=["LlamaForSequenceClassification"], pad_token_id=5, eos_token_id=[4, 5])
    assert resolve_settings(config).pooling_type == "last"


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_unreadable_weights_are_refused(tmp_path, damage):
    weights = copy_checkpoint(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000]) if damage == "cut" else weights.unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: the weights cannot be loaded") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_added_roles_grow_the_embedding_and_are_recorded(bpe_llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="models"):
        model, tokenizer = load_model(bpe_llama, add_sep_token=True)
    assert "embedding table grown from 300 to 302 tokens" in caplog.text
    assert model.model.embed_tokens.weight.shape == (302, 32)
    before = load_file(bpe_llama / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(model.model.embed_tokens.weight[:300], before, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    caplog.clear()
    again, tokenizer_again = load_model(tmp_path)
    assert "grown" not in caplog.text
    assert (tokenizer_again.pad_token_id, tokenizer_again.sep_token_id) == (300, 301)
    assert (again.config.pad_token_id, again.settings.sep_token_id) == (300, 301)
    sequences = [[0, 9, 301, 8, 1], [0, 301, 1]]
    assert rewards_of(again, sequences, 300).tolist() == rewards_of(model, sequences, 300).tolist()


def test_added_rows_are_reproduced_by_the_seed(bpe_llama):
    rows = [load_model(bpe_llama, seed=seed)[0].model.embed_tokens.weight[300:] for seed in (42, 42, 43)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(
    "recorded",
    [{"pooling": "last"}, "last", {"pooling_type": "first"}, {"truncation_side": "up"}, {"max_length": "99"}],
)
def test_checkpoint_with_settings_from_elsewhere_is_refused(recorded):
    config = load_config(str(CHECKPOINT))
    config.reward_settings = recorded
    with pytest.raises(InputError, match=r"config.json: found reward_settings"):
        resolve_settings(config)


def test_weights_may_be_loaded_in_bfloat16():
    """Half the memory for scoring; the rewards still come in float32, near those of float32 weights."""
    full, tokenizer = load_model(pooling_type="last")
    config = load_config(str(CHECKPOINT))
    half = load_reward_model(
        str(CHECKPOINT), config, tokenizer, resolve_settings(config, pooling_type="last"), seed=1, dtype=torch.bfloat16
    )
    assert {weight.dtype for weight in half.base_model.parameters()} == {torch.bfloat16}
    assert half.reward_head.weight.dtype == torch.float32  # so that close rewards do not become equal
    rewards = [rewards_of(model, [[1, 300, 400, 2]], tokenizer.pad_token_id) for model in (full, half.eval())]
    assert rewards[1].dtype == torch.float32
    torch.testing.assert_close(rewards[0], rewards[1], atol=0.1, rtol=0.05)
