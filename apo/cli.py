"""What every command line shares: one-line errors, the parser, atomic writing, locks."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from apo.launch import end_with_launcher, exit_worker, process_rank

logger = logging.getLogger(__name__)

NUM_SHOWN = 5  # problems that one error message shows
SECRET_VARIABLES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
# User and password of a URL, and keys in the forms of OpenAI and the Hugging Face Hub.
SECRET_FORMS = re.compile(r"(?<=://)[^\s\"'<>]{1,200}(?=@)|\bsk-[\w*-]{16,}|\bhf_[A-Za-z0-9]{20,}")
hidden: set[str] = set()  # further secrets: a token of a flag, the password of a URL
LOCK_SECONDS = 5  # before a process says that it waits


class InputError(ValueError):
    """Wrong input from outside. Its text is the line that the user reads: what came, what was expected, what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, from a scheduler or a launcher. A plain KeyboardInterrupt is SIGINT, from Ctrl-C."""


def refuse(difference: str, allowed: bool) -> None:
    """Raises an InputError for inputs that do not belong together; with --allow_changes it is a warning."""
    if not allowed:
        raise InputError(f"{difference}, or accept it with --allow_changes")
    logger.warning(difference)


def raise_interrupt(signum: int, frame: Any = None, line: str = "") -> NoReturn:
    """Handles SIGTERM and SIGINT: ends what runs now with an exception."""
    raise Terminated(line) if signum == signal.SIGTERM else KeyboardInterrupt(line)


def secrets() -> list[str]:
    """Returns what no file, log or error may hold, the longest first; "none" and "EMPTY" are too short to be a key."""
    values = hidden | {os.environ.get(name, "").strip() for name in SECRET_VARIABLES}
    return sorted((value for value in values if len(value) > 5), key=len, reverse=True)


def mask_secrets(text: str) -> str:
    """Replaces each secret, and what has the form of one, by three stars."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return SECRET_FORMS.sub("***", text)


class MaskedRecord(logging.LogRecord):
    """A log record without secrets, whichever logger it comes from."""

    def getMessage(self) -> str:
        return mask_secrets(super().getMessage())


def exit_on_input_error(main: Callable[..., None]) -> Callable[..., None]:
    """Makes a script's `main` end with one line on stderr, and no traceback, where the cause is outside of the code.

    Exit status: 2 on an `InputError`, and on a file that cannot be read or written; 130 on SIGINT, 143 on SIGTERM.
    Under torchrun every process that finds an error reports it, all but the first with their rank.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        handlers = {signum: signal.signal(signum, raise_interrupt) for signum in (signal.SIGTERM, signal.SIGINT)}
        end_with_launcher()
        logging.setLogRecordFactory(MaskedRecord)
        try:
            main(*args, **kwargs)
            return
        except KeyboardInterrupt as error:
            status = 143 if isinstance(error, Terminated) else 130
            line = f"interrupted: {str(error) or 'the same command starts again'}"
        except (InputError, OSError) as error:
            status, line = 2, f"error of rank {process_rank()}: {error}" if process_rank() else f"error: {error}"
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        if "tqdm" in sys.modules:  # a progress bar leaves the cursor in its line
            for bar in list(sys.modules["tqdm"].tqdm._instances):
                bar.close()
        if status == 2 or not process_rank():
            print(mask_secrets(line).replace("\n", "\\n"), file=sys.stderr, flush=True)
        exit_worker(status)

    return wrapped


class OneLineParser(argparse.ArgumentParser):
    """A command line with full flag names only, whose errors are one line instead of a page of usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns "did you mean ...?" with the closest known word; an empty string if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def at_least(least: float) -> Callable[[str], float]:
    """Returns the argparse type of a number that is finite and not below `least`; of an int, if `least` is one."""

    def parse(word: str) -> float:
        try:
            value = type(least)(word)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            kind = "a whole number" if isinstance(least, int) else "a finite number"
            raise argparse.ArgumentTypeError(f"found {word}, expected {kind} of at least {least:g}")
        return value

    return parse


