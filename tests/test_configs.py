"""configs/: every file parses and has the settings that its name promises; DeepSpeed trains with each of its files."""

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import CHECKPOINT, E2E, REPO_ROOT, read_json, run_train, training_losses
from safetensors.torch import load_file

from arguments import build_arguments, parse_flags

RUNS = sorted((REPO_ROOT / "configs" / "runs").glob("*.yaml"))
CONFIGS = sorted((REPO_ROOT / "configs").glob("*.json"))
BY_TRAINER = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")


def ids(path: Path) -> str:
    return path.stem


# ------------------------------------------------------------------------------------------------ runs


def read_run(name: str) -> dict:
    return yaml.safe_load((REPO_ROOT / "configs" / "runs" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RUNS, ids=ids)
def test_run_file_parses_and_is_documented(path, tmp_path, monkeypatch):
    """Without DeepSpeed, which needs a launcher or a GPU."""
    monkeypatch.chdir(REPO_ROOT)
    given = parse_flags(["--config", str(path)])
    assert given.deepspeed is None or Path(given.deepspeed).is_file()
    overrides = ["--deepspeed", "", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    _, data_args, args = build_arguments(parse_flags(["--config", str(path), *overrides]))
    assert args.do_train and data_args.train_data_path and data_args.eval_data_path
    assert f"`{path.stem}`" in (REPO_ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    if path.stem.startswith("sample_"):
        paths = [*data_args.train_data_path, *data_args.eval_data_path]
        assert [name for name in paths if name.startswith("data/") and not Path(name).is_file()] == []


@pytest.mark.parametrize("name", ["llama7b_rm_base", "llama7b_rm_apo"])
def test_llama_run_has_the_settings_of_the_reference(name):
    """The commands of docs/differences.md are the reference's; the output folder has another name here."""
    document = (REPO_ROOT / "docs" / "differences.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = map(shlex.split, re.findall(r"^torchrun .*", document, re.MULTILINE))
    words = next(words for words in commands if words[words.index("--task_type") + 1] == read_run(name)["task_type"])
    assert words[1] == "--nproc_per_node=8"  # what the accumulation of the file is for
    reference = vars(parse_flags(words[words.index("train.py") + 1 :]))
    ours = vars(parse_flags(["--config", str(REPO_ROOT / "configs" / "runs" / f"{name}.yaml")]))
    human_data = reference.pop("train_data_path")[:1]
    assert ours["train_data_path"][:1] == human_data
    different = {key for key in reference if reference[key] != ours[key]}
    assert different <= {"config", "output_dir", "rm_calibration"}


@pytest.mark.parametrize(
    ("variant", "setting"),
    [("diff", "apo_loss_type"), ("no_human", "rm_kl_coeff"), ("continued", "model_name_or_path")],
)
def test_variant_of_the_apo_run_differs_in_one_setting(variant, setting):
    apo, other = read_run("llama7b_rm_apo"), read_run(f"llama7b_rm_apo_{variant}")
    assert apo.keys() == other.keys()
    assert {key for key in apo if apo[key] != other[key]} == {setting, "data_suffix", "output_dir"}


def test_scripts_know_the_batch_size_of_the_run_files():
    """scripts/common.sh keeps it on any number of processes; a llama7b file is written for eight."""
    script = (REPO_ROOT / "scripts" / "common.sh").read_text(encoding="utf-8")
    sizes = {prefix: int(size) for prefix, size in re.findall(r"\*/(\w+_)\*\).*?BATCH_SIZE:=(\d+)", script, re.DOTALL)}
    for path in RUNS:
        run, prefix = read_run(path.stem), path.stem.split("_")[0] + "_"
        num_processes = 8 if prefix == "llama7b_" else 1
        pairs = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] * num_processes
        assert sizes[prefix] == pairs, path.name


# ------------------------------------------------------------------------------------------------ DeepSpeed


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_config_parses_and_is_documented(path):
    """DeepSpeed takes unknown keys of zero_optimization for an error; a misspelt key at the top it ignores."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = read_json(path)
    known = {"bf16", "optimizer", "scheduler", "zero_optimization", *BY_TRAINER}
    assert set(config) <= known
    settled = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    assert DeepSpeedZeroConfig(**settled).stage in (2, 3)
    assert f"`{path.name}`" in (REPO_ROOT / "configs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_batch_and_clipping_follow_the_command_line(path):
    config = read_json(path)
    assert all(config[key] == "auto" for key in BY_TRAINER)


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_zero3_config_saves_complete_weights(path):
    zero = read_json(path)["zero_optimization"]
    assert zero["stage"] == 2 or zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_default_config_is_the_one_of_the_reference():
    config = read_json(REPO_ROOT / "configs" / "default_offload_opt_param.json")
    zero = config["zero_optimization"]
    assert (config["optimizer"]["type"], config["scheduler"]["type"]) == ("AdamW", "WarmupDecayLR")
    assert set(config["optimizer"]["params"].values()) == set(config["scheduler"]["params"].values()) == {"auto"}
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["sub_group_size"] == zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 1e9


def test_hf_schedule_variant_differs_in_the_scheduler_only():
    default, variant = (
        read_json(REPO_ROOT / "configs" / name)
        for name in ("default_offload_opt_param.json", "zero3_offload_hf_schedule.json")
    )
    del default["scheduler"]
    assert variant == default


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_config_trains(path, tmp_path):
    """Two processes, three steps of two pairs: finite losses, and whole, moved weights in the saved model.

    One step would not do: DeepSpeed's schedule gives the first one a learning rate of 0.
    """
    run_train(
        num_processes=2,
        timeout=900,  # the first run on a machine builds DeepSpeed's CPU extensions
        task_type="hh_split",
        do_train=True,
        use_cpu=True,
        deepspeed=path,
        bf16=read_json(path)["bf16"]["enabled"] is True,
        model_name_or_path=CHECKPOINT,
        add_sep_token=True,
        pooling_type="last",
        max_length=64,
        train_data_path=E2E / "train.json",
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        output_dir=tmp_path,
    )
    losses = training_losses(tmp_path)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    saved, given = (load_file(folder / "model.safetensors") for folder in (tmp_path, CHECKPOINT))
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in given.items() if name != "lm_head.weight"
    }
    assert all((saved[name] != given[name].to(saved[name].dtype)).any() for name in saved)
