"""play.py: the game as a user plays it, with real tools and tiny models; refusals; kills at several moments."""

import contextlib
import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPO_ROOT, check_refusal, free_port, read_json, training_losses, wait_until
from model_server import ModelServer
from tiny_game import SECTIONS, TRAIN_RM, play, write_game

from apo.cli import sha256_of_file
from apo.generation import derive_seed
from apo.processes import served_models
from apo.stages import DONE

GAMES = sorted((REPO_ROOT / "configs").glob("game_*.yaml"))
FIRST = "1/train_rm"  # the last stage of short games
# What a game is about. The others have times, or paths; their figures are in the report.
RESULTS = ("model.safetensors", "*_results.json", "*_text_scores.json", "eval_rewards.json", "best*.json")
NOT_COMPARED = ("best_report.json", *(f"{name}_results.json" for name in ("train", "eval", "all", "final_eval")))


def outcome(game: Path) -> dict[str, object]:
    """The sha256 of models, samples, pairs, rewards and selections; losses; figures of the report without times."""
    paths = {path for pattern in RESULTS for path in game.glob(f"round_*/*/{pattern}")}
    found = {str(path.relative_to(game)): sha256_of_file(path) for path in paths if path.name not in NOT_COMPARED}
    models = [name for name in found if name.endswith("/model.safetensors")]
    found |= {f"losses of {name}": training_losses((game / name).parent) for name in models}
    report = read_json(game / "report" / "report.json")
    return found | {name: value for name, value in report.items() if name not in ("game", "players", "stages")}


def refused(config: Path, *words: object) -> str:
    return check_refusal(2, play(config, *words, exit_status=2).stderr)


@pytest.fixture(scope="session")
def short_game(base_llama, tmp_path_factory) -> Path:
    """The file of a game that was played up to the first RM."""
    config = write_game(tmp_path_factory.mktemp("short_game"), base_llama)
    play(config, "--until", FIRST)
    return config


