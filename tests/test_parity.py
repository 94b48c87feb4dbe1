"""Every number that the reference implementation returned for the fixtures in tests/parity/, within its tolerance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, E2E, PARITY, forward, load_model, read_json, run_main, training_losses, write_records

from apo.tokenizer import load_reward_tokenizer
from reward_datasets import RewardDataCollator, load_preference_dataset
from trainer import apo_loss, preference_metrics, ranking_loss

LOSSES = read_json(PARITY / "loss.json")
METRICS = read_json(PARITY / "metrics.json")
COLLATE = read_json(PARITY / "collate.json")
FORWARD = {case["case"]: case for case in read_json(PARITY / "forward.json")}
REFERENCE = read_json(E2E / "reference.json")
ATTENTION = {"tree": "tree_branches", "padded": "sdpa"}

# ------------------------------------------------------------------------------------------------ loss and metrics


@pytest.mark.parametrize("case", LOSSES, ids=range(len(LOSSES)))
def test_loss(case):
    rewards = torch.tensor(case["logits"], requires_grad=True)
    scores = torch.tensor(case["scores"])
    assert ranking_loss(rewards, scores).item() == pytest.approx(case["preference_loss"], abs=1e-6)
    names = ("rm_kl_coeff", "apo_loss_coeff", "apo_sample_num", "apo_loss_type")
    total = sum(apo_loss(rewards, scores, torch.tensor(case["apo_data_mask"]), **{name: case[name] for name in names}))
    assert total.item() == pytest.approx(case["apo_total_loss"], abs=1e-6)
    if "apo_total_grad" in case:
        total.backward()
        torch.testing.assert_close(rewards.grad, torch.tensor(case["apo_total_grad"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", METRICS, ids=range(len(METRICS)))
def test_metrics(case):
    rewards, scores = np.array(case["predictions"]), np.array(case["label_ids"])
    metrics = preference_metrics(rewards, scores, case["calibration_bins"])
    assert case["metrics"].keys() <= metrics.keys()
    assert {name: metrics[name] for name in case["metrics"]} == pytest.approx(case["metrics"], abs=1e-6)


# ------------------------------------------------------------------------------------------------ data


def load_items(items: list[dict], config: dict, folder: Path):
    path = write_records(folder / "items.json", items)
    names = ("max_length", "truncation_side", "add_sep_token")
    tokenizer = load_reward_tokenizer(str(CHECKPOINT))
    return load_preference_dataset(
        path, tokenizer, data_type="comparison_pair", **{name: config[name] for name in names}
    )


def collate(case: dict, folder: Path, batching: str = "padded") -> dict[str, torch.Tensor]:
    dataset = load_items(case["items"], case["config"], folder)
    return RewardDataCollator(3, case["config"]["padding_side"], batching)([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize("case", COLLATE, ids=range(len(COLLATE)))
def test_collated_ids_and_scores(case, tmp_path):
    """The fixture has a dummy response wherever one is absent, in (B, R, T); we have the present ones, in (N, T)."""
    batch = collate(case, tmp_path)
    scores = torch.tensor(case["scores"])
    torch.testing.assert_close(batch["scores"], scores, rtol=0, atol=1e-6)
    assert batch["apo_mask"].tolist() == case["apo_data_mask"]
    ids, mask = (torch.tensor(case[name])[scores >= 0] for name in ("input_ids", "attention_mask"))
    assert len(ids) == len(batch["input_ids"])
    for row, row_mask, our_row, our_mask in zip(ids, mask, batch["input_ids"], batch["attention_mask"], strict=True):
        assert our_row[our_mask.bool()].tolist() == row[row_mask.bool()].tolist()


@pytest.mark.parametrize("batching", ATTENTION)
@pytest.mark.parametrize("pooling_type", ["last", "eos", "average"])
def test_rewards(pooling_type, batching, tmp_path):
    """`max` is not recorded: in the reference padding takes part in it."""
    model, _ = load_model(pooling_type=pooling_type, attention=ATTENTION[batching])
    for number, case in enumerate(COLLATE):
        batch = collate(case, tmp_path / str(number), batching)
        with torch.no_grad():
            rewards = forward(model, batch).rewards
        recorded = torch.tensor(FORWARD[number]["rm_logits"][pooling_type])[batch["scores"] >= 0]
        torch.testing.assert_close(rewards, recorded, rtol=0, atol=1e-5, msg=f"case {number}")


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("batching", ATTENTION)
def test_sixteen_steps_of_training(batching, tmp_path):
    """The items in file order, one at a time, the mean of four a step."""
    recorded = read_json(PARITY / "train.json")
    config = recorded["config"]
    dataset = load_items(recorded["items"], config, tmp_path)
    model, tokenizer = load_model(pooling_type=config["pooling_type"], attention=ATTENTION[batching])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    collator = RewardDataCollator(tokenizer.pad_token_id, batching=batching)
    names = ("rm_kl_coeff", "apo_loss_coeff", "apo_sample_num")
    coefficients = {name: config[name] for name in names} | {"apo_loss_type": "ranking"}

    def rewards_of_item(index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = collator([dataset[index]])
        return forward(model, batch).rewards[None], batch

    losses = []
    for start in range(0, 64, 4):
        step = []
        for index in range(start, start + 4):
            rewards, batch = rewards_of_item(index)
            step.append(sum(apo_loss(rewards, batch["scores"], batch["apo_mask"], **coefficients)))
        loss = torch.stack(step).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(recorded["losses"], abs=1e-4)
    with torch.no_grad():
        final = torch.cat([rewards_of_item(index)[0] for index in range(16)])
    torch.testing.assert_close(final, torch.tensor(recorded["final_logits_first16"]), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ whole runs

# The flags that the runs share (tests/parity/README.md). They were recorded with the ids of transformers' tokenizer.
SHARED_FLAGS = """--model_type reward --add_sep_token True --remove_unused_columns false --padding_side right
    --truncation_side left --pooling_type last --max_length 256 --per_device_train_batch_size 1
    --gradient_accumulation_steps 4 --eval_strategy no --save_strategy no --weight_decay 0. --learning_rate 1e-3
    --warmup_steps 4 --logging_steps 1 --num_train_epochs 1 --report_to none --fp16 false --seed 42 --use_cpu True
    --rm_calibration True --calibration_bins 5 10 --tokenizer_backend transformers"""
EVAL_RUNS = [name for name, run in REFERENCE.items() if "final_eval_results" in run]


@pytest.fixture(scope="module", params=["tree", pytest.param("padded", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    """Runs each recorded command once, with each batching: {name: output folder}."""
    folders = {}

    def run(name: str, model: Path = CHECKPOINT, extra: list[str] | None = None) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            extra = REFERENCE[name]["extra"] if extra is None else extra
            extra = [str(E2E / word) if word.endswith(".json") else word for word in extra]
            flags = {"batching": request.param, "model_name_or_path": model, "output_dir": folders[name]}
            run_main(*SHARED_FLAGS.split(), *extra, **flags)
        return folders[name]

    return run


@pytest.mark.parametrize("name", [name for name in EVAL_RUNS if "train_losses" in REFERENCE[name]])
def test_losses_of_a_whole_run(runs, name):
    assert training_losses(runs(name)) == pytest.approx(REFERENCE[name]["train_losses"], abs=1e-4)


def without_timing(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "preparation_time" not in name}


@pytest.mark.parametrize("name", EVAL_RUNS)
def test_metrics_of_a_whole_run(runs, name):
    ours = read_json(runs(name) / "final_eval_results.json")["eval_a.json"]
    recorded = without_timing(REFERENCE[name]["final_eval_results"]["eval_a.json"])
    assert recorded.keys() <= ours.keys()
    assert {metric: ours[metric] for metric in recorded} == pytest.approx(recorded, abs=1e-4)


@pytest.mark.parametrize("name", EVAL_RUNS)
def test_metrics_of_a_whole_run_with_a_tie(runs, name):
    """One pair of eval_b.json has the same tokens on both sides. A tree gives both the same reward; padded, here and
    in the recorded runs, they may come out some 1e-7 apart in either direction, which counts: accuracy by 1/27 and the
    two calibration bins around one half. So we score the pairs, put that one difference at 0 and 1e-7 to both sides,
    and the metrics of the run and the recorded ones must each be those of one of the three.
    """
    folder = runs(name)
    flags = f"--task_type inference --data_type comparison_pair --eval_data_path {E2E / 'eval_b.json'}".split()
    model = folder if "train_losses" in REFERENCE[name] else CHECKPOINT
    scoring = runs(f"{name}_scores", model, flags)
    rows = read_json(scoring / "eval_b_pred_reward_model_results.json")
    records = read_json(E2E / "eval_b.json")
    assert {len(record["text"]) for record in records} == {2}
    rewards = np.array([value for row in rows for value in row.values()]).reshape(-1, 2)
    scores = np.array([record["scores"] for record in records])
    (tie,) = np.flatnonzero(np.abs(rewards[:, 0] - rewards[:, 1]) < 1e-6)

    prefix = "eval_eval_b.json_"
    ours = read_json(folder / "final_eval_results.json")["eval_b.json"]
    recorded = without_timing(REFERENCE[name]["final_eval_results"]["eval_b.json"])
    assert ours[f"{prefix}loss"] == pytest.approx(recorded.pop(f"{prefix}loss"), abs=1e-4)
    variants = []
    for difference in (0.0, 1e-7, -1e-7):
        rewards[tie, 0] = rewards[tie, 1] + difference
        metrics = preference_metrics(rewards, scores, [5, 10])
        variants.append({metric: metrics[metric.removeprefix(prefix)] for metric in recorded})
    for found in (ours, recorded):
        found = {metric: found[metric] for metric in recorded}
        assert any(variant == pytest.approx(found, abs=1e-4) for variant in variants), (variants, found)


@pytest.fixture(scope="module")
def scored_samples(runs) -> list[dict[str, float]]:
    flags = f"--task_type inference --data_type reject_sample --eval_data_path {E2E / 'samples.json'}".split()
    return read_json(runs("inference", extra=flags) / "samples_pred_reward_model_results.json")


def test_rewards_of_llm_samples(scored_samples):
    recorded = REFERENCE["inference"]["scores"]
    assert [list(row) for row in scored_samples] == [list(row) for row in recorded]
    rewards = [[value for row in rows for value in row.values()] for rows in (scored_samples, recorded)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_best_sample_of_each_query_is_the_recorded_one(scored_samples):
    """Rejection sampling keeps the response with the largest reward."""
    rewards = {key: value for row in scored_samples for key, value in row.items()}
    selected = []
    for record in read_json(E2E / "samples.json"):
        query_id = record["query_id"]
        scores = {key: rewards[f"{query_id}:{key}"] for key in record if key.startswith("sample_")}
        best = max(scores, key=scores.get)
        selected.append({"query_id": query_id, "target": record[best]})
    assert selected == REFERENCE["rejection_sampling"]
