"""Arrow files of tokenised records: made once, mapped by every process and by later runs, checked by a hash."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.cli import locked, replacing, sha256_of_file, write_json

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Rows = Iterable[dict[str, Any]]


def cache_path(cache_dir: str | None, folder: str, key: Any) -> Path:
    """Returns the path of the rows with this key, which is all that they depend on, as JSON holds it."""
    import datasets

    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE, folder, f"{name}.arrow")


def write_rows(path: Path, rows: Rows, features: datasets.Features) -> None:
    """Writes rows to an Arrow file, then its hash beside it."""
    from datasets.arrow_writer import ArrowWriter

    name = f"{path.stem}.{socket.gethostname()}.incomplete"  # the lock may not hold across machines
    with replacing(path, name) as temporary, ArrowWriter(path=str(temporary), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    write_json(path.with_suffix(".sha256"), {path.name: sha256_of_file(path)})


def is_whole(path: Path) -> bool:
    """Whether an Arrow file is there, as it was written."""
    try:
        return json.loads(path.with_suffix(".sha256").read_bytes()) == {path.name: sha256_of_file(path)}
    except (OSError, ValueError, RecursionError):
        return False


def cached_rows(
    path: Path, make_rows: Callable[[], Rows], features: datasets.Features, source: str | Path
) -> datasets.Dataset:
    """Returns the rows of an Arrow file; makes it first where it is missing or damaged.

    A file lock lets one process of the machine write it while the others wait.

    Args:
        path: of `cache_path`.
        make_rows: called at most once.
        features: the columns.
        source: the file that the rows are made from, for messages.
    """
    import datasets

    if not is_whole(path):
        with locked(path, wait=True):
            if not is_whole(path):  # another process has not made it in the meantime
                if path.exists():
                    logger.warning("%s: damaged, made again from %s", path, source)
                write_rows(path, make_rows(), features)
    return datasets.Dataset.from_file(str(path))
