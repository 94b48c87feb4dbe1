"""Several processes and DeepSpeed, on the CPU: the same losses, weights, metrics and rewards as one process.

The first run on a machine builds DeepSpeed's CPU extensions, which takes minutes; later ones take half a minute each.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    CHECKPOINT,
    E2E,
    REPO_ROOT,
    command_line,
    free_port,
    pair,
    read_json,
    run_train,
    training_losses,
    wait_until,
    write_records,
)
from safetensors.torch import load_file

from apo.run_state import find_fault, record_checkpoint

pytestmark = pytest.mark.slow

ZERO3_OFFLOAD = REPO_ROOT / "configs" / "default_offload_opt_param.json"
HH_DATA_DIR = Path(os.environ.get("HH_DATA_DIR", REPO_ROOT / "data" / "hh-split"))
TIMINGS = ("runtime", "per_second", "preparation_time", "epoch", "num_input_tokens_seen")
APO_RUN = {
    "model_name_or_path": CHECKPOINT,
    "task_type": "apo",
    "apo_loss_coeff": 0.1,
    "apo_sample_num": 4,
    "do_train": True,
    "train_data_path": [E2E / "train.json", E2E / "apo.json"],
    "eval_data_path": [E2E / "eval_a.json", E2E / "eval_b.json"],
    "per_device_train_batch_size": 1,
    "add_sep_token": True,
    "pooling_type": "last",
    "max_length": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "max_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def zero3_config(tmp_path_factory) -> Path:
    """The ZeRO-3 offload config without its scheduler, whose schedule is DeepSpeed's own."""
    config = read_json(ZERO3_OFFLOAD)
    config.pop("scheduler", None)
    return write_records(tmp_path_factory.mktemp("configs") / "zero3.json", config)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """A run of one process with 8 items a step, 1 x 8."""
    output_dir = tmp_path_factory.mktemp("one")
    run_train(**APO_RUN, gradient_accumulation_steps=8, output_dir=output_dir)
    return output_dir


def metrics_of(output_dir: Path) -> dict[str, float]:
    return {k: v for k, v in read_json(output_dir / "eval_results.json").items() if not k.endswith(TIMINGS)}


def assert_same_run(one: Path, other: Path, weights_name: str = "model.safetensors") -> None:
    assert training_losses(other) == pytest.approx(training_losses(one), abs=1e-5)
    expected, weights = (load_file(folder / weights_name) for folder in (one, other))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=name)
    assert metrics_of(other) == pytest.approx(metrics_of(one), abs=1e-4)


def test_two_ddp_processes_train_as_one_does(one_process, tmp_path):
    """1 process x 8 accumulated items = 2 processes x 4."""
    run_train(**APO_RUN, num_processes=2, gradient_accumulation_steps=4, output_dir=tmp_path)
    assert len(training_losses(tmp_path)) == 4
    assert_same_run(one_process, tmp_path)


def test_two_zero3_processes_train_as_one_does(one_process, zero3_config, tmp_path):
    """1 process x 8 accumulated items = 2 processes x 4, every weight sharded and offloaded."""
    run_train(**APO_RUN, num_processes=2, gradient_accumulation_steps=4, deepspeed=zero3_config, output_dir=tmp_path)
    assert_same_run(one_process, tmp_path)


def test_python_with_deepspeed_is_a_run_of_one_process(one_process, zero3_config, tmp_path):
    """Neither torchrun nor the deepspeed launcher; a reward head from scratch is the subject of another test."""
    run_train(**APO_RUN, gradient_accumulation_steps=8, deepspeed=zero3_config, output_dir=tmp_path)
    assert read_json(tmp_path / "manifest.json")["num_processes"] == 1
    assert_same_run(one_process, tmp_path)


def test_zero3_grows_the_embedding_and_initialises_the_head_as_one_process_does(bpe_llama, zero3_config, tmp_path):
    """From a base model whose tokenizer gets two new tokens, with the LM loss, so with an LM head too."""
    run = APO_RUN | {"model_name_or_path": bpe_llama, "max_steps": 2, "lm_loss_coeff": 0.1, "eval_data_path": None}
    run_train(**run, gradient_accumulation_steps=8, output_dir=tmp_path / "one")
    more = {"num_processes": 2, "gradient_accumulation_steps": 4, "deepspeed": zero3_config}
    run_train(**run, **more, output_dir=tmp_path / "two")
    assert training_losses(tmp_path / "two") == pytest.approx(training_losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert two["model.embed_tokens.weight"].shape == two["lm_head.weight"].shape == (302, 32)
    assert one.keys() == two.keys()
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-5, msg=name)


