"""README.md and docs/: commands run or parse, files and functions exist, every logged metric is explained."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import CHECKPOINT, E2E, REPO_ROOT, read_json, run_main

from apo.cli import InputError
from arguments import build_arguments, parse_flags
from llm_arguments import parse_llm_flags

README = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *(REPO_ROOT / name for name in ("README.md", "configs/README.md", "data/README.md")),
    *sorted((REPO_ROOT / "docs").glob("*.md")),
]
TOOLS = sorted(path.stem for path in (REPO_ROOT / "tools").glob("*.py"))
MODULES = ("arguments", "llm_arguments", "models", "reward_datasets", "trainer", r"apo\.\w+")


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO_ROOT))


def section(document: str, heading: str) -> str:
    """The text under a second-level heading."""
    return document.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def bash_blocks(document: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", document, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The words of each command, without here-documents, comments and assignments in front."""
    block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    while any(line and re.match(r"[A-Z_]+=", line[0]) for line in lines):
        lines = [line[1:] if line and re.match(r"[A-Z_]+=", line[0]) else line for line in lines]
    return [line for line in lines if line]


COMMANDS = [
    pytest.param(command, id=f"{name_of(path)}: {' '.join(command)[:60]}")
    for path in DOCUMENTS
    for block in bash_blocks(path.read_text(encoding="utf-8"))
    for command in commands(block)
]


def import_tool(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, monkeypatch, tmp_path):
    """A command is a script, one of the programs, a tool, or one of the few shell commands named here."""
    monkeypatch.chdir(REPO_ROOT)
    own_files = [word for word in command if word.startswith(("configs/", "data/sample/", "scripts/", "tools/"))]
    assert [path for path in own_files if not Path(path).exists()] == []
    script = next((word for word in command if word.endswith((".py", ".sh"))), None)
    if script is None:
        assert command[0] in ("cat", "export", "mkdir", "source") or command == ["python", "-"]
    elif script.endswith(".sh"):
        assert command[0] == "bash"
        subprocess.run(["bash", "-n", script], check=True)
    elif script == "train.py":
        assert command[0] in ("python", "torchrun")
        flags = parse_flags(command[command.index(script) + 1 :])
        # With its DeepSpeed config, building the arguments would start a process group.
        flags.use_cpu, flags.deepspeed, flags.output_dir = True, None, str(tmp_path)
        build_arguments(flags)
    elif script == "train_llm.py":
        parse_llm_flags(command[command.index(script) + 1 :])
    else:
        assert command[0] == "python"
        monkeypatch.setattr(sys, "argv", command[1:])
        import_tool(script).parse_args()


def test_commands_hold_no_placeholders():
    """The shell would take `<model>` for a redirection."""
    blocks = [block for path in DOCUMENTS for block in bash_blocks(path.read_text(encoding="utf-8"))]
    assert blocks and [block for block in blocks if re.search(r"<\w", re.sub(r"'.*?'|<sep>", "", block))] == []


