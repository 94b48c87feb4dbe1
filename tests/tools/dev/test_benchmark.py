"""tools/dev/benchmark.py: what it counts, by hand; the reference's batch; both modes through the real command."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO_ROOT, command_line, forward, load_model, read_json, run_tool

from apo.cli import InputError
from reward_datasets import RewardDataCollator
from tools.dev.benchmark import (
    Contestant,
    draw_rounds,
    format_race,
    lengthen_prompts,
    main,
    make_dataset,
    matrix_rate,
    pad_to_max_length,
    summarize,
)

FLAGS = {"data_dir": REPO_ROOT / "data" / "sample", "batch_size": 2, "num_batches": 1, "rounds": 1, "max_length": 96}
FLAGS |= {"threads": 1}


# ------------------------------------------------------------------------------------------------ data


def test_group_of_three_makes_two_pairs_preferred_first():
    group = {"input_ids": [[1], [2], [3]], "scores": [0.1, 0.9, 0.1], "is_apo": True, "num_pairs": 2}
    args = SimpleNamespace(mode="training", seed=42)
    assert make_dataset("tree", [group], args).to_list() == [group]
    pairs = sorted(make_dataset("padded", [group], args).to_list(), key=lambda pair: pair["input_ids"])
    assert [pair["input_ids"] for pair in pairs] == [[[2], [1]], [[2], [3]]]
    assert all(pair["scores"] == [0.9, 0.1] and pair["num_pairs"] == 1 and pair["is_apo"] for pair in pairs)
    for pair in make_dataset("trl", [group], args):
        assert [pair["chosen_ids"], pair["rejected_ids"]] == pair["input_ids"]


def test_rounds_take_other_rows_while_there_are_any():
    assert draw_rounds(range(10), 3, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    with pytest.raises(InputError, match="found 10 items, expected 12"):
        draw_rounds(range(10), 1, 12)


def test_long_prompts_have_the_given_length_and_short_responses():
    """Rows of bos, a prompt of two tokens, a response of two (70 in row 5) and eos. The four inner tokens of each of
    the first five rows make a context of 20; rows 6 and 7 get 17 of these before their own 3 tokens of prompt."""
    rows = [
        {"input_ids": [[1, 7, 10 + i, 5, 5, 2], [1, 7, 10 + i, *[6] * (70 if i == 5 else 2), 2]]} for i in range(8)
    ]
    for row in rows:
        row |= {"longest": max(map(len, row["input_ids"])), "length": sum(map(len, row["input_ids"])) - 3}
    long = list(lengthen_prompts(rows, 20))
    assert [row["input_ids"][0][18:] for row in long] == [[7, 16, 5, 5, 2], [7, 17, 5, 5, 2]]
    for row in long:
        first, second = row["input_ids"]
        assert first[:20] == second[:20] and first[20] != second[20]
        assert (row["longest"], row["length"]) == (23, 26)


# ------------------------------------------------------------------------------------------------ counting


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    """4/1, 9/3 and 2/1: median 3; the ratio of the medians would be 4/1."""
    results = {"tree": [{"seconds": s} for s in (1.0, 3.0, 1.0)], "padded": [{"seconds": s} for s in (4.0, 9.0, 2.0)]}
    summary = summarize(results)
    assert summary["padded"]["first_is_faster"] == 3.0
    assert summary["padded"]["first_is_faster_range"] == [2.0, 4.0]
    assert summary["tree"]["first_is_faster"] == 1.0 and summary["tree"]["seconds"] == 1.0


@pytest.mark.parametrize(("batching", "num_tokens"), [("tree", 9), ("padded", 14)])
def test_operations_are_two_per_weight_and_token_and_three_times_that_in_training(batching, num_tokens):
    """Two layers of width 32, each four projections of 32 x 32 and three of 32 x 64: 10,240 weights; a head of 32; an
    LM head of 32 x 1,024 that has no backward pass. Two sequences of 7 tokens share 5: 9 tokens as a tree."""
    attention = "tree_branches" if batching == "tree" else "sdpa"
    model, tokenizer = load_model(attention=attention, pooling_type="eos", with_lm_head=True)
    trainer = SimpleNamespace(
        model=model, create_optimizer=lambda: None, accelerator=SimpleNamespace(prepare=lambda *objects: objects)
    )
    contestants = [Contestant(batching, trainer, mode) for mode in ("scoring", "training")]
    weights, lm_head = 2 * 10_240 + 32, 32 * 1024
    assert contestants[0].operations_per_token == 2 * (weights + lm_head)
    assert contestants[1].operations_per_token == 2 * (3 * weights + lm_head)
    item = {"input_ids": [[1, 7, 8, 9, 9, 5, 2], [1, 7, 8, 9, 9, 6, 2]], "scores": [0.9, 0.1], "is_apo": False}
    batch = RewardDataCollator(tokenizer.pad_token_id, batching=batching)([item])
    with torch.no_grad():
        forward(model, batch)
    assert (contestants[0].num_tokens, contestants[0].num_passes) == (num_tokens, 1)


def test_matrix_rate_is_the_operations_of_the_median_product(monkeypatch):
    """(2 x 3 x 4 x 5 operations) / 0.25 s."""
    median = SimpleNamespace(median=0.25)
    monkeypatch.setattr("tools.dev.benchmark.Timer.blocked_autorange", lambda timer, min_run_time: median)
    assert matrix_rate(3, torch.ones(5, 4)) == 2 * 3 * 4 * 5 / 0.25


# ------------------------------------------------------------------------------------------------ the batch


def test_reference_pads_to_max_length_but_for_a_single_item():
    item = {"input_ids": [[1, 7, 2], [1, 2]], "scores": [0.9, 0.1], "is_apo": False}
    collator = RewardDataCollator(3)
    batch = pad_to_max_length(collator, 5, [item, item])
    assert batch["input_ids"].tolist() == 2 * [[1, 7, 2, 3, 3], [1, 2, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == 2 * [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert pad_to_max_length(collator, 5, [item])["input_ids"].tolist() == [[1, 7, 2], [1, 2, 3]]


# ------------------------------------------------------------------------------------------------ the command


def run_main(monkeypatch: pytest.MonkeyPatch, **flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *command_line(**{**FLAGS, **flags})])
    main()


@pytest.mark.slow
def test_all_ways_to_train_compute_the_same_loss(tmp_path, base_llama):
    """Pairs of 2 rows of 96 tokens for the reference, whether the two prompts have one pair each or four."""
    contestants = ["tree", "padded", "reference", *["trl"] * bool(importlib.util.find_spec("trl"))]
    workloads = ["hh_pairs", "apo_groups"]
    flags = {"output_dir": tmp_path, "model_name_or_path": base_llama, "workload": workloads, **FLAGS}
    done = run_tool("dev/benchmark.py", *command_line(contestants=contestants, **flags))
    assert "| reference " in done.stdout and (tmp_path / "benchmark.png").stat().st_size > 1000
    results = read_json(tmp_path / "benchmark.json")["results"]
    assert list(results) == workloads
    for result in results.values():
        assert list(result) == contestants
        assert all(values["check"] == pytest.approx(result["tree"]["check"], abs=1e-5) for values in result.values())
        tokens = {name: values["tokens_per_pair"] for name, values in result.items()}
        assert tokens["tree"] < tokens["padded"] < tokens["reference"] == 2 * 96
        assert all(values["share_of_matrix_rate"] > 0 for values in result.values())


@pytest.mark.slow
def test_all_ways_to_score_give_the_same_mean_reward(tmp_path, monkeypatch):
    """On a random LLaMA of the benchmark's own."""
    run_main(monkeypatch, mode="scoring", output_dir=tmp_path, hidden_size=32, num_layers=1)
    results = read_json(tmp_path / "benchmark.json")["results"]["apo_groups"]
    assert list(results) == ["tree", "padded", "reference", "padded_sorted"]
    assert all(values["check"] == pytest.approx(results["tree"]["check"], abs=1e-5) for values in results.values())
    assert results["tree"]["tokens_per_response"] < results["padded"]["tokens_per_response"]
    assert results["reference"]["tokens_per_response"] == 96


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mode": "scoring", "contestants": ["trl"]}, "--contestants trl: --mode scoring has tree, padded"),
        ({"workload": ["hh_pairs", "dpo"]}, "--workload hh_pairs dpo: --mode training has hh_pairs, apo_groups, long"),
        (
            {"mode": "alignment", "contestants": ["padded_all_logits"]},
            "--contestants padded_all_logits: --workload dpo has tree, padded, trl",
        ),
        ({"hidden_size": 200}, "--hidden_size 200 --num_heads 3: expected a hidden size"),  # of make_tiny_llama
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, output_dir=tmp_path / "out", **flags)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_trl_takes_part_only_where_it_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, output_dir=tmp_path, contestants=["trl"])
    assert "--mode training has tree, padded, reference\n" in capsys.readouterr().err


def test_table_has_the_columns_that_were_measured():
    keys = ("items_per_second", "tokens_per_pair", "peak_memory_mib", "share_of_matrix_rate", "check")
    values = dict.fromkeys(keys, 0.5) | {"first_is_faster": 1.0, "first_is_faster_range": [1.0, 1.0]}
    header, _, row = format_race({"padded": values}).splitlines()
    assert header.split(" | ")[1:-1] == list(keys) and "first_is_faster |" in header
    assert "0.5" in row and "range" not in header
