"""An adapter folder stands for a model: it is trained, resumed, evaluated, scored with and trained on as one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    CHECKPOINT,
    E2E,
    ON_CPU,
    check_refusal,
    copy_checkpoint,
    load_model,
    pair,
    read_json,
    rewards_of,
    run_main,
    training,
    training_losses,
    write_records,
)
from safetensors.torch import load_file
from transformers.utils import is_bitsandbytes_available

from apo.cli import InputError
from apo.resume import model_version
from arguments import build_arguments, parse_flags
from models import RewardModel

SEQUENCES = [[1, 7, 8, 9, 2], [1, 7, 8, 10, 11, 2], [1, 400, 2]]
NEW = {"lora_r": None, "lora_alpha": None, "lora_dropout": 0.0, "lora_target_modules": [], "lora_modules_to_save": []}
PROMPTS, RESPONSES = ["\n\nHuman: Why?\n\nAssistant:"] * 2, [" Because.", " No idea."]


def lora_run(tmp_path: Path, **flags) -> dict:
    run = training(tmp_path, use_peft=True, lora_target_modules="all-linear", learning_rate=1e-2, max_steps=4)
    run |= {"per_device_train_batch_size": 4, "max_length": 64, "logging_steps": 1, "add_sep_token": True}
    return run | {"lr_scheduler_type": "constant"} | flags


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A reward model that no other test changes."""
    return copy_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """The output folder of a run with LoRA and an evaluation."""
    folder = tmp_path_factory.mktemp("adapter")
    flags = {"model_name_or_path": base, "eval_data_path": E2E / "eval_b.json", "save_strategy": "steps"}
    run_main(**ON_CPU, **lora_run(folder, **flags, save_steps=2))
    return folder / "out"


@pytest.fixture
def error_of(capsys):
    """Runs the command, which must end with status 2 and one line; returns it."""

    def run(**flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_main(**ON_CPU, **flags)
        return check_refusal(exit_.value.code, capsys.readouterr().err)

    return run


def metrics_of(folder: Path) -> dict[str, float]:
    names = ("accuracy", "margin", "mean_reward", "loss", "pairs")
    return {name: value for name, value in read_json(folder / "eval_results.json").items() if name.endswith(names)}


# ------------------------------------------------------------------------------------------------ training


def test_head_and_adapted_weights_move_and_nothing_else(base, adapter):
    before, after = load_file(base / "model.safetensors"), RewardModel.from_pretrained(adapter).state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    layers = {name for name in after if name.endswith("_proj.weight")}
    assert len(layers) == 2 * 7 and moved == {*layers, "reward_head.weight"}
    assert read_json(adapter / "train_results.json")["weights_changed"] == 1  # of those that are trained


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_adapter_folder_holds_all_but_the_weights_of_its_base(base, adapter, place):
    names = {path.name for path in (adapter / place).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.model"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    config = read_json(adapter / place / "config.json")
    assert config["reward_settings"]["add_sep_token"] and config["pad_token_id"] == 3
    assert config["base_model_version"] == model_version(str(base), None)
    assert read_json(adapter / place / "adapter_config.json")["base_model_name_or_path"] == str(base)


def test_batching_and_gradient_checkpointing_change_no_loss(tmp_path):
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'}
    runs = [{}, {"batching": "padded"}, {"gradient_checkpointing": True}, reentrant]
    runs += [{"batching": "padded", "gradient_checkpointing": True}]
    losses = []
    for i, flags in enumerate(runs):
        run_main(**ON_CPU, **lora_run(tmp_path, **flags, output_dir=tmp_path / str(i)))
        losses.append(training_losses(tmp_path / str(i)))
    assert len(set(losses[0])) == 4
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_lora_dropout_pads_the_batches(caplog):
    """In a tree, a token that two responses share would be dropped for both."""
    command = ["--use_peft", "true", "--do_train", "true", "--train_data_path", "x", "--use_cpu", "true"]
    with caplog.at_level("INFO"):
        args = build_arguments(parse_flags([*command, "--model_name_or_path", "x", "--lora_dropout", "0.05"]))[2]
    assert args.batching == "padded" and "--batching padded: " in caplog.text


def test_whole_modules_are_trained_and_saved(tmp_path):
    run_main(**ON_CPU, **lora_run(tmp_path, lora_target_modules="q_proj", lora_modules_to_save="embed_tokens"))
    before, after = load_file(CHECKPOINT / "model.safetensors"), RewardModel.from_pretrained(tmp_path / "out")
    moved = {name for name, weight in after.state_dict().items() if not torch.equal(weight, before[name])}
    queries = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert moved == {*queries, "model.embed_tokens.weight", "reward_head.weight"}


def test_grown_embedding_can_be_trained_whole(bpe_llama, tmp_path):
    run_main(**ON_CPU, **lora_run(tmp_path, model_name_or_path=bpe_llama, lora_modules_to_save="embed_tokens"))
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    [table] = [weight for name, weight in weights.items() if "embed" in name]
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "out").model.embed_tokens.weight, table)


