"""Command lines: one-line errors, complete files, locks."""

import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import read_json

from apo import cli
from apo.cli import InputError, OneLineParser, at_least, describe_counts, exit_on_input_error, locked, write_json


def test_json_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": "é"})
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(InputError, match="disk full"):
        write_json(path, {"a": "b"})
    assert read_json(path) == {"a": "é"}


@pytest.mark.parametrize(
    ("name", "text"), [("file/a.json", "b"), ("folder", "b"), ("a.json", "\ud83d")], ids=["below", "folder", "text"]
)
def test_failed_write_is_one_line_and_leaves_no_file(tmp_path, name, text):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=rf"{name}: cannot be written \(.*\); give another place, or fix the text$"):
        write_json(tmp_path / name, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_bytes_and_new_name_are_on_the_disk_around_the_rename(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.path.isdir(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda source, target: events.append("rename"))
    write_json(tmp_path / "a.json", 1)
    assert events == [False, "rename", True]


def hold(path: Path) -> subprocess.Popen:
    """Starts a process that holds a lock until it is killed."""
    script = "import sys, time\nfrom apo.cli import locked\nwith locked(sys.argv[1], wait=False):\n"
    script += "    print(flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_second_process_is_refused_until_the_first_is_killed(tmp_path):
    process = hold(tmp_path / "a")
    try:
        with pytest.raises(InputError, match=rf"found {tmp_path}/a.lock, held by process {process.pid} on "):
            locked(tmp_path / "a", wait=False).__enter__()
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path / "a", wait=False):
        assert str(os.getpid()) in (tmp_path / "a.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_lock_is_said(tmp_path, monkeypatch, caplog):
    """The other process is killed as soon as this one says that it waits."""
    monkeypatch.setattr(cli, "LOCK_SECONDS", 0)
    process = hold(tmp_path / "a")
    monkeypatch.setattr(cli.logger, "filters", [lambda record: process.kill() or True])
    with locked(tmp_path / "a", wait=True):
        assert f"waiting for {tmp_path}/a.lock, held by process {process.pid}" in caplog.text
    process.wait()


def test_lock_without_a_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a.lock: cannot be written"), locked(tmp_path / "file" / "a", wait=True):
        pass


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --seed; see --help"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'; see --help"),
        (["--seed", "1", "--nonsense"], "unrecognized arguments: --nonsense; see --help"),
        (["--see", "1"], "required: --seed; see --help"),
    ],
)
def test_flags_that_are_refused_are_one_line(argv, message):
    """An abbreviated flag is no flag."""
    parser = OneLineParser(description="A tool.")
    parser.add_argument("--seed", type=int, required=True)
    with pytest.raises(InputError, match=message):
        parser.parse_args(argv)


def test_counts_are_described():
    assert describe_counts(Counter(b=2, a=1, c=0), "responses") == "3 responses (1 a, 2 b)"
    assert describe_counts(Counter(), "pairs") == "0 pairs"


def test_every_process_reports_its_error_in_one_line(monkeypatch, capsys):
    @exit_on_input_error
    def main() -> None:
        raise InputError("no\nline")

    for rank, line in (("0", "error: no\\nline\n"), ("1", "error of rank 1: no\\nline\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err == line


def test_no_secret_is_in_an_error_or_a_log(monkeypatch, capsys, caplog):
    """From the environment, a flag or a URL, or only in the form of one; words too short for a key are no secret."""
    monkeypatch.setattr(cli, "hidden", {"of-a-flag"})
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    secret = "of-a-flag of-the-environment http://me:of-a-url@host hf_" + "a1" * 17

    @exit_on_input_error
    def main() -> None:
        logging.getLogger("library").warning("EMPTY %s", secret)
        raise InputError(f"EMPTY {secret}")

    with pytest.raises(SystemExit, match="2"):
        main()
    masked = "EMPTY *** *** http://***@host ***"
    assert capsys.readouterr().err == f"error: {masked}\n" and masked in caplog.text and "of-a" not in caplog.text


@pytest.mark.parametrize(
    ("least", "word", "number"),
    [(1, "1", 1), (0, "0", 0), (0.0, "0.5", 0.5), (0.0, "1e-3", 1e-3)],
)
def test_number_within_its_range_is_read(least, word, number):
    value = at_least(least)(word)
    assert value == number and type(value) is type(least)


@pytest.mark.parametrize(
    ("least", "word"), [(1, "0"), (1, "1.5"), (1, "one"), (0.0, "-0.1"), (0.0, "nan"), (0.0, "inf")]
)
def test_number_outside_its_range_is_refused_in_one_line(least, word):
    parser = OneLineParser()
    parser.add_argument("--rounds", type=at_least(least))
    with pytest.raises(InputError, match=rf"--rounds: found {word}, expected a (whole|finite) number of at least \d"):
        parser.parse_args([f"--rounds={word}"])
