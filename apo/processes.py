"""The processes of a stage of the game: its command, here or as a job under Slurm, and the server of the user's."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from apo.cli import InputError, Terminated
from apo.launch import end_with_parent
from apo.stages import Stage

logger = logging.getLogger(__name__)

SERVER_SECONDS = 3600  # to load its model
STOP_SECONDS = 60  # from SIGTERM to SIGKILL, for a server


def find_reason(text: str) -> str:
    """Returns the line that says why a command has failed: its last error, or its last line.

    A launcher may print its own traceback after the error.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error")]
    return (errors or lines or ["it printed nothing"])[-1]


@contextlib.contextmanager
def lock_of_processes(path: Path) -> Iterator[int]:
    """Gives a lock that every process which inherits it holds too: it waits for those of a killed run to end.

    Yields:
        its file descriptor, for `start`.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for the processes of a killed run of this game to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def start(words: list[str], log: IO[bytes], lock: int) -> subprocess.Popen:
    """Starts a command in a session of its own, so that Ctrl-C reaches it once; it ends with this process (Linux).

    Args:
        log: where its output goes.
        lock: of `lock_of_processes`.
    """
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path}
    game = os.getpid()

    def end_with_game() -> None:
        """Runs in the new process, before the command."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of the game could lose the signal
        end_with_parent()
        if os.getppid() != game:  # killed before this process could get a signal of it
            os._exit(1)

    options = {"start_new_session": True, "preexec_fn": end_with_game, "pass_fds": (lock,), "env": environment}
    try:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **options)
    except OSError as error:
        raise InputError(f"{shlex.join(words)[:200]}: {error.strerror}; install {words[0]}, or change it") from error


def wait_for(process: subprocess.Popen) -> int:
    """Returns the exit status of a command. It looks up now and then: a signal may reach another thread than this."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=60)


def send(process: subprocess.Popen, signum: int) -> None:
    """Sends a signal to a command and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


# ------------------------------------------------------------------------------------------------ the command


def run_command(stage: Stage, log_path: Path, lock: int) -> None:
    """Runs the command of a stage. A signal is passed on to it, and it may save before this function ends.

    Raises:
        InputError: it fails; with its last line.
    """
    with open(log_path, "ab") as log:
        process = start(job(stage, log_path) if stage.slurm is not None else stage.command, log, lock)
        try:
            status = wait_for(process)
        except KeyboardInterrupt as error:
            signum = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            if stage.slurm is None:
                send(process, signum)
            else:
                cancel_job(stage, signum)
            wait_for(process)
            raise
    if status:
        how = f"status {status}" if status > 0 else signal.Signals(-status).name
        line = find_reason(log_path.read_text(encoding="utf-8", errors="replace"))
        raise InputError(f"{stage.label} ended with {how}: {line}; log: {log_path}; the same command goes on")


def job_name(stage: Stage) -> str:
    """Returns the name of a stage's job under Slurm, which a stage of another game does not have."""
    digest = hashlib.sha256(str(stage.folder.resolve()).encode()).hexdigest()[:8]
    return f"apo-{stage.round}-{stage.name}-{digest}"


def job(stage: Stage, log_path: Path) -> list[str]:
    """Returns the words that run a stage as a job, once an earlier job of its name, of a killed run, has ended."""
    words = ["sbatch", "--wait", "--job-name", job_name(stage), "--dependency", "singleton"]
    words += ["--output", str(log_path), "--open-mode", "append", *shlex.split(stage.slurm or "")]
    return [*words, "--wrap", shlex.join(stage.command)]


def cancel_job(stage: Stage, signum: int) -> None:
    """Ends the job of a stage: a waiting one at once, a running one with a signal, so that it saves."""
    name = job_name(stage)
    subprocess.run(["scancel", "--state", "PENDING", "--name", name], check=False)
    words = ["scancel", "--full", "--signal", signal.Signals(signum).name.removeprefix("SIG")]
    subprocess.run([*words, "--name", name], check=False)


# ------------------------------------------------------------------------------------------------ the server


def served_models(base_url: str) -> list[str] | None:
    """Returns the names of the models that a server has now; None if it does not reply."""
    import httpx2

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    try:
        response = httpx2.get(f"{base_url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=10)
        return [model["id"] for model in response.json()["data"]] if response.status_code == 200 else None
    except (httpx2.HTTPError, ValueError, LookupError, TypeError):
        return None


@contextlib.contextmanager
def serving(words: list[str], base_url: str, model: str, log_path: Path, lock: int) -> Iterator[None]:
    """Runs a server, and ends it and no other process.

    Args:
        words: its command.
        model: the name that it has to serve.

    Raises:
        InputError: there is a server already, or it ends, takes too long, or serves another model.
    """
    if (found := served_models(base_url)) is not None:
        raise InputError(f"server: found one with {', '.join(found)} at {base_url}; end it, or change the port")
    with open(log_path, "ab") as log:
        process = start(words, log, lock)
        try:
            deadline = time.monotonic() + SERVER_SECONDS
            while (found := served_models(base_url)) is None:
                status = process.poll()
                if status is not None or time.monotonic() > deadline:
                    state = "does not reply" if status is None else f"ended with status {status}"
                    line = find_reason(log_path.read_text(encoding="utf-8", errors="replace"))
                    raise InputError(f"server: it {state}: {line}; log: {log_path}")
                time.sleep(0.2)
            if model not in found:
                expected = f"expected {model}; its command needs {{model}}"
                raise InputError(f"server: found {', '.join(found)} at {base_url}, {expected}")
            yield
        finally:
            send(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            send(process, signal.SIGKILL)
            process.wait()