def test_zero3_resumes_where_it_was(one_process, zero3_config, tmp_path):
    """Four steps in one go = two steps, a checkpoint, and two more steps from it."""
    more = {"num_processes": 2, "gradient_accumulation_steps": 4, "deepspeed": zero3_config}
    run = APO_RUN | more | {"save_strategy": "steps", "save_steps": 2, "output_dir": tmp_path}
    run_train(**run)
    whole = load_file(tmp_path / "model.safetensors")
    for name in ("model.safetensors", "checkpoint-4/trainer_state.json"):
        (tmp_path / name).unlink()
    run_train(**run | {"resume_from_checkpoint": tmp_path / "checkpoint-2"})
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6, msg=name)
    assert training_losses(tmp_path) == pytest.approx(training_losses(one_process), abs=1e-5)


def test_lora_under_deepspeed_trains_and_scores_as_one_process_does(zero3_config, tmp_path):
    """ZeRO-2, and ZeRO-3, whose sharded weights cannot be merged: an adapter is evaluated beside them."""
    run = APO_RUN | {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
    run_train(**run, gradient_accumulation_steps=8, output_dir=tmp_path / "one")
    two = {"num_processes": 2, "gradient_accumulation_steps": 4}
    for name, config in (("zero2", REPO_ROOT / "configs" / "zero2.json"), ("zero3", zero3_config)):
        run_train(**run, **two, deepspeed=config, output_dir=tmp_path / name)
        assert_same_run(tmp_path / "one", tmp_path / name, "adapter_model.safetensors")
    evaluation = {"model_name_or_path": tmp_path / "one", "eval_data_path": APO_RUN["eval_data_path"]}
    evaluation |= {"use_cpu": True, "report_to": "none", "task_type": "apo", "apo_loss_coeff": 0.1}
    evaluation |= {"apo_sample_num": 4, "deepspeed": zero3_config, "num_processes": 2}
    run_train(**evaluation, output_dir=tmp_path / "evaluated")
    assert metrics_of(tmp_path / "evaluated") == pytest.approx(metrics_of(tmp_path / "one"), abs=1e-4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_processes_save_and_end_when_their_launcher_is_stopped(tmp_path, signum):
    """Both after the same step; SIGKILL leaves torchrun no time to tell them."""
    run = APO_RUN | {"use_cpu": True, "max_steps": 1000, "output_dir": tmp_path / "out"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    with open(tmp_path / "log", "wb") as log:
        command = [*launcher, str(REPO_ROOT / "train.py"), *command_line(**run)]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPO_ROOT)
    wait_until(lambda: "'loss'" in (tmp_path / "log").read_text())
    process.send_signal(signum)
    process.wait()
    wait_until(lambda: read_json(tmp_path / "out" / "run_state.json")["state"] != "running")
    state = read_json(tmp_path / "out" / "run_state.json")
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert state["state"] == "interrupted" and str(checkpoint) in state["error"]
    assert find_fault(checkpoint) == ""
    assert {"progress_0.json", "progress_1.json"} <= {path.name for path in checkpoint.iterdir()}


def test_resuming_under_deepspeed_runs_no_code_of_the_checkpoint(tmp_path):
    """Its files are unpickled; one with a function to call is refused, even if all hashes fit."""
    run = APO_RUN | {"use_cpu": True, "deepspeed": REPO_ROOT / "configs" / "zero2.json", "output_dir": tmp_path}
    run |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run_train(**run)
    [states] = (tmp_path / "checkpoint-2" / "global_step2").glob("*optim_states.pt")
    torch.save({"optimizer_state_dict": Touch(tmp_path / "CODE_RAN")}, states)
    record_checkpoint(tmp_path / "checkpoint-2", read_json(tmp_path / "run_state.json")["depends_on"])
    (tmp_path / "run_state.json").unlink()
    done = run_train(**run, resume_from_checkpoint=True, exit_status=2)
    assert "checkpoint-2: cannot be resumed from" in done.stderr
    assert not (tmp_path / "CODE_RAN").exists()


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory) -> list[Path]:
    """Evaluation files whose numbers of records, 7 and 27, divide by neither the batch nor the processes; 2 to 4
    responses, ties between scores, and items of both types."""
    folder = tmp_path_factory.mktemp("odd")
    items = [pair(f"Question {i}?", " x" * i, " yes", type="apo" if i % 3 else "human") for i in range(5)]
    texts = [f"What is it?<sep> number {i}" for i in range(4)]
    items += [{"text": texts, "scores": [0.0, 2.0, 1.0, 1.0]}, {"text": texts[:3], "scores": [1, 1, 0]}]
    return [write_records(folder / "odd.json", items), E2E / "eval_b.json"]


def test_metrics_do_not_depend_on_the_number_of_processes(odd_files, tmp_path):
    """Loss and calibration included; with a mean of batch means, or with the repeated last items, they would."""
    run = APO_RUN | {"do_train": False, "train_data_path": None, "eval_data_path": odd_files, "lm_loss_coeff": 0.2}
    run |= {"rm_calibration": True, "calibration_bins": [5, 10], "per_device_eval_batch_size": 2}
    run_train(**run, output_dir=tmp_path / "one")
    run_train(**run, num_processes=4, output_dir=tmp_path / "four")
    one, four = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "four")
    assert one["eval_odd.json_pairs"] == 5 + 5 + 2
    assert one["eval_eval_b.json_pairs"] == 27
    assert one.keys() == four.keys() and "eval_odd.json_calibration_ECE_bin5" in one
    assert four == pytest.approx(one, abs=1e-6)


