"""Losses and metrics by hand, and what a training step does."""

import math

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, E2E, load_model, pair, read_json, rewards_of, run_main, write_records
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.cli import InputError
from arguments import RewardTrainingArguments
from reward_datasets import RewardDataCollator
from trainer import (
    RewardModelTrainer,
    apo_loss,
    calibration_errors,
    preference_metrics,
    preference_pairs,
    ranking_loss,
)

COEFFICIENTS = {"rm_kl_coeff": 1.0, "apo_loss_coeff": 0.1, "apo_sample_num": 4, "apo_loss_type": "ranking"}


def nll(difference: float) -> float:
    """-log sigmoid(difference)."""
    return math.log1p(math.exp(-difference))


# ------------------------------------------------------------------------------------------------ losses


def test_pairs_are_the_ordered_ones_with_different_scores():
    """Scores 1, 0, 1 and an absent response: 0 over 1 and 2 over 1; no tie, nothing with the absent one."""
    pairs = preference_pairs(torch.tensor([[1.0, 0.0, 1.0, -1.0]]))
    assert pairs.nonzero().tolist() == [[0, 0, 1], [0, 2, 1]]


def test_ranking_loss_is_the_mean_over_all_pairs():
    """Item 1: r = 2 over 1, difference 1. Item 2: scores 3 > 2 > 1 with r = 0, 1, 5: differences -1, -5, -4.

    The mean runs over the four pairs, not over the two items.
    """
    rewards = torch.tensor([[2.0, 1.0, 9.0], [0.0, 1.0, 5.0]])
    scores = torch.tensor([[1.0, 0.0, -1.0], [3.0, 2.0, 1.0]])
    expected = (nll(1) + nll(-1) + nll(-5) + nll(-4)) / 4
    assert ranking_loss(rewards, scores).item() == pytest.approx(expected, abs=1e-6)


def test_difference_loss_is_the_mean_of_loser_minus_winner():
    """Differences winner - loser are 1 and -3, so the loss is (-1 + 3) / 2 = 1."""
    rewards = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert ranking_loss(rewards, scores, loss_type="diff").item() == 1.0


def test_weights_scale_an_item_but_not_the_count_of_pairs():
    """Differences 1 and 2 with weights 0.5 and 0: 0.5 nll(1) / 2."""
    rewards, scores = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = ranking_loss(rewards, scores, torch.tensor([0.5, 0.0]))
    assert loss.item() == pytest.approx(0.5 * nll(1) / 2, abs=1e-6)


def test_apo_loss_weighs_golden_over_sampled_pairs():
    """One human pair with difference 1, one golden pair with difference 2, both divided by two pairs:
    (1.0 nll(1) + 0.1 / 4 nll(2)) / 2."""
    rewards, scores = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    human, golden = apo_loss(rewards, scores, torch.tensor([0.0, 1.0]), **COEFFICIENTS)
    assert human.item() == pytest.approx(nll(1) / 2, abs=1e-6)
    assert golden.item() == pytest.approx(0.025 * nll(2) / 2, abs=1e-6)


def test_apo_loss_without_human_term_is_the_plain_game():
    """`--rm_kl_coeff 0` with the difference loss: 0.1 / 4 * -2 / 2 = -0.025."""
    rewards, scores = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    coefficients = COEFFICIENTS | {"rm_kl_coeff": 0.0, "apo_loss_type": "diff"}
    human, golden = apo_loss(rewards, scores, torch.tensor([0.0, 1.0]), **coefficients)
    assert (human.item(), golden.item()) == (0, pytest.approx(-0.025))


def test_group_of_a_golden_and_four_samples_equals_its_four_pairs():
    """Scores [1, 0, 0, 0, 0] make the pairs (golden, sample i); as four items they are the same four pairs."""
    rewards = torch.tensor([[1.0, 0.5, -1.0, 2.0, 0.0]])
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    pairs = torch.stack([torch.stack([rewards[0, 0], sample]) for sample in rewards[0, 1:]])
    pair_scores = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    torch.testing.assert_close(ranking_loss(rewards, scores), ranking_loss(pairs, pair_scores))


