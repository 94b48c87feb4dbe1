"""The processes of a stage: exit status, signals, the death of the game, jobs under Slurm, the server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO_ROOT, free_port, wait_until

from apo.cli import InputError, Terminated, raise_interrupt
from apo.processes import job_name, lock_of_processes, run_command, served_models, serving
from apo.stages import Stage


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Stage]:
    """Makes a stage whose program are lines of bash."""

    def make(*lines: str, slurm: str | None = None) -> Stage:
        program = tmp_path / "program.sh"
        program.write_text("\n".join(lines), encoding="utf-8")
        return Stage(1, "stage", tmp_path / "stage", ("bash",), str(program), {}, slurm)

    return make


@pytest.fixture
def lock(tmp_path: Path):
    with lock_of_processes(tmp_path / "processes.lock") as descriptor:
        yield descriptor


def write_program(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(("#!/bin/bash", *lines)), encoding="utf-8")
    path.chmod(0o755)


# ------------------------------------------------------------------------------------------------ the command


def test_failure_is_one_line_with_the_error_of_the_command(stage, lock, tmp_path):
    run_command(stage("echo fine; exit 0"), tmp_path / "log", lock)
    with pytest.raises(InputError, match=r"1/stage ended with status 3: error: no such file; log: .*log; the same"):
        lines = ["echo error: no such file >&2", "echo Traceback of a launcher", "exit 3"]
        run_command(stage(*lines), tmp_path / "log", lock)
    with pytest.raises(InputError, match="1/stage ended with SIGKILL: fine"):
        run_command(stage("echo fine", "kill -9 $$"), tmp_path / "other_log", lock)
    assert (tmp_path / "log").read_text(encoding="utf-8").startswith("fine\nerror")


def test_program_that_is_not_installed_is_one_line(lock, tmp_path):
    missing = Stage(1, "stage", tmp_path, ("torchrunn",), "train.py", {})
    with pytest.raises(InputError, match=r"torchrunn train.py: No such file or directory; install torchrunn"):
        run_command(missing, tmp_path / "log", lock)


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")])
def test_signal_is_passed_on_and_the_command_may_save(stage, lock, tmp_path, signum, name):
    """All of its processes get it, once; the game goes on when the command has ended."""
    lines = [f"trap 'sleep 0.5; echo {name} >> {tmp_path}/saved; exit 7' {name}", f"touch {tmp_path}/ready"]
    game = stage(*lines, "while true; do sleep 0.1; done")
    before = signal.signal(signum, raise_interrupt)
    killer = [
        "bash",
        "-c",
        f"until [[ -e {tmp_path}/ready ]]; do sleep 0.1; done; sleep 0.5; kill -{name} {os.getpid()}",
    ]
    with subprocess.Popen(killer):
        try:
            with pytest.raises(KeyboardInterrupt) as error:
                run_command(game, tmp_path / "log", lock)
        finally:
            signal.signal(signum, before)
    assert isinstance(error.value, Terminated) == (signum == signal.SIGTERM)
    assert (tmp_path / "saved").read_text(encoding="utf-8") == f"{name}\n"


RUNS_A_STAGE = """
import sys
from pathlib import Path
from apo.processes import lock_of_processes, run_command
from apo.stages import Stage
folder = Path(sys.argv[1])
with lock_of_processes(folder / "processes.lock") as lock:
    run_command(Stage(1, "stage", folder, ("bash",), sys.argv[2], {}), folder / "log", lock)
"""


def test_command_ends_with_a_killed_game_and_the_next_one_waits(stage, tmp_path):
    """It gets SIGTERM, and holds the lock while it saves."""
    lines = [f"trap 'sleep 1; touch {tmp_path}/saved; exit' TERM", f"touch {tmp_path}/ready"]
    program = stage(*lines, "while true; do sleep 0.1; done").program
    words = [sys.executable, "-c", RUNS_A_STAGE, str(tmp_path), program]
    with subprocess.Popen(words, cwd=REPO_ROOT, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}) as game:
        wait_until((tmp_path / "ready").exists, seconds=60)
        game.kill()
    assert not (tmp_path / "saved").exists()
    with lock_of_processes(tmp_path / "processes.lock"):
        assert (tmp_path / "saved").exists()


KILLS_THE_GAME = """
import os, signal, time
def kill_parent():
    game = os.getppid()
    os.kill(game, signal.SIGKILL)
    while os.getppid() == game:
        time.sleep(0.01)
os.register_at_fork(after_in_child=kill_parent)
"""


def test_command_does_not_begin_once_the_game_is_killed(stage, tmp_path):
    """The game dies between the start of the process and that of its command."""
    program = stage(f"touch {tmp_path}/ran").program
    words = [sys.executable, "-c", KILLS_THE_GAME + RUNS_A_STAGE, str(tmp_path), program]
    game = subprocess.run(words, cwd=REPO_ROOT, env=os.environ | {"PYTHONPATH": str(REPO_ROOT)}, check=False)
    assert game.returncode == -signal.SIGKILL
    with lock_of_processes(tmp_path / "processes.lock"):
        assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ Slurm

SBATCH = r"""
while (($#)); do
    case $1 in
        --wait) waits=1; shift ;;
        --wrap) wrap=$2; shift 2 ;;
        --output) output=$2; shift 2 ;;
        --job-name) name=$2; shift 2 ;;
        --dependency | --open-mode | --gpus) echo "$1 $2" >> "$0.options"; shift 2 ;;
        *) echo "unknown option $1"; exit 1 ;;
    esac