def publish(temporary: Path, path: Path) -> None:
    """Renames a complete file; its bytes are on the disk before, the new name after."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot do it for a folder
        os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def replacing(path: str | Path, temporary_name: str | None = None) -> Iterator[Path]:
    """Gives a temporary name beside `path` and renames it at the end, so that a killed run leaves no partial file.

    Raises:
        InputError: the file cannot be written, or its text is no valid Unicode.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name or f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        publish(temporary, path)
    except (OSError, UnicodeEncodeError) as error:
        raise InputError(f"{path}: cannot be written ({error}); give another place, or fix the text") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never there
            temporary.unlink()


@contextlib.contextmanager
def locked(path: str | Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock `<path>.lock`, which names its process and ends with it; else waits, or raises an InputError."""
    from filelock import FileLock, Timeout  # takes time that a command line without a lock saves

    lock, file = FileLock(f"{path}.lock"), Path(f"{path}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS if wait else 0)
    except Timeout as error:
        holder = "another process"
        with contextlib.suppress(OSError):  # released in the meantime
            holder = file.read_text(errors="replace") or holder
        if not wait:
            raise InputError(f"found {file}, held by {holder}; wait until it ends, or write elsewhere") from error
        logger.warning("waiting for %s, held by %s", file, holder)
        lock.acquire()
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); give another place") from error
    with contextlib.suppress(OSError):
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # FileLock sees that a file which it opened was deleted in the meantime
            file.write_text("") if wait else file.unlink()
        lock.release()


def format_json(path: str | Path, obj: Any) -> str:
    """Returns the text of the JSON file `path`. A NaN or an infinity is an `InputError`."""
    try:
        return json.dumps(obj, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise InputError(f"{path}: not written: a number in it is not finite ({error})") from error


def write_json(path: str | Path, obj: Any) -> None:
    """Writes `obj` as JSON, completely or not at all; see `replacing`. A NaN or an infinity is an `InputError`."""
    text = format_json(path, obj)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if there is none, or the file is damaged."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _YamlLoader(yaml.SafeLoader):
    """Refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: found {twice[0]} twice, expected each key once")
        return super().construct_mapping(node, deep)


def read_config(path: str) -> dict[str, Any]:
    """Returns the mapping in the YAML file of `--config`.

    Raises:
        InputError: no such file, no YAML, no mapping, or a key that comes twice.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), _YamlLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: {' '.join(str(error).split())}; expected a YAML file") from error
    if not isinstance(settings, dict):
        raise InputError(f'--config {path}: expected a mapping, such as "max_length: 512" on each line')
    return settings


def sha256_of_file(path: str | Path) -> str:
    """Returns the sha256 of a file's bytes in hexadecimal."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, or a folder; give the path of an existing file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class BadField(Exception):
    """A field of one record is wrong: what was found and expected. Becomes one part of the file's `InputError`."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f'field "{field}": found {found}, expected {expected}')


def first_few(parts: list[str]) -> str:
    """Joins the first five parts of a message and counts the rest."""
    more = f"; and {len(parts) - NUM_SHOWN} more" if len(parts) > NUM_SHOWN else ""
    return "; ".join(parts[:NUM_SHOWN]) + more


def describe_counts(counts: Counter[str], noun: str) -> str:
    """Puts the number of things, and of each kind, into words."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)
    return f"{counts.total()} {noun}" + (f" ({kinds})" if kinds else "")


def raise_bad_records(path: str | Path, problems: list[str]) -> None:
    """Raises one `InputError` for all bad records of a file, if there are any."""
    if problems:
        count = f"{len(problems)} bad records: " if len(problems) > 1 else ""
        raise InputError(f"{path}: {count}{first_few(problems)}")


def describe(value: Any) -> str:
    """Puts a value of a record into the words of an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the string {json.dumps(value[:40], ensure_ascii=False)}{'...' * (len(value) > 40)}" if value else '""'
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(value) or 'no fields'}"
    return f"a value of type {type(value).__name__}"  # parquet has bytes, decimals and times
