"""README.md: its commands parse, its files and functions exist, and every logged metric is explained."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import REPO_ROOT

from apo.cli import InputError
from arguments import build_arguments, parse_flags

README = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([REPO_ROOT / "README.md", REPO_ROOT / "data" / "README.md", REPO_ROOT / "configs" / "README.md"])
TOOLS = sorted(path.stem for path in (REPO_ROOT / "tools").glob("*.py"))
MODULES = ("arguments", "models", "reward_datasets", "trainer", "apo.records", "apo.figures")


def commands(script: str) -> list[list[str]]:
    """The words of every command in the README's code that runs `script`, from the script's name on."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL) + re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.replace("<", "").replace(">", ""), comments=True) for line in lines]
    return [line[line.index(script) :] for line in words if script in line]


TRAIN_COMMANDS = commands("train.py")


def test_readme_shows_training_evaluation_and_scoring():
    tasks = [command[command.index("--task_type") + 1] for command in TRAIN_COMMANDS]
    assert {"hh_split", "apo", "inference"} <= set(tasks)


@pytest.mark.parametrize("command", TRAIN_COMMANDS, ids=lambda command: command[-1])
def test_command_of_the_readme_parses(command, tmp_path, monkeypatch):
    """Without the DeepSpeed config, whose file has to exist: with it, parsing would start a process group."""
    argv = command[1:]
    argv[argv.index("--output_dir") + 1] = str(tmp_path)
    if "--deepspeed" in argv:
        place = argv.index("--deepspeed")
        assert (REPO_ROOT / argv[place + 1]).is_file()
        del argv[place : place + 2]
    monkeypatch.chdir(REPO_ROOT)
    model_args, data_args, args = build_arguments(parse_flags([*argv, "--use_cpu", "true"]))
    assert model_args.model_name_or_path and (data_args.train_data_path or data_args.eval_data_path)
    assert args.output_dir == str(tmp_path)


@pytest.mark.parametrize("command", TRAIN_COMMANDS, ids=lambda command: command[-1])
def test_sample_files_of_the_commands_exist(command):
    paths = [word for word in command if word.startswith("data/sample/")]
    assert all((REPO_ROOT / path).is_file() for path in paths)


def test_files_of_the_file_map_exist():
    section = README.split("\n## Files\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    paths = [re.findall(r"`([^`]+)`", name)[0] for name, _ in rows]
    assert len(paths) > 15 and [path for path in paths if not (REPO_ROOT / path).exists()] == []
    folders = [(name, cell) for name, (_, cell) in zip(paths, rows, strict=True) if name in ("scripts/", "configs/")]
    for folder, cell in folders:
        named = set(re.findall(r"`([\w.]+\.(?:sh|json))`", cell))
        assert named == {path.name for path in (REPO_ROOT / folder).iterdir() if path.suffix in (".sh", ".json")}


def test_every_tool_is_in_the_file_map():
    assert [name for name in TOOLS if f"`tools/{name}.py`" not in README] == []


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_shows_an_example_and_refuses_an_unknown_flag_in_one_line(name, monkeypatch, capsys):
    tool = importlib.import_module(f"tools.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        tool.parse_args()
    assert re.search(rf"^examples?:\n  .*tools/{name}\.py ", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    with pytest.raises(InputError, match=r"; see --help$"):
        tool.parse_args()
    assert tool.main.__wrapped__  # by exit_on_input_error


def test_scripts_named_anywhere_exist():
    names = set(re.findall(r"scripts/(\w+\.sh)", README))
    assert names and all((REPO_ROOT / "scripts" / name).is_file() for name in names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_links_inside_the_repository_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (Path(path).parent / link).exists()] == []


def test_functions_of_the_method_exist():
    names = re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", README)
    names = [(module, name) for module, name in names if name != "py"]
    assert ("trainer", "apo_loss") in names
    assert [n for n in names if not hasattr(importlib.import_module(n[0]), n[1])] == []


def test_every_logged_metric_is_explained():
    """The keys that a run on APO data with a language-modelling loss and calibration logs."""
    training = ("loss", "ranking_term", "apo_term", "lm_term", "accuracy", "apo_accuracy", "margin", "grad_norm")
    training += ("learning_rate", "epoch", "num_input_tokens_seen")
    evaluation = ("accuracy", "Preference Acc", "Avg Score", "mean_reward", "margin", "pairs", "ties", "loss")
    glossary = README.split("\n## Metrics\n")[1].split("\n## ")[0]
    in_training, in_evaluation = glossary.split("For each evaluation set")
    assert [key for key in training if f"`{key}`" not in in_training] == []
    assert [key for key in evaluation if f"`{key}`" not in in_evaluation] == []
    assert all(f"calibration_{kind}_bin<n>" in in_evaluation for kind in ("ECE", "ACE", "MCE"))
