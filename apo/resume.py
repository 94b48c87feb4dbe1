"""What a killed run had already: the finished parts of a result, and what tells them from those of another run."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apo.cli import InputError, first_few, sha256_of_file, write_json

logger = logging.getLogger(__name__)

MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "chat_template*")


def model_version(path: str, commit: str | None) -> str | None:
    """What changes with the model: a hash over names, sizes and times of its folder's files, or the Hub's commit."""
    if not Path(path).is_dir():
        return commit
    files = sorted(file for pattern in MODEL_FILES for file in Path(path).glob(pattern))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def refuse_overwriting(data_path: str | Path, result_path: Path) -> None:
    """Refuses a result that would replace the data it is made from.

    Raises:
        InputError: both paths lead to one file.
    """
    if Path(data_path).resolve() == result_path.resolve():
        raise InputError(f"{result_path}: found the data to read where the result goes, expected another file for it")


class ResultStore:
    """Finished parts of a result, on disk, so that a run that was killed at any moment goes on.

    A part is a key with its values: a prompt's key with its responses, or the number of a batch with its rewards.
    Every process appends to a file of its own, `<result>.<fingerprint>.rank<i>.partial.jsonl`, one line a part: `[key,
    values]`. The fingerprint stands for the settings, so that parts of other settings never mix; what else the values
    depend on belongs into the key.

    Notes, such as a server's address, are recorded with parts and result but decide nothing: a changed one is named.
    """

    def __init__(
        self, result_path: Path, settings: Mapping[str, Any], rank: int = 0, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.result_path = result_path
        self.settings = dict(settings)
        self.notes = dict(notes or {})
        self.settings_path = result_path.with_suffix(".settings.json")
        self.fingerprint = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self._own_path = result_path.with_suffix(f".{self.fingerprint}.rank{rank}.partial.jsonl")
        self._file: Any = None

    def _partial_paths(self, fingerprint: str) -> list[Path]:
        name = f"{glob.escape(self.result_path.stem)}.{fingerprint}.rank*.partial.jsonl"
        return sorted(self.result_path.parent.glob(name))

    def load(self) -> dict[str, list[Any]]:
        """Reads the parts of all processes of this and of earlier runs; a line that a kill has torn is not there."""
        parts: dict[str, list[Any]] = {}
        notes: dict[str, Any] = {}
        for path in self._partial_paths(self.fingerprint):
            try:
                lines = path.read_bytes().split(b"\n")
            except FileNotFoundError:  # another process has written the result in the meantime
                continue
            for line in lines:
                try:
                    part = json.loads(line)
                except ValueError:
                    continue
                if isinstance(part, dict):
                    notes |= part
                else:
                    parts[part[0]] = part[1]
        if parts:
            self._warn_of_changed(notes)
        return parts

    def is_finished(self) -> bool:
        """Whether the result of these settings is there. Ask it after `load`: the partial files go last."""
        if not (self.result_path.is_file() and self.settings_path.is_file()):
            return False
        try:
            recorded = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except ValueError:
            return False
        return isinstance(recorded, dict) and recorded == {**recorded, **self._record()}

    def load_result(self) -> list[dict[str, Any]]:
        """Reads the result of these settings; no records if it is not there or was changed. Call it after `load`."""
        if not self.is_finished():
            return []
        self._warn_of_changed(json.loads(self.settings_path.read_text(encoding="utf-8")))
        return json.loads(self.result_path.read_text(encoding="utf-8"))

    def _warn_of_changed(self, recorded: Mapping[str, Any]) -> None:
        for name, value in self.notes.items():
            if recorded.get(name, value) != value:
                logger.warning("%s was %s for what is kept, and is %s now", name, recorded[name], value)

    def log_state(self, num_done: int, num_parts: int, noun: str) -> None:
        """Says what an earlier run has left."""
        if num_done:
            logger.info("%d of %d %s were done before", num_done, num_parts, noun)
        others = set(self._partial_paths("*")) - set(self._partial_paths(self.fingerprint))
        if others:
            logger.info("left alone, for they are of other settings: %s", first_few(sorted(p.name for p in others)))

    def open(self) -> None:
        """Opens this process's file, as `append` does, but before the work whose parts it is for.

        Raises:
            InputError: nothing can be written there.
        """
        try:
            if self.result_path.is_dir():
                raise IsADirectoryError(None, "a folder of that name is there")
            self.result_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._own_path, "ab")  # noqa: SIM115  stays open from part to part
        except OSError as error:
            raise InputError(
                f"{self.result_path}: cannot be written ({error.strerror}), expected a place for the result and for "
                "files beside it"
            ) from error
        self._file.write(b"\n" * (self._file.tell() > 0))  # ends a torn line
        if self.notes:
            self._write(self.notes)

    def append(self, key: str, values: list[Any]) -> None:
        """Keeps a part."""
        if self._file is None:
            self.open()
        self._write([key, values])

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes this process's file; only then do processes on other machines see all of it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, records: list[dict[str, Any]]) -> None:
        """Writes the result, then `<result>.settings.json`, then deletes the parts. Two processes may both do so."""
        self.close()
        write_json(self.result_path, records)
        write_json(self.settings_path, {**self._record(), **self.notes})
        for path in self._partial_paths(self.fingerprint):
            path.unlink(missing_ok=True)

    def _record(self) -> dict[str, Any]:
        return {**self.settings, "result_sha256": sha256_of_file(self.result_path)}
