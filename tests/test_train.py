"""The command itself: what it refuses, and what it writes."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import (
    CHECKPOINT,
    E2E,
    ON_CPU,
    check_refusal,
    log_history,
    pair,
    read_json,
    run_main,
    run_train,
    training,
    write_records,
)
from safetensors.torch import load_file

from arguments import DataArguments, ModelArguments, RewardTrainingArguments

GOOD = {"text": ["a<sep>b", "a<sep>c"], "scores": [1, 0]}
# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("flag", ["train_data_path", "eval_data_path"])
def test_wrong_record_is_refused(refused, tmp_path, flag):
    path = write_records(tmp_path / "A.json", [GOOD, GOOD | {"scores": [1]}])
    error = refused(**training(tmp_path, **{flag: [E2E / "train.json", path]}))
    assert f'{path}: record 2: field "scores": found 1 scores, expected 2' in error
    assert not (tmp_path / "out").exists()


def test_wrong_flag_is_refused(refused, tmp_path):
    assert "did you mean --pooling_type" in refused(**training(tmp_path, pooling_tpye="last"))


@pytest.mark.slow
def test_real_process_ends_with_one_line_and_status_2(tmp_path):
    """As a user sees it."""
    flags = training(tmp_path, train_data_path=tmp_path / "nowhere.json")
    done = run_train(**ON_CPU, **flags, exit_status=2)
    assert f"{tmp_path / 'nowhere.json'}: no such file" in check_refusal(done.returncode, done.stderr)
    assert done.stdout == ""


def test_scoring_with_an_untrained_head_is_refused(base_llama, tmp_path, capsys):
    """Whether the head is there is known once the weights are loaded."""
    flags = {"model_name_or_path": base_llama, "task_type": "inference", "data_type": "reject_sample"}
    with pytest.raises(SystemExit) as exit_:
        run_main(**ON_CPU, **flags, eval_data_path=E2E / "samples.json", output_dir=tmp_path / "out")
    error = check_refusal(exit_.value.code, capsys.readouterr().err)
    assert f"{base_llama}: found no reward head" in error and "give a reward model" in error
    assert not list(tmp_path.glob("out/*"))


# ------------------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def eval_files(tmp_path_factory) -> list[Path]:
    """Two evaluation files of the same name, of 5 and 6 pairs."""
    folder = tmp_path_factory.mktemp("eval_files")
    records = read_json(E2E / "eval_a.json")
    return [
        write_records(folder / "a" / "test.json", records[:5]),
        write_records(folder / "b" / "test.json", records[5:11]),
    ]


@pytest.fixture(scope="module")
def apo_run(tmp_path_factory, eval_files) -> Path:
    """Six steps of the APO RM, evaluated and saved every two, the best checkpoint loaded at the end."""
    output_dir = tmp_path_factory.mktemp("apo_run")
    run_main(
        **ON_CPU,
        model_name_or_path=CHECKPOINT,
        task_type="apo",
        do_train=True,
        apo_loss_coeff=0.5,
        apo_sample_num=4,
        train_data_path=[E2E / "train.json", E2E / "apo.json"],
        eval_data_path=eval_files,
        add_sep_token=True,
        pooling_type="last",
        max_length=64,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        max_steps=6,
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        eval_at_start=True,
        rm_calibration=True,
        calibration_bins=[5, 10],
        save_calibration=True,
        metric_for_best_model="eval_b/test.json_accuracy",
        load_best_model_at_end=True,
        output_dir=output_dir,
    )
    return output_dir


def test_output_folder_holds_everything(apo_run):
    expected = """checkpoint-2 checkpoint-4 checkpoint-6 trainer_state.json train_results.json eval_results.json
        all_results.json final_eval_results.json training_curves.png config.json model.safetensors tokenizer.json
        tokenizer.model tokenizer_config.json README.md arguments.json manifest.json calibration_a_test.json
        calibration_a_test.png calibration_b_test.json calibration_b_test.png eval_rewards.json"""
    assert set(expected.split()) <= {path.name for path in apo_run.iterdir()}
    assert not list(apo_run.rglob("*.tmp"))
    for checkpoint in apo_run.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.model", "trainer_state.json", "optimizer.pt"} <= names


def test_rewards_of_an_evaluation_give_its_metrics(apo_run):
    """The accuracy and the number of pairs, from the rewards and scores of each record."""
    rewards, results = (read_json(apo_run / name) for name in ("eval_rewards.json", "final_eval_results.json"))
    assert list(rewards) == list(results)
    for name, items in rewards.items():
        responses = [list(zip(item["scores"], item["rewards"], strict=True)) for item in items]
        hits = [a > b for own in responses for better, a in own for worse, b in own if better > worse]
        assert len(hits) == results[name][f"eval_{name}_pairs"] > 0
        assert sum(hits) / len(hits) == pytest.approx(results[name][f"eval_{name}_accuracy"])


def test_metrics_have_the_names_of_the_reference_and_plain_ones(apo_run):
    results = read_json(apo_run / "final_eval_results.json")
    assert list(results) == ["a/test.json", "b/test.json"]
    names = ["Preference Acc", "Avg Score", "loss", "accuracy", "margin", "mean_reward", "pairs", "ties"]
    names += [f"calibration_{name}_bin{bins}" for name in ("ECE", "ACE", "MCE") for bins in (5, 10)]
    for eval_set, metrics in results.items():
        assert {f"eval_{eval_set}_{name}" for name in names} <= metrics.keys()
        assert metrics[f"eval_{eval_set}_accuracy"] == metrics[f"eval_{eval_set}_Preference Acc"]
    combined = read_json(apo_run / "eval_results.json")
    assert combined == {key: value for metrics in results.values() for key, value in metrics.items()}
    assert combined["eval_a/test.json_pairs"] == 5 and combined["eval_b/test.json_pairs"] == 6
    assert (
        combined.keys() | read_json(apo_run / "train_results.json").keys()
        == read_json(apo_run / "all_results.json").keys()
    )


def test_every_training_log_holds_both_terms_whose_sum_is_the_loss(apo_run):
    logs = [log for log in log_history(apo_run) if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5, 6]
    for log in logs:
        assert {"accuracy", "margin"} <= log.keys()
        assert log["ranking_term"] + log["apo_term"] == pytest.approx(log["loss"], abs=1e-6)
    assert any(log["apo_term"] > 0 for log in logs)


def test_both_sets_are_evaluated_before_and_during_training(apo_run):
    for eval_set in ("a", "b"):
        steps = [log["step"] for log in log_history(apo_run) if f"eval_{eval_set}/test.json_accuracy" in log]
        assert steps[:4] == [0, 2, 4, 6]


def test_best_checkpoint_is_loaded_at_the_end(apo_run):
    state = read_json(apo_run / "trainer_state.json")
    key = "eval_b/test.json_accuracy"
    accuracies = {log["step"]: log[key] for log in state["log_history"][:-2] if key in log and log["step"] > 0}
    assert state["best_metric"] == max(accuracies.values())
    best = Path(state["best_model_checkpoint"])
    assert accuracies[int(best.name.removeprefix("checkpoint-"))] == state["best_metric"]
    weights, final = (load_file(folder / "model.safetensors") for folder in (best, apo_run))
    assert all(torch.equal(weights[name], final[name]) for name in weights)
    assert read_json(apo_run / "final_eval_results.json")["b/test.json"][key] == state["best_metric"]


def test_arguments_and_manifest_record_the_run(apo_run, eval_files):
    arguments = read_json(apo_run / "arguments.json")
    assert (arguments["apo_loss_coeff"], arguments["max_length"], arguments["learning_rate"]) == (0.5, 64, 3e-3)
    assert set(read_json(apo_run / "manifest.json")["data"]) == {
        str(path) for path in (E2E / "train.json", E2E / "apo.json", *eval_files)
    }
    reward_settings = read_json(apo_run / "config.json")["reward_settings"]
    assert (reward_settings["pooling_type"], reward_settings["max_length"]) == ("last", 64)


def test_saved_model_evaluates_to_the_same_metrics_without_repeating_its_flags(apo_run, eval_files, tmp_path):
    """Pooling, length, separator and truncation come from config.json; another batch size changes nothing."""
    flags = {"task_type": "apo", "apo_loss_coeff": 0.5, "apo_sample_num": 4, "per_device_eval_batch_size": 3}
    run_main(**ON_CPU, **flags, model_name_or_path=apo_run, eval_data_path=eval_files, output_dir=tmp_path)
    again, before = (read_json(folder / "eval_results.json") for folder in (tmp_path, apo_run))
    names = [f"eval_{s}/test.json_{m}" for s in "ab" for m in ("accuracy", "margin", "mean_reward", "loss", "pairs")]
    assert {name: again[name] for name in names} == pytest.approx({name: before[name] for name in names}, abs=1e-5)
    assert not (tmp_path / "model.safetensors").exists()


def test_debug_mode_uses_64_records_of_each_file(tmp_path):
    path = write_records(tmp_path / "many.json", [pair(f"Question {i}?") for i in range(70)])
    flags = {"model_name_or_path": CHECKPOINT, "eval_data_path": path}
    run_main(**ON_CPU, **flags, debug_mode=True, output_dir=tmp_path / "debug")
    run_main(**ON_CPU, **flags, output_dir=tmp_path / "whole")
    pairs = [read_json(tmp_path / run / "eval_results.json")["eval_many.json_pairs"] for run in ("debug", "whole")]
    assert pairs == [64, 70]


def test_scores_are_written_once_and_in_order(tmp_path):
    """A second run replaces the file. Ids may hold colons, answers may repeat, and keys differ between records."""
    records = [
        {"query_id": "a:1", "query": "Why?", "sample_0": " So.", "sample_1": " So.", "my_gpt4": " No."},
        {"query_id": "b", "query": "What?", "ans_0": " This.", "sample_id": "b", "my_gpt4": ""},
    ]
    path = write_records(tmp_path / "many.samples.json", records)
    flags = {"model_name_or_path": CHECKPOINT, "task_type": "inference", "data_type": "reject_sample"}
    for _ in range(2):
        run_main(
            **ON_CPU,
            **flags,
            response_keys="my_gpt4",
            eval_data_path=path,
            data_suffix="rm",
            output_dir=tmp_path / "out",
        )
    [result] = (tmp_path / "out").glob("*_pred_rm_results.json")
    assert result.name == "many.samples_pred_rm_results.json"
    rows = read_json(result)
    assert [list(row) for row in rows] == [
        [name] for name in ("a:1:sample_0", "a:1:sample_1", "a:1:my_gpt4", "b:ans_0", "b:my_gpt4")
    ]
    assert rows[0]["a:1:sample_0"] == rows[1]["a:1:sample_1"] != rows[2]["a:1:my_gpt4"]


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        run_main("--help")
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    groups = (ModelArguments, DataArguments, RewardTrainingArguments)
    flags = [f"--{field.name}" for group in groups for field in fields(group) if field.init]
    assert all(flag in shown for flag in [*flags, "--evaluation_strategy"])


def test_files_whose_scores_would_go_to_one_file_are_refused(refused, tmp_path):
    files = [write_records(tmp_path / name, read_json(E2E / "samples.json")[:1]) for name in ("v.json", "v.jsonl")]
    error = refused(
        model_name_or_path=CHECKPOINT,
        task_type="inference",
        data_type="reject_sample",
        eval_data_path=files,
        output_dir=tmp_path / "out",
    )
    assert "v_pred_reward_model_results.json; score them separately" in error