@pytest.fixture(scope="session")
def one_round(base_llama, tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """The file of a game of two rounds with all stages, of which one was played, and its outcome then."""
    folder = tmp_path_factory.mktemp("one_round")
    sft = {**SECTIONS["align"], "per_round": None, "train_data_path": [str(folder / "data" / "rm_golden.json")]}
    changes = {"sft": sft, "testing_rm": TRAIN_RM, "keep_models": "last", "judge": True}
    changes["sample_llm"] = SECTIONS["sample_llm"] | {"per_device_eval_batch_size": 1}  # it can be killed between two
    config = write_game(folder, base_llama, **changes)
    play(config, "--rounds", 1)
    return config, outcome(folder / "game")


# ------------------------------------------------------------------------------------------------ the game


def test_driver_imports_no_torch(tmp_path):
    """Not even to read a game, plan it and print it."""
    config = write_game(tmp_path, "llm")
    code = """if True:
        import runpy, sys
        sys.argv = ["play.py", "--config", sys.argv[1], "--dry_run"]
        runpy.run_path("play.py", run_name="__main__")
        print("found", {"torch", "transformers", "datasets"} & set(sys.modules))
        """
    words = [sys.executable, "-c", code, str(config)]
    done = subprocess.run(words, cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "found set()"


@pytest.mark.slow
def test_game_is_played_to_its_end(one_round):
    """One round, and one more, whose models are kept as long as a stage reads them; then nothing is left to do."""
    config, _ = one_round
    done = play(config)
    assert "33 stages, 19 of them done, 14 to run" in done.stdout and "33 of 33 stages are done" in done.stdout
    game = config.parent / "game"
    kept = sorted(str(path.parent.relative_to(game)) for path in game.glob("round_*/*/model.safetensors"))
    assert kept == ["round_0/sft", "round_0/testing_rm", "round_2/align", "round_2/train_rm"]
    assert "1/align: weights and checkpoints deleted (keep_models: last)" in done.stdout
    record = read_json(game / "round_2" / "align" / DONE)
    assert record["parents"] == ["1/align", "2/select"] and "--learning_rate 0.0005" in record["command"]
    report = read_json(game / "report" / "report.json")
    assert report["rounds_done"] == 2 and [row["round"] for row in report["gains_in_sd"]] == [1, 2]
    assert all(row["testing_reward"] and row["judge"] and row["broken_off"] is not None for row in report["llm"])
    assert all(row["accuracy"]["interval_95"] for rm in report["rm"] for row in rm["evaluations"])
    assert len(report["examples"]["prompts"]) == 3
    said = f"{game / 'report' / 'index.html'}\n" + "".join(f"{sentence}\n" for sentence in report["verdict"])
    assert done.stdout.endswith(said) and play(config, "--report").stdout == said
    files = {path: path.stat().st_mtime_ns for path in game.glob("round_*/**/*")}
    assert "33 of them done, 0 to run" in play(config).stdout
    assert {path: path.stat().st_mtime_ns for path in game.glob("round_*/**/*")} == files


@pytest.mark.slow
def test_same_command_does_nothing_twice(short_game):
    game = short_game.parent / "game"
    files = {path: path.stat().st_mtime_ns for path in game.glob("round_*/**/*")}
    assert "5 of them done, 0 to run" in play(short_game, "--until", FIRST).stdout
    assert {path: path.stat().st_mtime_ns for path in game.glob("round_*/**/*")} == files
    status = play(short_game, "--status").stdout
    assert re.search(r"^1/pair +done in \d+ s +pairs 16, responses 16$", status, re.MULTILINE)
    assert re.search(r"^1/score +open$", status, re.MULTILINE)
    command = (game / "round_1" / "pair" / "command.txt").read_text(encoding="utf-8")
    assert command.startswith("python tools/apo_data_converter.py --golden_data_path ")
    assert read_json(game / "round_1" / "train_rm" / DONE)["parents"] == ["1/pair"]


@pytest.mark.slow
def test_change_is_refused_before_anything_runs_and_redo_goes_on(short_game, base_llama):
    """Only what was made from the stage is moved; nothing is deleted."""
    folder = short_game.parent
    original = short_game.read_text(encoding="utf-8")
    write_game(folder, base_llama, pair={"group": True})
    error = refused(short_game)
    assert "1/pair was run with group None, now given; give the same again, or --redo 1/pair moves it aside" in error
    said = play(short_game, "--redo", "1/pair").stdout
    assert said.startswith(f"moved to {folder / 'game' / 'old_1'}, which you may delete: 1/pair, 1/train_rm;")
    assert (folder / "game" / "old_1" / "round_1" / "train_rm" / "model.safetensors").is_file()
    assert "5 to run" not in play(short_game, "--until", "1/sample_rm").stdout
    assert "pairs 16" in play(short_game, "--until", "1/pair").stdout
    # Back to what it was, for the other tests.
    play(short_game, "--redo", "1/pair")
    short_game.write_text(original, encoding="utf-8")
    for name in ("pair", "train_rm"):
        (folder / "game" / "old_1" / "round_1" / name).rename(folder / "game" / "round_1" / name)
    assert "0 to run" in play(short_game, "--until", FIRST).stdout


@pytest.mark.slow
def test_flag_that_a_program_does_not_have_is_refused_at_the_start(base_llama, tmp_path):
    config = write_game(tmp_path, base_llama, select={"alow_changes": True})
    assert "select: tools/rejection_sampling.py has no flag --alow_changes; did you mean allow_changes?" in refused(
        config
    )
    assert not list((tmp_path / "game").glob("round_*"))


def test_wrong_words_are_one_line(tmp_path):
    config = write_game(tmp_path, "llm")
    assert "--until 1/scroe: no such stage; did you mean 1/score?" in refused(config, "--until", "1/scroe")
    assert "--redo 9: no such stage; see --status" in refused(config, "--redo", "9")
    assert "game.yaml: rounds: found" not in play(config, "--rounds", 1, "--dry_run").stdout
    assert "expected a YAML file" in refused(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "words", list(itertools.combinations((("--dry_run",), ("--status",), ("--report",), ("--redo", "1/pair")), 2))
)
def test_flags_of_which_one_can_take_effect_are_refused(tmp_path, words):
    config = write_game(tmp_path, "llm")
    (first, *more), (second, *rest) = words
    assert f"argument {second}: not allowed with argument {first}" in refused(config, first, *more, second, *rest)


def test_report_of_no_game_is_refused(tmp_path):
    assert "game: no game has begun here" in refused(write_game(tmp_path, "llm"), "--report")
    assert not (tmp_path / "game").exists()


def test_flags_win_over_the_file(tmp_path):
    config = write_game(tmp_path, "llm")
    words = ["--rounds", 1, "--align_type", "rjs", "--apo", "false", "--seed", 7, "--output_dir", tmp_path / "other"]
    script = play(config, *words, "--dry_run").stdout
    assert f"# game in {tmp_path / 'other'}: 1 rounds of rjs, seed 7" in script
    assert "--align_type rjs" in script and "sample_rm" not in script and "round_2" not in script


# ------------------------------------------------------------------------------------------------ server


@pytest.mark.slow
def test_server_responds_with_the_llm_of_each_round(base_llama, tmp_path):
    """A real server with the LLM behind it, started and ended by the game: LLM 0, and LLM 1, aligned with LoRA."""
    port = free_port()
    server = {"command": f"python tests/model_server.py {{model}} {port}", "base_url": f"http://127.0.0.1:{port}/v1"}
    align = SECTIONS["align"] | {"use_peft": True, "lora_target_modules": "all-linear", "lora_alpha": 1000}
    config = write_game(tmp_path, base_llama, server=server, align=align, apo=False)
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    words = [sys.executable, "play.py", "--config", str(config), "--until", "2/sample_eval"]
    subprocess.run(words, cwd=REPO_ROOT, env=environment, check=True, capture_output=True)
    game = tmp_path / "game"
    llms = [ModelServer(str(folder), 0, "") for folder in (base_llama, game / "round_1" / "align")]
    logs = sorted(str(path.relative_to(game).parents[1]) for path in game.glob("round_*/*/logs/server_1.log"))
    asked = {"round_0/sample_test": 0, "round_1/sample_eval": 0, "round_1/sample_llm": 0}
    asked |= {"round_1/sample_test": 1, "round_2/sample_eval": 1}
    assert logs == sorted(asked)
    for stage, number in asked.items():
        [result] = (game / stage).glob(f"llm_{number}_*_results.json")
        settings = read_json(result.with_suffix(".settings.json"))
        assert settings["engine"] == "openai"
        request = {"temperature": settings["temperature"], "max_tokens": settings["max_new_tokens"]}
        for record in read_json(result):
            seed = derive_seed(settings["seed"], record["query_id"], 0)
            texts = [llm.complete({**request, "prompt": record["query"], "seed": seed}) for llm in llms]
            found, expected, other = (text.split() for text in (record["sample_0"], texts[number], texts[1 - number]))
            assert found == expected != other
    assert served_models(server["base_url"]) is None


# ------------------------------------------------------------------------------------------------ kills


def stage_of(game: int) -> int | None:
    """The process of the stage that a game runs; None between two stages."""
    for child in Path(f"/proc/{game}/task/{game}/children").read_text(encoding="utf-8").split():
        with contextlib.suppress(OSError):  # it has ended in the meantime
            if b".py" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def start_game(config: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, "play.py", "--config", str(config), *map(str, words)]
    return subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# When (a file of the game is there, and a stage runs), and who is killed. "driver alone": when no stage runs. The file
# of an attempt is there as soon as its process.
KILLS = [
    ("round_0/testing_rm.partial/checkpoint-2/contents.json", "driver"),
    ("round_0/sft.partial/logs/attempt_1.log", "both"),
    ("round_0/sample_test.partial/logs/attempt_1.log", "stage"),
    ("round_0/sample_test.partial/logs/attempt_2.log", "driver"),
    ("round_0/score_testing.partial/logs/attempt_1.log", "driver"),
    ("round_0/judge.partial/logs/attempt_1.log", "both"),
    ("round_1/sample_rm.partial/logs/attempt_1.log", "driver"),
    ("round_1/pair.partial/logs/attempt_1.log", "stage"),
    ("round_1/train_rm.partial/checkpoint-4/contents.json", "both"),
    ("round_1/train_rm.partial/model.safetensors", "stage"),
    ("round_1/pair_eval.partial/logs/attempt_1.log", "driver"),
    ("round_1/evaluate_rm.partial/logs/attempt_1.log", "both"),
    ("round_1/sample_llm.partial/*.partial.jsonl", "both"),  # some responses are finished
    ("round_1/score.partial/logs/attempt_1.log", "stage"),
    ("round_1/select*/best_report.json", "driver alone"),  # the stage has ended, and is maybe not recorded yet
    ("round_1/align.partial/checkpoint-2/contents.json", "stage"),
    ("round_1/align.partial/model.safetensors", "both"),
    ("round_1/score_own.partial/llm_0_*.settings.json", "both"),  # of the first of two files
    ("round_1/judge/done.json", "driver alone"),  # all stages are done, the report is not written
    ("report/report.json", "driver alone"),  # the page is not written
]


@pytest.mark.slow
def test_game_killed_again_and_again_has_the_same_results(one_round, tmp_path):
    """Models, samples, pairs, rewards and report, to the bit: driver, stage or both get SIGKILL, twenty times."""
    config, expected = one_round
    game = tmp_path / "game"
    words = ["--rounds", 1, "--output_dir", game]
    for file, who in KILLS:
        process = start_game(config, *words)
        try:
            while ((stage := stage_of(process.pid)) is None) != (who == "driver alone") or not any(game.glob(file)):
                assert process.poll() is None, f"{file} was never there at the right time"
                time.sleep(0.002)
        finally:
            if who != "stage":
                process.kill()
            if who in ("stage", "both") and stage:
                with contextlib.suppress(ProcessLookupError):  # it has ended with its driver
                    os.kill(stage, signal.SIGKILL)
            _, stderr = process.communicate()
        assert process.returncode == (2 if who == "stage" else -signal.SIGKILL) and "Traceback" not in stderr, stderr
        assert who != "stage" or "ended with SIGKILL" in stderr
    assert not (game / "report" / "index.html").exists()
    play(config, *words)
    assert outcome(game) == expected
    assert len(expected["rm"]) == len(expected["selection"]) == len(expected["gains_in_sd"]) == 1
    assert sum(name.startswith("round_") for name in expected) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_lets_the_stage_save(base_llama, tmp_path, signum, status):
    config = write_game(tmp_path, base_llama, testing_rm=TRAIN_RM | {"max_steps": 5000, "save_strategy": "no"})
    folder = tmp_path / "game" / "round_0" / "testing_rm.partial"
    log = folder / "logs" / "attempt_1.log"
    process = start_game(config, "--until", "0/testing_rm")
    try:
        wait_until(lambda: process.poll() is not None or (log.is_file() and "'loss'" in log.read_text()))
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == status and "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1] == "interrupted: the same command starts again"
    [checkpoint] = folder.glob("checkpoint-*")
    assert (checkpoint / "contents.json").is_file()
    assert "resumes" in log.read_text(encoding="utf-8").splitlines()[-1]


@pytest.mark.slow
def test_second_game_in_the_folder_is_refused(short_game):
    process = start_game(short_game, "--until", "1/sample_eval")
    try:
        wait_until(lambda: (short_game.parent / "game" / "round_1" / "sample_eval.partial").exists(), seconds=120)
        assert f"play.lock, held by process {process.pid} on" in refused(short_game)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
        assert process.returncode == 143, stderr
        assert stderr.splitlines()[-1].startswith("interrupted: ")
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------------------------ configs


def commands_of(script: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in script.splitlines()]
    return [words for words in lines if any(word.endswith(".py") for word in words)]


@pytest.mark.parametrize("path", GAMES, ids=lambda path: path.stem)
def test_commands_of_the_game_parse(path, tmp_path, monkeypatch):
    """As a script, and each by its own program; the data need not be there."""
    script = tmp_path / "game.sh"
    script.write_text(play(path, "--dry_run").stdout, encoding="utf-8")
    subprocess.run(["bash", "-n", script], check=True)
    commands = commands_of(script.read_text(encoding="utf-8"))
    assert len(commands) > 13 * yaml.safe_load(path.read_text(encoding="utf-8"))["rounds"]
    monkeypatch.chdir(REPO_ROOT)
    for words in commands:
        program = next(word for word in words if word.endswith(".py"))
        parse(program, words[words.index(program) + 1 :], monkeypatch)


def parse(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the flags as the program does."""
    if program == "train.py":
        importlib.import_module("arguments").parse_flags(words)
    elif program == "train_llm.py":
        importlib.import_module("llm_arguments").parse_llm_flags(words)
    else:
        monkeypatch.setattr(sys, "argv", [program, *words])
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).parse_args()