def test_two_processes_score_every_record_once_and_in_order(zero3_config, tmp_path):
    """1, 3 and 7 records, so that a process has nothing to do or less than the other; with ZeRO-3 too."""
    samples, numbers = read_json(E2E / "samples.json"), (1, 3, 7)
    files = [write_records(tmp_path / f"samples_{n}.json", samples[:n]) for n in numbers]
    run = {"model_name_or_path": CHECKPOINT, "task_type": "inference", "data_type": "reject_sample", "use_cpu": True}
    run |= {"eval_data_path": files, "pooling_type": "last", "add_sep_token": True, "per_device_eval_batch_size": 2}
    run_train(**run, output_dir=tmp_path / "one")
    run_train(**run, num_processes=2, output_dir=tmp_path / "two")
    run_train(**run, num_processes=2, deepspeed=zero3_config, output_dir=tmp_path / "zero3")
    for n in numbers:
        name = f"samples_{n}_pred_reward_model_results.json"
        one, two, zero3 = (read_json(tmp_path / run / name) for run in ("one", "two", "zero3"))
        assert [list(row) for row in one] == [[f"q{i}:sample_{j}"] for i in range(n) for j in range(4)]
        assert two == one
        assert [list(row) for row in zero3] == [list(row) for row in one]
        rewards = [[value for row in rows for value in row.values()] for rows in (one, zero3)]
        assert rewards[1] == pytest.approx(rewards[0], abs=1e-5)