def test_bfloat16_base_has_a_float32_adapter(tmp_path):
    run_main(**ON_CPU, **lora_run(tmp_path, dtype="bfloat16"))
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {w.dtype for name, w in weights.items() if "lora_" in name} == {torch.float32}


# ------------------------------------------------------------------------------------------------ used as a model


def test_merged_model_gives_the_rewards_of_its_adapter(adapter, tmp_path):
    beside, tokenizer = load_model(adapter, lora=NEW)
    merged = RewardModel.from_pretrained(adapter)
    merged.save_pretrained(tmp_path)
    merged.tokenizer.save_pretrained(tmp_path)
    assert type(merged) is RewardModel and not (tmp_path / "adapter_config.json").exists()
    assert "base_model_version" not in read_json(tmp_path / "config.json")
    expected = rewards_of(beside.eval(), SEQUENCES, tokenizer.pad_token_id)
    for model in (merged, RewardModel.from_pretrained(tmp_path)):
        torch.testing.assert_close(rewards_of(model, SEQUENCES, 3), expected, rtol=0, atol=1e-5)
    plain = rewards_of(RewardModel.from_pretrained(CHECKPOINT), SEQUENCES, 3)
    assert (expected - plain).abs().min() > 1e-3


def test_evaluation_and_scoring_read_an_adapter_folder(adapter, tmp_path):
    run_main(**ON_CPU, model_name_or_path=adapter, eval_data_path=E2E / "eval_b.json", output_dir=tmp_path)
    assert len(metrics_of(tmp_path)) == 5
    assert metrics_of(tmp_path) == pytest.approx(metrics_of(adapter), abs=1e-5)
    record = {"query_id": "a", "query": PROMPTS[0], "sample_0": RESPONSES[0], "sample_1": RESPONSES[1]}
    data = write_records(tmp_path / "samples.json", [record])
    scoring = {"task_type": "inference", "data_type": "reject_sample", "eval_data_path": data}
    run_main(**ON_CPU, **scoring, model_name_or_path=adapter, output_dir=tmp_path)
    rows = read_json(tmp_path / "samples_pred_reward_model_results.json")
    rewards = RewardModel.from_pretrained(adapter).score(PROMPTS, RESPONSES)
    assert [reward for row in rows for reward in row.values()] == pytest.approx(rewards, abs=1e-5)


def test_scores_of_another_adapter_of_the_same_base_are_not_replaced(adapter, tmp_path, error_of):
    data = write_records(tmp_path / "samples.json", [{"query_id": "a", "query": PROMPTS[0], "sample_0": " x"}])
    scoring = {"task_type": "inference", "data_type": "reject_sample", "eval_data_path": data}
    run_main(**ON_CPU, **scoring, model_name_or_path=adapter, output_dir=tmp_path)
    error = error_of(**scoring, model_name_or_path=adapter / "checkpoint-2", output_dir=tmp_path)
    assert "found the rewards of another model" in error


def test_rewards_survive_a_grown_embedding_table(bpe_llama, tmp_path):
    """The pad and separator tokens are new; their rows are random at first, trained, and saved with the adapter."""
    data = write_records(tmp_path / "test.json", [pair(f"Human: {i}? Assistant:") for i in range(5)])
    flags = {"model_name_or_path": bpe_llama, "train_data_path": data, "eval_data_path": data, "seed": 7}
    run_main(**ON_CPU, **lora_run(tmp_path, **flags))
    run_main(**ON_CPU, model_name_or_path=tmp_path / "out", eval_data_path=data, output_dir=tmp_path / "again")
    assert metrics_of(tmp_path / "again") == pytest.approx(metrics_of(tmp_path / "out"), abs=1e-5)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    [rows] = [weight for name, weight in weights.items() if "lora" not in name and "reward_head" not in name]
    assert rows.shape == (2, 32)
    model = RewardModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.embed_tokens.weight[300:], rows)
    assert type(model.model.embed_tokens) is torch.nn.Embedding