@pytest.fixture
def after_quickstart(tmp_path: Path) -> Path:
    """A working folder as the quickstart leaves it, as far as the commands for own data need it."""
    for name in ("apo", "configs", "data", "scripts", "tools", *(path.name for path in REPO_ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(REPO_ROOT / name)
    tool = ["tools/dev/make_tiny_llama.py", "--output_dir", "outputs/tiny_llama"]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    subprocess.run([sys.executable, *tool], cwd=tmp_path, env=environment, check=True, capture_output=True)
    return tmp_path


def run_in_shell(script: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "PATH": path}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_round_samples_trains_and_scores(after_quickstart):
    """The commands as they are in the README, in one shell."""
    run_in_shell(bash_blocks(section(README, "Reproduce the paper"))[-1], after_quickstart)
    outputs = after_quickstart / "outputs"
    [samples] = (outputs / "samples").glob("*_results.json")
    [rewards] = (outputs / "scores").glob("*_pred_rm_apo_results.json")
    assert len(read_json(rewards)) == 4 * len(read_json(samples)) == 4 * 440
    assert (outputs / "round" / "rm_apo" / "model.safetensors").is_file()


@pytest.mark.slow
def test_own_data_are_trained_scored_and_selected(after_quickstart):
    """The commands as they are in the README, in one shell."""
    run_in_shell("".join(bash_blocks(section(README, "Your own data"))), after_quickstart)
    outputs = after_quickstart / "outputs" / "mine"
    assert (outputs / "rm" / "model.safetensors").is_file()
    samples = [json.loads(line) for line in (outputs / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    best = read_json(outputs / "best.json")
    assert [record["query_id"] for record in best] == [record["query_id"] for record in samples]
    assert all(record["target"] == record[max(record["scores"], key=record["scores"].get)] for record in best)


# ------------------------------------------------------------------------------------------------ tools


@pytest.mark.parametrize("name", TOOLS)
def test_tool_shows_an_example_and_refuses_an_unknown_flag_in_one_line(name, monkeypatch, capsys):
    tool = importlib.import_module(f"tools.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        tool.parse_args()
    assert re.search(rf"^ +.*tools/{name}\.py ", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    with pytest.raises(InputError, match=r"; see --help$"):
        tool.parse_args()
    assert tool.main.__wrapped__  # by exit_on_input_error


# ------------------------------------------------------------------------------------------------ files and names


def tree_paths() -> list[str]:
    """Paths of the file tree in docs/files.md; two spaces are one level, files of `dev/` are listed on its line."""
    tree = re.search(r"```\n(.*?)```", (REPO_ROOT / "docs" / "files.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    paths, folder = [], ""
    for line in tree.splitlines():
        name, *text = line.split(maxsplit=1)
        folder = folder if line.startswith(" ") else ""
        paths.append(folder + name)
        if not line.startswith(" ") and name.endswith("/"):
            folder = name
        if name == "dev/":
            paths += [folder + name + file for file in re.findall(r"\w+\.py", text[0])]
    return paths


def test_file_tree_is_that_of_the_repository():
    listed = set(tree_paths())
    assert sorted(path for path in listed if not (REPO_ROOT / path).exists()) == []
    folders = [REPO_ROOT / folder for folder in ("", "apo", "tools", "tools/dev")]
    code = {name_of(path) for folder in folders for path in folder.glob("*.py")}
    assert sorted(code - listed - {"apo/__init__.py"}) == []


def test_promises_name_tests_that_exist():
    text = (REPO_ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:apo/|tools/)?test_\w+\.py)(?:::(test_\w+))?`", text)
    missing = [
        (path, test)
        for path, test in named
        if f"def {test}" not in (REPO_ROOT / "tests" / path).read_text(encoding="utf-8")
    ]
    assert len(named) > 30 and missing == []


def test_run_files_are_those_of_the_documents():
    """README.md and configs/README.md name every file of configs/runs/, and no other."""
    files = {path.stem for path in (REPO_ROOT / "configs" / "runs").glob("*.yaml")}
    configs = (REPO_ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for document in (README, configs):
        assert set(re.findall(r"`((?:sample|smollm2|llama7b)_rm_\w+)`", document)) == files


def test_deepspeed_files_are_those_of_configs_readme():
    configs = (REPO_ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in (REPO_ROOT / "configs").glob("*.json")}
    assert set(re.findall(r"`(\w+\.json)`", configs)) == files


def test_scripts_named_anywhere_exist():
    names = {name for path in DOCUMENTS for name in re.findall(r"\b(\w+\.sh)\b", path.read_text(encoding="utf-8"))}
    assert sorted(name for name in names if not (REPO_ROOT / "scripts" / name).is_file()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_functions_named_in_the_readme_exist():
    names = {name for name in re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", README) if name[1] != "py"}
    assert ("trainer", "apo_loss") in names
    assert sorted(name for name in names if not hasattr(importlib.import_module(name[0]), name[1])) == []


def test_readme_is_short():
    assert len(README.split()) <= 1200
    assert len(README.splitlines()) <= 200


# ------------------------------------------------------------------------------------------------ metrics


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Keys that a run on APO data with LM loss and calibration logs: (in training, for an evaluation file)."""
    output_dir = tmp_path_factory.mktemp("metrics")
    run_main(
        task_type="apo",
        do_train=True,
        use_cpu=True,
        model_name_or_path=CHECKPOINT,
        max_length=64,
        train_data_path=[E2E / "train.json", E2E / "apo.json"],
        eval_data_path=E2E / "eval_a.json",
        apo_loss_coeff=0.1,
        lm_loss_coeff=0.1,
        rm_calibration=True,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        output_dir=output_dir,
    )
    history = read_json(output_dir / "trainer_state.json")["log_history"]
    evaluation = read_json(output_dir / "final_eval_results.json")["eval_a.json"]
    training = {key for entry in history for key in entry} | set(read_json(output_dir / "train_results.json"))
    return training - {"step"}, {key.removeprefix("eval_eval_a.json_") for key in evaluation}


def test_every_logged_metric_is_explained(logged):
    glossary = (REPO_ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    training, evaluation = logged
    assert "apo_accuracy" in training and "lm_term" in training
    in_training, in_evaluation = (section(glossary, name) for name in ("Training log", "Evaluation"))
    assert sorted(key for key in training if f"`{key}`" not in in_training) == []
    explained = {re.sub(r"_bin\d+$", "_bin<n>", key) for key in evaluation}
    assert any(key.startswith("calibration_ECE") for key in explained)
    assert sorted(key for key in explained if f"`{key}`" not in in_evaluation) == []