@pytest.mark.skipif(not HH_DATA_DIR.is_dir(), reason="needs the HH split; set HH_DATA_DIR")
def test_reference_command_trains_the_apo_rm_that_reloads_to_the_same_rewards(base_llama, tmp_path):
    """The reference's command line on HH pairs, word for word but for paths, sizes and `--use_cpu`.

    An evaluation file with a single pair reports the mean m and the margin d of its two rewards, which are therefore
    m + d/2 and m - d/2: so the rewards of the trained model, in its process, are known one by one.
    """
    train = read_json(HH_DATA_DIR / "rm_data" / "hh_split_rm.train.json")[:24]
    golden = {g["query_id"]: g for g in read_json(HH_DATA_DIR / "rm_data" / "hh_split_rm.golden.json")}
    samples = read_json(HH_DATA_DIR / "rm_data" / "hh_split_rm_smollm2_v0.sample.json")
    apo = [apo_pair(golden[s["query_id"]], s) for s in samples[:8]]
    test = read_json(HH_DATA_DIR / "eval_data" / "hh_cleaned_origin.test.json")[:8]
    valid = read_json(HH_DATA_DIR / "eval_data" / "hh_split_llm.valid.json")[:6]
    singles = [write_records(tmp_path / f"single_{i}.json", [item]) for i, item in enumerate(test[:3])]
    A, A2 = write_records(tmp_path / "A.json", train), write_records(tmp_path / "A2.json", apo)
    B, C = write_records(tmp_path / "B.json", test), write_records(tmp_path / "C.json", valid)
    output_dir = tmp_path / "O"
    command = f"""--task_type apo --apo_loss_coeff 0.1 --apo_sample_num 4 --do_train True --eval_at_start False
        --model_type reward --model_name_or_path {base_llama} --data_type comparison_pair --train_data_path {A} {A2}
        --eval_data_path {B} {C} {" ".join(map(str, singles))} --data_suffix rm_apo --add_sep_token True
        --remove_unused_columns false --output_dir {output_dir} --num_train_epochs 1 --per_device_train_batch_size 1
        --per_device_eval_batch_size 1 --gradient_accumulation_steps 8 --evaluation_strategy steps --padding_side right
        --truncation_side left --pooling_type last --max_length 512 --save_strategy steps --save_total_limit 10
        --learning_rate 1e-3 --warmup_steps 1 --logging_steps 1 --eval_steps 2 --weight_decay 0.
        --deepspeed {ZERO3_OFFLOAD} --tf32 false --fp16 false --use_cpu true"""
    run_train(*command.split(), num_processes=2)
    assert len(training_losses(output_dir)) == 2
    logged = {key for log in read_json(output_dir / "trainer_state.json")["log_history"] for key in log}
    assert {"eval_B.json_Preference Acc", "eval_C.json_Preference Acc", "apo_term", "ranking_term"} <= logged
    trained = metrics_of(output_dir)

    reload = {"model_name_or_path": output_dir, "use_cpu": True, "per_device_eval_batch_size": 1}
    run_train(
        **reload, eval_data_path=[B, C, *singles], output_dir=tmp_path / "again", task_type="apo", apo_loss_coeff=0.1
    )
    assert metrics_of(tmp_path / "again").keys() == trained.keys()
    again = metrics_of(tmp_path / "again")
    for name in ("B", "C"):
        for metric in ("accuracy", "margin", "mean_reward", "pairs", "loss"):
            key = f"eval_{name}.json_{metric}"
            assert again[key] == pytest.approx(trained[key], abs=1e-5), key

    run_train(**reload, eval_data_path=singles, output_dir=tmp_path / "scores", task_type="inference")
    for i in range(len(singles)):
        mean, margin = (trained[f"eval_single_{i}.json_{metric}"] for metric in ("mean_reward", "margin"))
        scores = read_json(tmp_path / "scores" / f"single_{i}_pred_reward_model_results.json")
        rewards = [value for row in scores for value in row.values()]
        assert rewards == pytest.approx([mean + margin / 2, mean - margin / 2], abs=1e-5)
        assert abs(margin) > 1e-4


def apo_pair(golden: dict, sample: dict) -> dict:
    """A golden response over a sampled one, in the form of tools/apo_data_converter.py."""
    query = sample["query"]
    text = [f"{query}<sep>{golden['golden']}", f"{query}<sep>{sample['sample_0']}"]
    return {"text": text, "scores": [1.0, 0.0], "query_id": sample["query_id"], "type": "apo"}


def test_torchrun_on_the_cpu_without_use_cpu_stops_with_an_explanation(tmp_path):
    """Each of the two processes would train alone and both would write the same folder."""
    run = APO_RUN | {"use_cpu": None, "output_dir": tmp_path / "out"}
    done = run_train(**run, num_processes=2, exit_status=1, env={"CUDA_VISIBLE_DEVICES": ""})
    # The first process that ends makes torchrun stop the other one, which may not have come to its own line.
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "error of rank 1:"))]
    assert errors and all("2 processes" in error and "--use_cpu true" in error for error in errors)
    assert not (tmp_path / "out").exists()