# ------------------------------------------------------------------------------------------------ training on


def test_training_goes_on_with_the_same_adapter(base, adapter, tmp_path):
    flags = lora_run(tmp_path, model_name_or_path=adapter, lora_target_modules=None, max_steps=1, learning_rate=0)
    run_main(**ON_CPU, **flags)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 16
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    rewards = [RewardModel.from_pretrained(folder).score(PROMPTS, RESPONSES) for folder in (adapter, tmp_path / "out")]
    assert rewards[0] == rewards[1]


def test_without_lora_training_goes_on_with_the_whole_model(adapter, tmp_path):
    run_main(**ON_CPU, **lora_run(tmp_path, model_name_or_path=adapter, use_peft=False, lora_target_modules=None))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names and not any(name.startswith("adapter") for name in names)
    merged = RewardModel.from_pretrained(adapter).state_dict()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(weights["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------ refusals


def copy_pair(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    """An adapter folder and its base model, to be changed."""
    for source, name in ((base, "base"), (adapter, "adapter")):
        shutil.copytree(source, folder / name)
    config = read_json(folder / "adapter" / "adapter_config.json")
    write_records(
        folder / "adapter" / "adapter_config.json", config | {"base_model_name_or_path": str(folder / "base")}
    )
    return folder / "base", folder / "adapter"


def test_changed_or_missing_base_is_refused(base, adapter, tmp_path):
    base, adapter = copy_pair(base, adapter, tmp_path)
    RewardModel.from_pretrained(adapter)  # moved, but the same
    config = read_json(base / "config.json")
    write_records(base / "config.json", config | {"rms_norm_eps": 1e-3})
    with pytest.raises(InputError, match=r"its base model .* has changed: its version is "):
        RewardModel.from_pretrained(adapter)
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"adapter_config.json: base_model_name_or_path: .*no such folder"):
        RewardModel.from_pretrained(adapter)


def test_damaged_adapter_is_refused(base, adapter, tmp_path):
    base, adapter = copy_pair(base, adapter, tmp_path)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match=r"adapter_model.safetensors is damaged or was changed"):
        RewardModel.from_pretrained(adapter)
    (adapter / "run_state.json").unlink()
    for damage in (lambda: path.write_bytes(path.read_bytes()[:99]), path.unlink):
        damage()
        with pytest.raises(InputError, match=r"^[^\n]*the LoRA adapter does not fit"):
            RewardModel.from_pretrained(adapter)


def test_flag_of_lora_that_cannot_hold_is_one_line(adapter, tmp_path, error_of, caplog):
    run = lora_run(tmp_path)
    assert "--lora_modules_to_save nowhere: the model has no" in error_of(**run | {"lora_modules_to_save": "nowhere"})
    assert "the LoRA adapter does not fit (" in error_of(**run | {"lora_target_modules": "nowhere"})
    error = error_of(**run | {"lora_target_modules": None, "lora_r": 8, "model_name_or_path": adapter})
    assert f"--lora_r: the adapter in {adapter} keeps its own; leave the flag out" in error
    assert "--lora_r 0: expected 1 or more" in error_of(**run | {"lora_r": 0})
    error = error_of(**run | {"output_dir": tmp_path / "base", "model_name_or_path": tmp_path / "base"})
    assert "base: found the base model of the adapter, expected another folder" in error
    command = ["--model_name_or_path", "x", "--eval_data_path", "x", "--use_cpu", "true", "--lora_alpha", "3"]
    build_arguments(parse_flags(command))
    assert "--lora_alpha has no effect without --use_peft true" in caplog.text
    args = build_arguments(parse_flags([*command, "--use_peft", "true"]))[2]
    assert "--use_peft has no effect without --do_train true" in caplog.text and args.lora is None


@pytest.mark.skipif(is_bitsandbytes_available(), reason="the package is here")
def test_four_bits_without_the_package_are_one_line(tmp_path, error_of):
    assert "--load_in_4bit needs the package bitsandbytes" in error_of(**lora_run(tmp_path, load_in_4bit=True))
    folder = copy_checkpoint(tmp_path / "quantised")
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    write_records(folder / "config.json", json.loads((folder / "config.json").read_text()) | quantised)
    error = error_of(model_name_or_path=folder, eval_data_path=E2E / "eval_b.json", output_dir=tmp_path / "out")
    assert f"{folder}: the weights cannot be loaded (Using `bitsandbytes` 4-bit quantization requires" in error
