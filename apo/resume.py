"""Results that survive a kill: the store of finished items, and the one loop that uses it."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from apo.cli import InputError, first_few, format_json, read_json, replacing, sha256_of_file, write_json

logger = logging.getLogger(__name__)

MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "chat_template*")
Item = TypeVar("Item")
Keep = Callable[[str, list[Any]], None]


def model_version(path: str, commit: str | None) -> str | None:
    """Returns what changes with a model: a hash of the names and bytes of its files, or the commit on the Hub."""
    if not Path(path).is_dir():
        return commit
    files = sorted(file for pattern in MODEL_FILES for file in Path(path).glob(pattern))
    hashes = [(file.name, sha256_of_file(file)) for file in files]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def read_recorded(result_path: Path) -> dict[str, Any]:
    """Returns what a result was made from, as its settings file records it; empty where that cannot be read."""
    return read_json(result_path.with_suffix(".settings.json"))


def refuse_overwriting(data_path: str | Path, result_path: Path) -> None:
    """Raises an InputError for a result that would replace a folder, or the data it is made from."""
    found = "a folder" if result_path.is_dir() else "the data to read"
    if result_path.is_dir() or Path(data_path).resolve() == result_path.resolve():
        raise InputError(f"{result_path}: found {found} where the result goes, expected another file for it")


class ResultStore:
    """The finished items of a result, on disk.

    An item is a key and its values: a prompt's key and its responses, or the number of a batch and its rewards. Every
    process appends to its own file, `<result>.<fingerprint>.rank<i>.partial.jsonl`, one `[key, values, notes]` a line.
    The fingerprint is a hash of the settings, so that items of different settings never mix. What the values depend on
    is in the settings or in the key. Notes, such as a server's address, are kept too; a changed one is a warning.
    """

    def __init__(
        self, result_path: Path, settings: Mapping[str, Any], rank: int = 0, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.result_path = result_path
        self.settings = dict(settings)
        self.notes = dict(notes or {})
        self.findings: dict[str, Any] = {}  # about the result, for the settings file; set by who makes the records
        self.fingerprint = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
        self._own_path = result_path.with_suffix(f".{self.fingerprint}.rank{rank}.partial.jsonl")
        self.lock_path = result_path.with_suffix(f".rank{rank}")  # to hold from `load` to `finish`

    def find_partial(self, fingerprint: str) -> list[Path]:
        """The files of the items of all processes; "*" for those of all settings."""
        name = f"{glob.escape(self.result_path.stem)}.{fingerprint}.rank*.partial.jsonl"
        return sorted(self.result_path.parent.glob(name))

    def load(self) -> dict[str, list[Any]]:
        """Reads the items that all processes of this and earlier runs kept; incomplete lines are skipped."""
        items: dict[str, list[Any]] = {}
        notes: dict[str, Any] = {}
        for path in self.find_partial(self.fingerprint):
            lines = []
            with contextlib.suppress(FileNotFoundError):  # another process has written the result in the meantime
                lines = path.read_bytes().split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    key, values, kept_notes = json.loads(line)
                    items[key] = values
                    notes |= kept_notes
        self._warn_of_changed(notes)
        return items

    def load_result(self) -> list[dict[str, Any]] | None:
        """Reads the result of these settings; None if it does not exist or was changed. Call it after `load`."""
        recorded = read_recorded(self.result_path)
        if not self.result_path.is_file() or recorded != {**recorded, **self._record(self.result_path)}:
            return None
        self._warn_of_changed(recorded)
        return json.loads(self.result_path.read_text(encoding="utf-8"))

    def _warn_of_changed(self, recorded: Mapping[str, Any]) -> None:
        for name, value in self.notes.items():
            if recorded.get(name, value) != value:
                logger.warning("%s was %s for what is kept, and is %s now", name, recorded[name], value)

    def append(self, key: str, values: list[Any]) -> None:
        """Keeps an item. Its line break comes first, and so ends the incomplete line of a process that was killed."""
        with open(self._own_path, "ab") as file:
            file.write(b"\n" + json.dumps([key, values, self.notes]).encode())

    def finish(self, records: list[dict[str, Any]]) -> None:
        """Writes the settings, then the result, then deletes the partial files; several processes may do this.

        In this order a run that is killed between the two leaves no result of which nothing is known.
        """
        text = format_json(self.result_path, records)
        with replacing(self.result_path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            settings = {**self._record(temporary), **self.notes, **self.findings}
            write_json(self.result_path.with_suffix(".settings.json"), settings)
        for path in self.find_partial(self.fingerprint):
            path.unlink(missing_ok=True)

    def _record(self, path: Path) -> dict[str, Any]:
        return {**self.settings, "result_sha256": sha256_of_file(path)}


def complete_items(
    store: ResultStore,
    items: Mapping[str, Item],
    done: dict[str, list[Any]],
    work: Callable[[dict[str, Item], Keep], None],
    make_records: Callable[[dict[str, list[Any]]], list[dict[str, Any]]],
    *,
    noun: str,
    share: Collection[str] | None = None,
    progress: bool,
) -> list[dict[str, Any]] | None:
    """Does the work that earlier runs have not done, keeps each finished item, and writes the result.

    Processes that share the items do not wait for each other: the one that finds all of them done writes the result.

    Args:
        items: all items by key, in order.
        done: the values of the finished ones by key; others in it are ignored.
        work: gets the unfinished items of this process, maybe none, and the function that keeps the values of a key.
        make_records: values by key -> the records of the result. An item that `work` did not keep is missing.
        noun: what the items are, for messages.
        share: the keys of this process; None: all.
        progress: whether this process shows a progress bar.

    Returns:
        the records; None if this run did not write them.
    """
    share = items.keys() if share is None else share
    todo = {key: items[key] for key in share if key not in done}
    if num_done := sum(key in done for key in items):
        logger.info("%d of %d %s were done before", num_done, len(items), noun)
    if others := set(store.find_partial("*")) - set(store.find_partial(store.fingerprint)):
        logger.info("not used, other settings: %s", first_few(sorted(path.name for path in others)))
    with tqdm(total=len(share), initial=len(share) - len(todo), unit=noun, disable=not (todo and progress)) as bar:

        def keep(key: str, values: list[Any]) -> None:
            store.append(key, values)
            bar.update()

        work(todo, keep)
    done = done | store.load()
    if not items.keys() - share <= done.keys():
        if store.load_result() is None:
            logger.info("other processes have not finished their share; the last one writes the result")
        return None
    records = make_records(done)
    store.finish(records)
    return records
