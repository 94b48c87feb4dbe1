"""The LLM's command line: what it refuses and writes; the same result however the work is divided or interrupted."""

import math
import random
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    ON_CPU,
    REPO_ROOT,
    check_refusal,
    command_line,
    log_history,
    read_json,
    run_main,
    run_tool,
    run_train,
    training_losses,
    write_records,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import train_llm
from apo.cli import InputError
from apo.resumable import ResumableTrainer
from apo.sampling import load_llm, load_tokenizer

METHODS = ("rjs", "dpo", "rrhf")
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
WORDS = ["dry", "herbs", "wash", "wool", "slowly", "in", "small", "bunches", "away", "from", "the", "sun", "never"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """14 training records of 2 to 4 responses with some ties, 7 for evaluation, and golden ones."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text() -> str:
        return " " + " ".join(rng.choices(WORDS, k=rng.randint(2, 20)))

    def record(number: int) -> dict:
        prompt, count = f"\n\nHuman: How do I{text()}?\n\nAssistant:", rng.randint(2, 4)
        scores = [rng.choice([-1.5, 0.0, 0.5, 3.25]) for _ in range(count - 1)] + [rng.random()]
        return {"text": [f"{prompt}<sep>{text()}" for _ in scores], "scores": scores, "query_id": f"q{number}"}

    files = {"train": [record(i) for i in range(14)], "eval": [record(i) for i in range(7)]}
    files["golden"] = [{"query_id": str(i), "query": f"Why{text()}?", "golden": text()} for i in range(6)]
    return {name: write_records(folder / f"{name}.json", records) for name, records in files.items()}


@pytest.fixture(scope="module")
def llm(tmp_path_factory, base_llama) -> Path:
    """The tiny LLaMA with larger weights, so that log-probabilities differ."""
    folder = tmp_path_factory.mktemp("llm")
    model = AutoModelForCausalLM.from_pretrained(base_llama)
    for weight in model.parameters():
        weight.data *= 3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(data, llm, tmp_path) -> dict:
    """Seven steps of two records, in two epochs; eight with the last, which has fewer."""
    run = {"model_name_or_path": llm, "align_type": "dpo", "do_train": True, "train_data_path": data["train"]}
    run |= {"output_dir": tmp_path / "out", "save_strategy": "no", "learning_rate": 1e-3, "logging_steps": 1}
    return run | {"per_device_train_batch_size": 4, "num_train_epochs": 2, "cache_dir": tmp_path / "cache"}


def align(**flags) -> None:
    run_main(main=train_llm.main, **ON_CPU, **flags)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path, tolerance: float = 0.0) -> None:
    expected, weights = weights_of(theirs), weights_of(ours)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance, msg=name)


def without_times(values: dict) -> dict:
    times = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in values.items() if not name.endswith(times)}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs the command; it must end with status 2 and one line before any weight is loaded. Returns that line."""

    def fail(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    def run(**flags) -> str:
        monkeypatch.setattr("apo.reference.load_policy", fail)  # first, since it imports the other one
        monkeypatch.setattr("apo.policy_model.load_policy", fail)
        with pytest.raises(SystemExit) as exit_:
            align(**flags)
        return check_refusal(exit_.value.code, capsys.readouterr().err)

    return run


def test_wrong_input_is_refused(refused, flags, data, tmp_path, bpe_llama):
    assert "invalid choice: 'ppo'" in refused(**flags | {"align_type": "ppo"})
    assert "--beta 0.0: expected 1e-09 or more" in refused(**flags | {"beta": 0})
    assert "nothing to do" in refused(**flags | {"do_train": False})
    assert "compares a model with its reference, here itself" in refused(
        **flags | {"align_type": "dpo", "do_train": False, "eval_data_path": data}
    )
    assert "did you mean --reference_model" in refused(**flags, reference_modle="x")
    assert "--max_length 4096: the model has 512 positions" in refused(**flags | {"max_length": 4096})
    samples = write_records(tmp_path / "samples.json", [{"query_id": "a", "query": "Why?", "sample_0": " No."}])
    assert "samples.json: record 1" in refused(**flags | {"train_data_path": samples})
    assert "its vocabulary is another than that of" in refused(**flags, reference_model=bpe_llama)
    assert "found no chat template" in refused(**flags, prompt_template="chat")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ a whole run


def test_output_folder_is_a_causal_lm_with_results(flags, data):
    align(**flags, eval_data_path=data["eval"], eval_strategy="epoch", eval_at_start=True)
    folder = flags["output_dir"]
    expected = """trainer_state.json train_results.json eval_results.json all_results.json final_eval_results.json
        training_curves.png config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
        arguments.json manifest.json run_state.json training_args.bin"""
    assert {path.name for path in folder.iterdir()} == set(expected.split())
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM
    load_llm(str(folder), "auto", load_tokenizer(str(folder), "plain"))  # as tools/inference_llm.py does
    first, *_ = log_history(folder)
    assert first["eval_eval.json_loss"] == pytest.approx(math.log(2)) and first["eval_eval.json_margin"] == 0
    metrics = {"loss", "accuracy", "reward_weighted_accuracy", "margin", "response_length"}
    assert all(metrics <= log.keys() for log in log_history(folder) if "loss" in log)
    results = read_json(folder / "final_eval_results.json")["eval.json"]
    assert metrics | {"pairs"} <= {name.removeprefix("eval_eval.json_") for name in results}
    assert training_losses(folder)[-1] < math.log(2)
    explained = (REPO_ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = {key.removeprefix("eval_eval.json_") for log in [*log_history(folder), results] for key in log}
    assert sorted(key for key in logged - {"step"} if f"`{key}`" not in explained) == []


def test_sft_learns_golden_responses(flags, data):
    align(**flags | {"align_type": "sft", "train_data_path": data["golden"], "num_train_epochs": 20})
    losses = training_losses(flags["output_dir"])
    assert losses[-1] < losses[0] - 1


def test_run_file_gives_the_flags(flags, tmp_path):
    names = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    lines = {**flags, **names, "model_name_or_path": str(flags["model_name_or_path"])}
    lines |= {"train_data_path": [str(flags["train_data_path"])], "do_train": True}
    config = write_records(tmp_path / "run.yaml", lines)  # JSON is YAML
    align(config=config, max_steps=1)
    assert len(training_losses(tmp_path / "out")) == 1


def test_trained_model_is_evaluated_without_training(flags, data, tmp_path):
    align(**flags, eval_data_path=data["eval"], max_steps=2)
    again = {name: flags[name] for name in ("align_type", "cache_dir")} | {"output_dir": tmp_path / "again"}
    again |= {"model_name_or_path": flags["output_dir"], "reference_model": flags["model_name_or_path"]}
    align(**again, eval_data_path=data["eval"])
    first, second = (read_json(tmp_path / name / "final_eval_results.json") for name in ("out", "again"))
    assert without_times(second["eval.json"]) == pytest.approx(without_times(first["eval.json"]), rel=1e-6)


# ------------------------------------------------------------------------------------------------ one result


@pytest.mark.parametrize("align_type", METHODS)
def test_division_into_micro_batches_changes_nothing(flags, data, align_type, tmp_path):
    """The last step of an epoch has two records instead of four."""
    run = flags | {"align_type": align_type, "eval_data_path": data["eval"], "num_train_epochs": 1}
    align(**run, per_device_eval_batch_size=8)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1}
    ways = {"small": {}, "padded": {"batching": "padded"}, "checkpointing": {"gradient_checkpointing": True}}
    for name, more in ways.items():
        align(**run | small | more | {"output_dir": tmp_path / name})
        assert training_losses(tmp_path / name) == pytest.approx(training_losses(tmp_path / "out"), rel=1e-5)
        assert_same_weights(tmp_path / name, tmp_path / "out", 1e-4)
        metrics = [read_json(tmp_path / n / "final_eval_results.json")["eval.json"] for n in (name, "out")]
        assert without_times(metrics[0]) == pytest.approx(without_times(metrics[1]), abs=1e-4)


def test_reference_is_computed_once(flags, tmp_path, monkeypatch):
    """The second run, with another learning rate, loads no reference model, and its first loss is the same."""
    align(**flags, max_steps=1)
    monkeypatch.setattr("apo.reference.load_policy", None)
    align(**flags | {"output_dir": tmp_path / "second", "learning_rate": 1e-4}, max_steps=1)
    assert training_losses(tmp_path / "second") == training_losses(tmp_path / "out") == [pytest.approx(math.log(2))]
    with pytest.raises(TypeError):
        align(**flags | {"output_dir": tmp_path / "third", "reference_model": tmp_path / "out"}, max_steps=1)


def test_reference_is_another_model_if_it_is_given(flags, tmp_path):
    align(**flags, max_steps=4)
    more = {"output_dir": tmp_path / "second", "model_name_or_path": tmp_path / "out", "max_steps": 1}
    align(**flags | more | {"reference_model": flags["model_name_or_path"]})
    assert training_losses(tmp_path / "second")[0] != pytest.approx(math.log(2), abs=1e-4)


def test_first_loss_in_bfloat16_is_that_of_equal_models(flags, tmp_path):
    """Up to rounding, which differs between batches."""
    for name, precision in (("autocast", {"bf16": True}), ("weights", {"dtype": "bfloat16"})):
        align(**flags | {"output_dir": tmp_path / name, "max_steps": 1}, **precision)
        assert training_losses(tmp_path / name) == [pytest.approx(math.log(2), abs=3e-3)]


# ------------------------------------------------------------------------------------------------ LoRA


def test_end_of_a_run_with_lora_is_the_whole_model_and_a_checkpoint_the_adapter(flags, llm):
    """Only the adapted weights move, from the model the run starts from, which is the reference."""
    align(**flags | LORA | {"save_strategy": "steps", "save_steps": 4})
    folder = flags["output_dir"]
    assert training_losses(folder)[0] == pytest.approx(math.log(2), abs=1e-6) and training_losses(folder)[-1] < 0.6
    before, after = weights_of(llm), weights_of(folder)
    assert before.keys() == after.keys()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in after if name.endswith("_proj.weight")} and len(moved) == 2 * 7
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM
    assert not list(folder.glob("adapter*")) and "base_model_version" not in read_json(folder / "config.json")
    names = {path.name for path in (folder / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= names
    assert "model.safetensors" not in names


@pytest.mark.parametrize("align_type", [*METHODS, "sft"])
def test_batching_and_gradient_checkpointing_change_nothing_with_lora(flags, data, align_type, tmp_path):
    run = flags | LORA | {"align_type": align_type, "max_steps": 4}
    run |= {"train_data_path": data["golden"]} if align_type == "sft" else {}
    ways = {"out": {}, "padded": {"batching": "padded"}, "checkpointing": {"gradient_checkpointing": True}}
    for name, more in ways.items():
        align(**run | more | {"output_dir": tmp_path / name})
        assert training_losses(tmp_path / name) == pytest.approx(training_losses(tmp_path / "out"), rel=1e-5)
        assert_same_weights(tmp_path / name, tmp_path / "out", 1e-4)
    assert len(set(training_losses(tmp_path / "out"))) == 4


@pytest.mark.slow
def test_next_step_starts_from_the_merged_model(flags, data, tmp_path):
    """Align, sample, align again: the second reference is what the first step has written."""
    align(**flags | LORA | {"max_steps": 3})
    words = {"data_path": data["golden"], "output_dir": tmp_path, "task_type": "sampling", "max_new_tokens": 8}
    run_tool("inference_llm.py", *command_line(model_name_or_path=tmp_path / "out", **words))
    samples = read_json(tmp_path / "out_sampling_golden_results.json")
    scored = [
        {"text": [f"{row['query']}<sep>{row[f'sample_{i}']}" for i in range(4)], "scores": [3.0, 2.0, 1.0, 0.0]}
        for row in samples
    ]
    second = {"model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "second", "max_steps": 3}
    second |= {"train_data_path": write_records(tmp_path / "scored.json", scored)}
    align(**flags | LORA | second)
    assert training_losses(tmp_path / "second")[0] == pytest.approx(math.log(2), abs=1e-6)
    first, second = (weights_of(tmp_path / name) for name in ("out", "second"))
    assert sum(not torch.equal(weight, first[name]) for name, weight in second.items()) == 2 * 7


def test_embeddings_that_are_trained_whole_are_no_longer_tied(flags, llm, tmp_path):
    config = AutoConfig.from_pretrained(llm, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path / "tied")
    align(**flags | LORA | {"model_name_or_path": tmp_path / "tied", "lora_modules_to_save": "embed_tokens"})
    before, after = weights_of(tmp_path / "tied"), weights_of(tmp_path / "out")
    assert "lm_head.weight" not in before
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_adapter_that_bfloat16_would_round_away_is_a_warning(flags, caplog):
    align(**flags | LORA | {"learning_rate": 1e-5, "max_steps": 2}, dtype="bfloat16")
    assert "% of the adapted weights, the rest is lost in bfloat16; give --dtype float32" in caplog.text


def test_adapter_folder_is_no_llm(flags, tmp_path, capsys):
    align(**flags | LORA | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2})
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(InputError, match=r"adapter_config.json: found a LoRA adapter, expected a whole LLM"):
        load_llm(str(checkpoint), "auto", load_tokenizer(str(checkpoint), "plain"))
    with pytest.raises(SystemExit) as exit_:
        align(**flags | {"model_name_or_path": checkpoint, "output_dir": tmp_path / "second"})
    assert "found a LoRA adapter" in check_refusal(exit_.value.code, capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize(
    ("align_type", "step", "more"), [("dpo", 3, {}), ("rrhf", 4, {}), ("rjs", 8, {}), ("dpo", 3, LORA)]
)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    flags, data, tmp_path, monkeypatch, align_type, step, more
):
    """Weights, log and results, bit by bit: within an epoch, at its end, at the end of the run."""
    run = flags | {"align_type": align_type, "eval_data_path": data["eval"], "eval_strategy": "epoch"} | more
    run |= {"save_strategy": "epoch", "logging_steps": 3, "resume_from_checkpoint": True}
    run |= {"lora_dropout": 0.1} if more else {}
    align(**run | {"output_dir": tmp_path / "whole"})
    on_step_end = ResumableTrainer.on_step_end

    def stop(self, args, state, control, **kwargs):
        self._signum = signal.SIGTERM * (state.global_step == step)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(ResumableTrainer, "on_step_end", stop)
        align(**run)
    assert read_json(tmp_path / "out" / "run_state.json")["state"] == "interrupted"
    align(**run)
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    logs = [[without_times(log) for log in log_history(tmp_path / name)] for name in ("out", "whole")]
    assert logs[0] == logs[1]
    results = [read_json(tmp_path / name / "final_eval_results.json")["eval.json"] for name in ("out", "whole")]
    assert without_times(results[0]) == without_times(results[1])


def test_finished_run_does_nothing_and_other_flags_are_refused(flags, capsys, refused, tmp_path):
    align(**flags, max_steps=1)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    align(**flags, max_steps=1)
    assert "this run has finished before" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == weights
    assert "a finished run with beta 0.1, now 0.2" in refused(**flags, max_steps=1, beta=0.2)
    assert "lora None, now {'lora_r': 4" in refused(**flags, max_steps=1, use_peft=True, lora_r=4)
    over_its_base = flags | LORA | {"output_dir": flags["model_name_or_path"]}
    assert "found the base model of the adapter" in refused(**over_its_base)


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("align_type", "deepspeed", "more"),
    [
        *(("rjs", None, {}), ("dpo", "zero2.json", {}), ("rrhf", "zero2.json", {})),
        *(("dpo", "zero3_offload_hf_schedule.json", {}), ("dpo", "zero2.json", LORA)),
        ("rrhf", "zero3_offload_hf_schedule.json", LORA),
    ],
)
def test_two_processes_train_as_one_does(flags, data, tmp_path, align_type, deepspeed, more):
    """1 process x 4 accumulated records = 2 processes x 2; with ZeRO-2 and ZeRO-3 too."""
    run = flags | {"align_type": align_type, "eval_data_path": data["eval"], "max_steps": 3} | more
    run |= {"per_device_train_batch_size": 1, "warmup_steps": 1, "script": "train_llm.py"} | ON_CPU
    run_train(**run, gradient_accumulation_steps=4)
    more = {"num_processes": 2, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "two"}
    more |= {"cache_dir": tmp_path / "other_cache"}
    run_train(**run | more, deepspeed=deepspeed and REPO_ROOT / "configs" / deepspeed)
    assert training_losses(tmp_path / "two") == pytest.approx(training_losses(tmp_path / "out"), abs=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "out", 1e-5)
    metrics = [read_json(tmp_path / name / "final_eval_results.json")["eval.json"] for name in ("two", "out")]
    assert without_times(metrics[0]) == pytest.approx(without_times(metrics[1]), abs=1e-5)
