"""tools/dev/benchmark.py: what it counts, by hand; the reference's batch; every mode through the real command."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO_ROOT, command_line, forward, load_model
from torch.utils.flop_counter import FlopCounterMode

from apo.cli import InputError
from apo.records import PreferenceRecord
from reward_datasets import RewardDataCollator
from tools.dev.benchmark import (
    Contestant,
    FixedLengthCollator,
    format_race,
    lengthen_prompts,
    main,
    plan_rounds,
    split_pairs,
    summarize,
)

SAMPLE = REPO_ROOT / "data" / "sample"
SIZES = {"batch_size": 2, "num_batches": 1, "rounds": 1, "max_length": 96, "threads": 1, "device": "cpu"}


def benchmark_command(output_dir: Path, **flags: object) -> list[str]:
    flags = {"data_dir": SAMPLE, "output_dir": output_dir, **SIZES, **flags}
    return [str(REPO_ROOT / "tools" / "benchmark.py"), *command_line(**flags)]


def run_benchmark(output_dir: Path, **flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *benchmark_command(output_dir, **flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def read_results(output_dir: Path) -> dict:
    return json.loads((output_dir / "benchmark.json").read_text(encoding="utf-8"))["results"]


# ------------------------------------------------------------------------------------------------ counting


def test_group_of_three_makes_two_pairs_preferred_first():
    group = {"input_ids": [[1], [2], [3]], "scores": [0.1, 0.9, 0.1], "is_apo": True, "num_pairs": 2}
    pairs = split_pairs(group)
    assert [pair["input_ids"] for pair in pairs] == [[[2], [1]], [[2], [3]]]
    assert all(pair["scores"] == [0.9, 0.1] and pair["num_pairs"] == 1 and pair["is_apo"] for pair in pairs)


def test_rounds_repeat_no_item_and_take_others_while_there_are_any():
    rounds = plan_rounds(10, 5, 4, seed=1)
    assert [len(set(indices)) for indices in rounds] == [4] * 5
    assert not set(rounds[0]) & set(rounds[1])
    assert rounds == plan_rounds(10, 5, 4, seed=1)
    with pytest.raises(InputError, match="a round needs 12 items, the data has 10"):
        plan_rounds(10, 1, 12, seed=1)


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    """4/1, 9/3 and 2/1: median 3; the ratio of the medians would be 4/1."""
    results = {"tree": [{"seconds": s} for s in (1.0, 3.0, 1.0)], "padded": [{"seconds": s} for s in (4.0, 9.0, 2.0)]}
    results = {name: [{**r, "tflops_per_second": 1.0} for r in rounds] for name, rounds in results.items()}
    summary = summarize(results, peak_tflops=4.0)
    assert summary["padded"]["first_is_faster"] == 3.0
    assert summary["padded"]["first_is_faster_range"] == [2.0, 4.0]
    assert summary["tree"]["first_is_faster"] == 1.0 and summary["tree"]["share_of_peak_rate"] == 0.25


def test_long_prompts_have_the_length_asked_for_and_short_answers():
    _, tokenizer = load_model()
    records = [
        PreferenceRecord(
            [f"Question {i}? "] * 2, [" Yes, it is.", " No." * (1 + 99 * (i == 3))], [1.0, 0.0], str(i), []
        )
        for i in range(9)
    ]
    long = lengthen_prompts(records, tokenizer, 60)
    assert [record.query_id for record in long] == [str(i) for i in range(9) if i != 3]
    assert all(record.prompts[0].endswith(f"Question {record.query_id}? ") for record in long)
    assert all(50 <= len(tokenizer.encode(record.prompts)[0]) <= 70 for record in long)


@pytest.mark.parametrize("batching", ["tree", "padded"])
def test_operations_are_those_of_the_matrix_products_that_run(batching):
    """The linear layers as torch counts them, but for the reward head: 2 x 32 operations for each of two rows of 7
    tokens, or for the two pooled tokens. Attention of 4 heads of 8: a token attends to 1 + ... + 7 = 28 in a row, in
    each of two layers; in a tree of 5 shared tokens and 2 + 2 new ones to 15 and twice 6 + 7, in the first layer."""
    attention = "tree_branches" if batching == "tree" else "sdpa"
    model, tokenizer = load_model(attention=attention, pooling_type="eos")
    trainer = SimpleNamespace(
        model=model, create_optimizer=lambda: None, accelerator=SimpleNamespace(prepare=lambda *objects: objects)
    )
    contestant = Contestant(batching, trainer)
    item = {"input_ids": [[1, 7, 8, 9, 9, 5, 2], [1, 7, 8, 9, 9, 6, 2]], "scores": [0.9, 0.1], "is_apo": False}
    batch = RewardDataCollator(tokenizer.pad_token_id, batching=batching)([item])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(model, batch)
    linear = counter.get_total_flops() - 2 * 32 * (2 if batching == "tree" else 14)
    attended = 15 + 2 * 13 if batching == "tree" else 2 * 2 * 28
    assert contestant.count_flops("scoring") == linear + 4 * 4 * 8 * attended
    assert contestant.num_tokens == (9 if batching == "tree" else 14)


# ------------------------------------------------------------------------------------------------ the batch


def test_reference_pads_to_max_length_and_runs_dummies():
    items = [
        {"input_ids": [[1, 7, 2], [1, 2]], "scores": [0.9, 0.1], "is_apo": False},
        {"input_ids": [[1, 2]], "scores": [0.5], "is_apo": False},
    ]
    batch = FixedLengthCollator(pad_token_id=3, dummy_ids=[1, 2], max_length=5)(items)
    expected = [[1, 7, 2, 3, 3], [1, 2, 3, 3, 3], [1, 2, 3, 3, 3], [1, 2, 3, 3, 3]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].sum(-1).tolist() == [3, 2, 2, 2]
    torch.testing.assert_close(batch["scores"], torch.tensor([[0.9, 0.1], [0.5, -1.0]]))


def test_reference_pads_a_single_item_to_its_longest():
    item = {"input_ids": [[1, 7, 2], [1, 2]], "scores": [0.9, 0.1], "is_apo": False}
    batch = FixedLengthCollator(pad_token_id=3, dummy_ids=[1, 2], max_length=5)([item])
    assert batch["input_ids"].tolist() == [[1, 7, 2], [1, 2, 3]]


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["hh_pairs", "apo_groups"])
def test_all_ways_to_train_compute_the_same_loss(tmp_path, base_llama, workload):
    flags = {"model_name_or_path": base_llama, "workload": workload}
    contestants = ["tree", "padded", "padded_groups", "reference"]
    contestants += ["trl"] * bool(importlib.util.find_spec("trl"))
    done = run_benchmark(tmp_path, contestants=contestants, **flags)
    results = read_results(tmp_path)[workload]
    assert list(results) == contestants
    assert all(values["check"] == pytest.approx(results["tree"]["check"], abs=1e-5) for values in results.values())
    tokens = {name: values["tokens_run"] for name, values in results.items()}
    assert tokens["tree"] < tokens["padded"] < tokens["reference"]
    # Pairs of 2 rows of 96 tokens; 2 prompts make 2 pairs or, with 4 samples each, 8.
    assert tokens["reference"] == 2 * 96 * (2 if workload == "hh_pairs" else 8)
    assert 0 <= results["tree"]["wasted_tokens"] < results["padded"]["wasted_tokens"]
    assert all(values["items_per_second"] > 0 and values["tflops_per_second"] > 0 for values in results.values())
    assert "| reference |" in done.stdout and (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.slow
def test_all_ways_to_score_give_the_same_mean_reward(tmp_path):
    """A random LLaMA of its own; 2 prompts x 4 answers x 96 tokens for the reference."""
    run_benchmark(tmp_path, mode="scoring", hidden_size=32, num_layers=1)
    results = read_results(tmp_path)["apo_groups"]
    assert list(results) == ["tree", "padded", "reference", "padded_sorted"]
    assert results["tree"]["wasted_tokens"] == 0
    assert all(values["check"] == pytest.approx(results["tree"]["check"], abs=1e-5) for values in results.values())
    assert results["reference"]["tokens_run"] == 2 * 4 * 96


@pytest.mark.slow
def test_scaling_tells_the_cost_of_an_item_at_each_size(tmp_path, base_llama):
    done = run_benchmark(tmp_path, mode="scaling", sizes=[4, 8], model_name_or_path=base_llama)
    results = read_results(tmp_path)["hh_pairs"]
    assert list(results) == ["tree, 4 items", "tree, 8 items", "padded_sorted, 4 items", "padded_sorted, 8 items"]
    assert results["tree, 4 items"]["ratio"] == 1.0 and results["tree, 8 items"]["seconds_per_item"] > 0
    assert "at most 1.15" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"mode": "scoring", "contestants": ["trl"]}, "--contestants trl: --mode scoring has tree, padded"),
        ({"data_dir": "nowhere"}, "nowhere: found no rm_data/hh_split_rm_*.sample.json"),
        ({"hidden_size": 200}, "--hidden_size 200 --num_heads 3: expected a hidden size"),
        ({"device": "cuda"}, "--device cuda: found no GPU"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", benchmark_command(tmp_path / "out", **flags))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_trl_alone_needs_trl(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", benchmark_command(tmp_path, contestants=["trl"]))
    with pytest.raises(SystemExit):
        main()
    assert "error: --contestants trl: TRL is not installed" in capsys.readouterr().err


def test_table_names_the_first_contestant_and_hides_an_unknown_peak():
    values = dict.fromkeys(("items_per_second", "real_tokens_per_second", "peak_memory_bytes", "check"), 1.0)
    values |= {"wasted_tokens": 0.5, "share_of_peak_rate": None}
    values |= {"first_is_faster": 1.0, "first_is_faster_range": [1.0, 1.0]}
    lines = format_race({"padded": values}).splitlines()
    assert lines[0].endswith("padded is faster by (range) |")
    assert "| 50.0 % |" in lines[2] and "| - |" in lines[2]