def test_batch_without_a_pair_gives_no_loss_and_no_gradient():
    rewards = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = ranking_loss(rewards, torch.tensor([[0.5, 0.5]]))
    loss.backward()
    assert loss.item() == 0.0
    assert rewards.grad.tolist() == [[0.0, 0.0]]


def test_loss_of_extreme_rewards_is_finite():
    """-log sigmoid(-1000) = 1000, where exp(1000) overflows."""
    rewards = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    loss = ranking_loss(rewards, torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == 1000.0
    assert rewards.grad.tolist() == [[-1.0, 1.0]]


def test_absent_responses_get_no_gradient_even_if_their_reward_is_nan():
    rewards = torch.tensor([[1.0, 0.0, torch.nan]], requires_grad=True)
    loss = ranking_loss(rewards, torch.tensor([[1.0, 0.0, -1.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(nll(1), abs=1e-6)
    assert rewards.grad[0, 2] == 0


ITEMS = st.lists(
    st.lists(st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=2, max_size=5),
    min_size=1,
    max_size=5,
)


def as_matrices(items: list[list[tuple[float, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, items))
    padded = [item + [(7.0, -1.0)] * (width - len(item)) for item in items]
    rewards, scores = torch.tensor(padded, dtype=torch.float64).unbind(-1)
    return rewards, scores


@given(ITEMS)
@settings(deadline=None)
def test_loss_of_ragged_items_is_the_mean_over_their_pairs(items):
    """Written as plain loops over the present responses."""
    losses = [nll(a - b) for item in items for a, s in item for b, t in item if s > t]
    expected = sum(losses) / len(losses) if losses else 0.0
    assert ranking_loss(*as_matrices(items)).item() == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_by_hand():
    """Item 1: winner 2, loser 1. Item 2: scores 1 > 0.5 > 0 with rewards 0, 0, 3: differences 0 (a tie), -3, -3.

    4 pairs, 1 right, 1 tie; margin (1 + 0 - 3 - 3) / 4 = -1.25; mean reward (2 + 1 + 0 + 0 + 3) / 5 = 1.2.
    """
    rewards = np.array([[2.0, 1.0, np.nan], [0.0, 0.0, 3.0]], dtype=np.float32)
    scores = np.array([[1.0, 0.0, -1.0], [1.0, 0.5, 0.0]], dtype=np.float32)
    metrics = preference_metrics(rewards, scores)
    assert (metrics["pairs"], metrics["ties"]) == (4, 1)
    assert metrics["Preference Acc"] == metrics["accuracy"] == 0.25
    assert metrics["margin"] == -1.25
    assert metrics["Avg Score"] == metrics["mean_reward"] == pytest.approx(1.2)


def test_calibration_errors_by_hand():
    """Two pairs, both with sigmoid(difference) = 0.8: one right, one wrong, so that both orders of both give
    0.8 (right), 0.2 (wrong), 0.2 (right), 0.8 (wrong). With 2 bins: mean confidences 0.2 and 0.8, accuracies 1/2 and
    1/2, gaps 0.3 and 0.3: ECE = ACE = MCE = 0.3.
    """
    logit = math.log(0.8 / 0.2)
    rewards, scores = np.array([[logit, 0.0], [0.0, logit]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    errors = calibration_errors(rewards, scores, 2)
    assert errors == pytest.approx({f"calibration_{name}_bin2": 0.3 for name in ("ECE", "ACE", "MCE")})


def test_calibration_errors_weigh_bins_differently():
    """Three right pairs at 0.9 and one wrong at 0.6: with 4 bins the two orders of each lie at 0.1 (3, accuracy 0),
    0.4 (1, accuracy 1), 0.6 (1, accuracy 0), 0.9 (3, accuracy 1); gaps 0.1, 0.6, 0.6, 0.1.
    ECE = (3 * 0.1 + 0.6 + 0.6 + 3 * 0.1) / 8 = 0.225, ACE = 1.4 / 4 = 0.35, MCE = 0.6.
    """
    high, low = math.log(9), math.log(1.5)
    rewards = np.array([[high, 0.0]] * 3 + [[0.0, -low]])
    scores = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    errors = calibration_errors(rewards, scores, 4)
    expected = {"calibration_ECE_bin4": 0.225, "calibration_ACE_bin4": 0.35, "calibration_MCE_bin4": 0.6}
    assert errors == pytest.approx(expected)


@given(ITEMS)
@settings(deadline=None)
def test_swapping_labels_turns_accuracy_into_its_complement_less_ties(items):
    rewards, scores = (tensor.numpy() for tensor in as_matrices(items))
    metrics = preference_metrics(rewards, scores)
    swapped = preference_metrics(rewards, np.where(scores < 0, scores, 1 - scores))
    assert swapped["pairs"] == metrics["pairs"]
    if metrics["pairs"]:
        ties = metrics["ties"] / metrics["pairs"]
        assert swapped["accuracy"] == pytest.approx(1 - metrics["accuracy"] - ties)
        assert swapped["margin"] == pytest.approx(-metrics["margin"])


def test_data_without_a_pair_reports_rewards_and_no_accuracy():
    metrics = preference_metrics(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), [10])
    assert metrics == {"Avg Score": 2.0, "mean_reward": 2.0, "pairs": 0, "ties": 0}


# ------------------------------------------------------------------------------------------------ training


def make_trainer(tmp_path, model, tokenizer, items, **flags) -> RewardModelTrainer:
    args = RewardTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **flags,
    )
    collator = RewardDataCollator(tokenizer.pad_token_id)
    data = {"data_collator": collator, "train_dataset": items, "processing_class": tokenizer}
    return RewardModelTrainer(model=model, args=args, **data)


def random_items(num: int, num_responses: int = 2, seed: int = 0) -> list[dict]:
    """Items of short random sequences, the first response preferred; every second item is golden over sampled."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (num, num_responses), generator=generator).tolist()
    draw = lambda length: torch.randint(5, 1024, (length,), generator=generator).tolist()  # noqa: E731
    return [
        {
            "input_ids": [[1, *draw(length), 2] for length in row],
            "scores": [1.0] + [0.0] * (num_responses - 1),
            "is_apo": index % 2 == 1,
        }
        for index, row in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        ({"per_device_eval_batch_size": 1}, 2 * 512),
        ({"per_device_eval_batch_size": 8}, 2048),
        ({"per_device_eval_batch_size": 8, "eval_token_budget": 5000}, 5000),
    ],
)
def test_tokens_of_an_evaluation_batch_on_a_cpu(tmp_path, monkeypatch, flags, budget):
    monkeypatch.setattr("apo.evaluation.batch_by_tokens", lambda dataset, budget, batching: budget)
    model, tokenizer = load_model(max_length=512)
    assert make_trainer(tmp_path, model, tokenizer, random_items(1), **flags).eval_batches([]) == budget


def test_every_parameter_moves_in_a_training_step(tmp_path):
    model, tokenizer = load_model(pooling_type="last")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    flags = {"task_type": "apo", "apo_loss_coeff": 0.5, "learning_rate": 1e-3, "max_steps": 1}
    trainer = make_trainer(tmp_path, model, tokenizer, random_items(8), per_device_train_batch_size=8, **flags)
    trainer.train()
    unmoved = [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, before[name])]
    assert unmoved == []


class LosesItsHead(RewardModelTrainer):
    """Writes a model without its reward head, as a fault of a library would."""

    def _save(self, output_dir=None, state_dict=None):
        state_dict = self.model.state_dict()
        state_dict[self.fault] = self.change(state_dict[self.fault])
        super()._save(output_dir, state_dict)


@pytest.mark.parametrize("fault", ["reward_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_saved_model_that_is_not_the_trained_one_is_an_error(tmp_path, fault):
    model, tokenizer = load_model(pooling_type="last")
    trainer = make_trainer(tmp_path, model.train(), tokenizer, random_items(4))
    trainer.__class__ = LosesItsHead
    trainer.fault, trainer.change = fault, torch.clone
    trainer.save_model()
    assert model.training
    trainer.change = lambda weight: weight + 0.1 * torch.randn_like(weight)
    with pytest.raises(InputError, match="the saved model gives other rewards than the one in memory"):
        trainer.save_model()


def test_lm_head_moves_with_the_lm_loss(tmp_path):
    model, tokenizer = load_model(with_lm_head=True)
    before = model.lm_head.weight.detach().clone()
    flags = {"lm_loss_coeff": 0.5, "learning_rate": 1e-3, "max_steps": 1}
    make_trainer(tmp_path, model, tokenizer, random_items(4), **flags).train()
    assert not torch.equal(model.lm_head.weight, before)


def train_with(tmp_path, batch_size: int, accumulation: int, **flags):
    model, tokenizer = load_model(pooling_type="last")
    items = random_items(16)
    flags = {"learning_rate": 1e-3, "max_steps": 2} | flags
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, model, tokenizer, items, **sizes, **flags)
    trainer.train()
    return trainer, model


@pytest.mark.parametrize("task", [{"task_type": "training"}, {"task_type": "apo", "apo_loss_coeff": 0.1}])
def test_one_item_accumulated_eight_times_equals_eight_items_at_once(tmp_path, task):
    """Every item has one pair, so the mean over the pairs of 8 items is the mean of 8 items' means, for APO too: its
    terms are divided by the number of pairs of both kinds. SGD, because AdamW turns the rounding of a gradient near 0
    into a step."""
    one, model = train_with(tmp_path, 1, 8, optim="sgd", **task)
    other, other_model = train_with(tmp_path, 8, 1, optim="sgd", **task)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (one, other)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    terms = [[log["ranking_term"] for log in t.state.log_history if "loss" in log] for t in (one, other)]
    assert terms[0] == pytest.approx(terms[1], abs=1e-6)
    for weight, other_weight in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(weight, other_weight, rtol=0, atol=1e-5)


def test_logged_loss_is_the_mean_over_micro_batches_and_the_sum_of_its_terms(tmp_path):
    """At learning rate 0 the two logged losses are those of the 16 items themselves, 8 a step."""
    trainer, model = train_with(tmp_path, 2, 4, task_type="apo", apo_loss_coeff=0.5, learning_rate=0.0, max_steps=2)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    model.eval()
    with torch.no_grad():
        losses = [
            trainer.compute_loss(model, RewardDataCollator(3)(random_items(16)[i : i + 1])).item() for i in range(16)
        ]
    assert (logs[0]["loss"] + logs[1]["loss"]) / 2 == pytest.approx(sum(losses) / 16, abs=1e-6)
    for log in logs:
        assert log["ranking_term"] + log["apo_term"] == pytest.approx(log["loss"], abs=1e-6)
        assert log["apo_term"] > 0


def test_logged_accuracy_and_margin_are_those_of_the_items_seen(tmp_path):
    trainer, model = train_with(tmp_path, 4, 4, learning_rate=0.0, max_steps=1, task_type="apo", apo_loss_coeff=0.1)
    [log] = [log for log in trainer.state.log_history if "loss" in log]
    model.eval()
    rewards = torch.stack([rewards_of(model, item["input_ids"], 3) for item in random_items(16)])
    differences = rewards[:, 0] - rewards[:, 1]
    assert log["accuracy"] == pytest.approx((differences > 0).float().mean().item())
    assert log["margin"] == pytest.approx(differences.mean().item(), abs=1e-5)
    assert log["apo_accuracy"] == pytest.approx((differences[1::2] > 0).float().mean().item())


def test_lm_term_averages_over_the_responses_above_the_threshold(tmp_path):
    """Normalised scores 0.99, 0.5, 0.9 and 0.2, threshold 0.85: the first and the third response are modelled; with LM
    losses 1 and 4 the term is 0.3 (1 + 4) / 2 = 0.75. With no response above the threshold it is 0."""
    model, tokenizer = load_model(with_lm_head=True)
    trainer = make_trainer(tmp_path, model, tokenizer, [], lm_loss_coeff=0.3)
    scores = torch.tensor([[0.99, 0.5, -1.0], [0.9, 0.2, -1.0]])
    assert trainer._lm_mask(scores).tolist() == [True, False, True, False]
    rewards, apo_mask = torch.zeros_like(scores), torch.zeros(2)
    lm_losses = torch.tensor([[1.0, 0.0, torch.nan], [4.0, 0.0, torch.nan]])
    assert trainer._loss_terms(scores, apo_mask, rewards, lm_losses)["lm_term"].item() == pytest.approx(0.75)
    assert trainer._loss_terms(scores.clamp(max=0.5), apo_mask, rewards, 0 * lm_losses)["lm_term"].item() == 0.0


def test_loss_with_lm_term_is_the_sum_of_both(tmp_path):
    """0.3 times the mean LM loss of the two preferred responses, each scored by itself, beside the ranking loss."""
    model, tokenizer = load_model(with_lm_head=True)
    items = random_items(2)
    trainer = make_trainer(tmp_path, model, tokenizer, [], lm_loss_coeff=0.3)
    with torch.no_grad():
        loss = trainer.compute_loss(model, RewardDataCollator(3)(items)).item()
        chosen = [torch.tensor([item["input_ids"][0]]) for item in items]
        lm_losses = [model(ids, torch.ones_like(ids), torch.tensor([True])).lm_losses.item() for ids in chosen]
        rewards = torch.stack([rewards_of(model, item["input_ids"], 3) for item in items])
    ranking = ranking_loss(rewards, torch.tensor([[1.0, 0.0]] * 2)).item()
    assert loss == pytest.approx(ranking + 0.3 * sum(lm_losses) / 2, abs=1e-5)


def test_grouping_by_length_goes_by_the_tokens_of_an_item(tmp_path):
    """Not by the number of its responses, which is what transformers would measure."""
    model, tokenizer = load_model()
    rows = [row | {"length": 10 + i} for i, row in enumerate(random_items(6))]
    flags = {"train_sampling_strategy": "group_by_length"}
    trainer = make_trainer(tmp_path, model, tokenizer, Dataset.from_list(rows), **flags)
    assert list(trainer._get_train_sampler().lengths) == [10, 11, 12, 13, 14, 15]


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    """Items of 2 to 4 responses: the loss is over all pairs at once, not a mean of batch means."""
    items = [pair(f"Question {i}?", " yes" * (i + 1), " no") for i in range(5)]
    texts = [f"What?<sep> number {i}" for i in range(4)]
    items += [{"text": texts, "scores": [3, 1, 2, 1]}, {"text": texts[:3], "scores": [0, 1, 1], "type": "apo"}]
    flags = {"model_name_or_path": CHECKPOINT, "task_type": "apo", "apo_loss_coeff": 0.5, "lm_loss_coeff": 0.1}
    flags |= {"eval_data_path": write_records(tmp_path / "odd.json", items), "use_cpu": True, "report_to": "none"}
    results = []
    for size in (1, 3, 7):
        run_main(**flags, per_device_eval_batch_size=size, output_dir=tmp_path / str(size))
        metrics = read_json(tmp_path / str(size) / "final_eval_results.json")["odd.json"]
        results.append(
            {name: value for name, value in metrics.items() if "_per_second" not in name and "time" not in name}
        )
    assert results[0]["eval_odd.json_pairs"] == 5 + 5 + 2
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-5)


def test_evaluation_loss_is_that_of_all_pairs(tmp_path):
    """Recomputed from the reported rewards of single sequences."""
    flags = {"model_name_or_path": CHECKPOINT, "pooling_type": "last", "add_sep_token": True, "use_cpu": True}
    run_main(**flags, eval_data_path=E2E / "eval_b.json", output_dir=tmp_path, report_to="none")
    run_main(**flags, eval_data_path=E2E / "eval_b.json", output_dir=tmp_path, report_to="none", task_type="inference")
    scores = [v for row in read_json(tmp_path / "eval_b_pred_reward_model_results.json") for v in row.values()]
    records = read_json(E2E / "eval_b.json")
    assert len(scores) == sum(len(record["text"]) for record in records)
    losses, position = [], 0
    for record in records:
        rewards = scores[position : position + len(record["text"])]
        position += len(rewards)
        losses += [
            nll(a - b)
            for a, s in zip(rewards, record["scores"], strict=True)
            for b, t in zip(rewards, record["scores"], strict=True)
            if s > t
        ]
    metrics = read_json(tmp_path / "eval_results.json")
    assert metrics["eval_eval_b.json_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