done
echo "Submitted batch job 1"
bash -c "echo \$\$ > $0.$name; exec $wrap" >> "$output" 2>&1 &
[[ -n $waits ]] && wait $!
"""
SCANCEL = r"""
echo "$@" >> "$0.words"
if [[ $1 == --full ]]; then kill "-$3" "$(cat "${0%/*}/sbatch.$5")"; fi
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """sbatch and scancel that run the command on this machine; their folder."""
    write_program(tmp_path / "bin" / "sbatch", SBATCH)
    write_program(tmp_path / "bin" / "scancel", SCANCEL)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "bin"


def test_job_has_the_status_and_the_log_of_its_command(stage, lock, tmp_path, slurm):
    run_command(stage("echo well done", slurm="--gpus 8"), tmp_path / "log", lock)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "Submitted batch job 1\nwell done\n"
    options = (slurm / "sbatch.options").read_text(encoding="utf-8").splitlines()
    assert options == ["--dependency singleton", "--open-mode append", "--gpus 8"]
    with pytest.raises(InputError, match="1/stage ended with status 2: error: too large"):
        run_command(stage("echo error: too large", "exit 2", slurm=""), tmp_path / "log", lock)


def test_job_name_is_that_of_the_stage_of_this_game(stage, tmp_path):
    first, second = stage("exit"), Stage(1, "stage", tmp_path / "other" / "stage", (), "", {})
    assert job_name(first).startswith("apo-1-stage-") and job_name(first) != job_name(second)


def test_job_gets_the_signal(stage, lock, tmp_path, slurm):
    game = stage(
        f"trap 'touch {tmp_path}/saved; exit 0' TERM",
        f"touch {tmp_path}/ready",
        "while true; do sleep 0.1; done",
        slurm="",
    )
    before = signal.signal(signal.SIGTERM, raise_interrupt)
    killer = ["bash", "-c", f"until [[ -e {tmp_path}/ready ]]; do sleep 0.1; done; kill -TERM {os.getpid()}"]
    with subprocess.Popen(killer):
        try:
            with pytest.raises(Terminated):
                run_command(game, tmp_path / "log", lock)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "saved").exists()
    words = (slurm / "scancel.words").read_text(encoding="utf-8").splitlines()
    name = job_name(game)
    assert words == [f"--state PENDING --name {name}", f"--full --signal TERM --name {name}"]


# ------------------------------------------------------------------------------------------------ the server


def server_words(*words: object) -> list[str]:
    return [sys.executable, str(REPO_ROOT / "tests" / "model_server.py"), *map(str, words)]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def url(port) -> str:
    return f"http://127.0.0.1:{port}/v1"


def test_server_runs_for_a_stage_and_no_longer(base_llama, port, url, tmp_path, lock, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO_ROOT))
    with serving(server_words(base_llama, port), url, str(base_llama), tmp_path / "log", lock):
        assert served_models(url) == [str(base_llama)]
    assert served_models(url) is None


def test_server_with_another_model_is_refused_and_ended(base_llama, port, url, tmp_path, lock, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO_ROOT))
    words = server_words(base_llama, port, "old-model")
    expected = pytest.raises(
        InputError, match=r"server: found old-model at .*, expected .*its command needs \{model\}"
    )
    with expected, serving(words, url, str(base_llama), tmp_path / "log", lock):
        pytest.fail("it was accepted")
    assert served_models(url) is None


def test_server_that_is_there_before_is_refused_and_lives_on(server, tmp_path, lock):
    """It may have the model of an earlier round, under whatever name."""
    expected = pytest.raises(InputError, match="server: found one with a-model at http")
    with expected, serving(["sleep", "60"], server.base_url, "a-model", tmp_path / "log", lock):
        pytest.fail("it was accepted")
    assert served_models(server.base_url) == ["a-model"]


def test_server_that_ends_is_one_line(url, tmp_path, lock):
    words = ["bash", "-c", "echo out of memory; exit 1"]
    expected = pytest.raises(InputError, match=r"server: it ended with status 1: out of memory; log: .*log")
    with expected, serving(words, url, "a-model", tmp_path / "log", lock):
        pytest.fail("it was accepted")


def test_server_that_does_not_stop_is_killed(server, tmp_path, lock, monkeypatch):
    """After the stage; so are the processes that it has started."""
    monkeypatch.setattr("apo.processes.STOP_SECONDS", 0.5)
    monkeypatch.setattr("apo.processes.served_models", lambda url, found=[None, ["m"]]: found.pop(0))
    words = ["bash", "-c", f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; wait"]
    with serving(words, "", "m", tmp_path / "log", lock):
        wait_until((tmp_path / "child").exists)
        time.sleep(0.2)
        child = Path("/proc", (tmp_path / "child").read_text().strip())
    wait_until(lambda: not child.exists() or "zombie" in (child / "status").read_text(), seconds=10)
