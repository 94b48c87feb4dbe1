"""Preference records: the file formats, their readers and their checks. The only module that knows them.

A *text-scores* record (the reference's format) holds R >= 2 responses to one prompt, the higher score preferred:

    {"text": ["<prompt><sep><response>", ...], "scores": [1.0, 0.0, ...], "query_id": "...", "type": "apo"}

`query_id` and `type` are optional; `"type": "apo"` marks golden-over-sampled items. `prompt` / `chosen` / `rejected`
records, plain or conversational, are read too. For scoring (`--data_type reject_sample`) a record is
`{"query_id": ..., "query": "<prompt>", "sample_0": "<response>", ...}`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from apo.cli import BadField, InputError, describe, raise_bad_records
from apo.prompts import Prompt

SEPARATOR = "<sep>"
DATA_TYPES = ("comparison_pair", "reject_sample")
MAX_SCORE = 1e38  # the range of float32
CHUNK_SIZE = 2**20  # characters of a JSON list that are read at a time


# ------------------------------------------------------------------------------------------------ reading


def read_records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads a whole file; see `iter_records`."""
    return list(iter_records(path))


def iter_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a JSON list, JSON lines (either of them also as `.gz`) or a `.parquet` file, in flat memory.

    Yields:
        One (place, record) per record, in file order; the place is "record 3" (from 1), or "line 3" for JSON lines.

    Raises:
        InputError: no such file, empty or broken (with the position); after the last record, if any is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of an existing .json, .jsonl, .gz or .parquet file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; expected preference records")
    place, problems = None, []
    for place, record in _iter_parquet(path) if path.suffix == ".parquet" else _iter_json(path):
        if isinstance(record, dict):
            yield place, record
        else:
            problems.append(f"{place}: found {describe(record)}, expected an object")
    if place is None:
        raise InputError(f"{path}: the file holds no records; expected at least one")
    raise_bad_records(path, problems)


def _iter_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"record {number}", {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({error})") from error


def _open_text(path: Path) -> TextIO:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def _read_text(path: Path) -> str:
    try:
        with _open_text(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError, zlib.error, EOFError) as error:
        raise InputError(f"{path}: cannot be read as {'gzipped ' * (path.suffix == '.gz')}UTF-8 ({error})") from error


def _iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with _open_text(path) as file:
            while (first := file.read(1)).isspace():
                pass
            if not first:
                raise InputError(f"{path}: the file is empty; expected preference records")
            yield from _iter_list(path, file) if first == "[" else _iter_lines(path, file)
    except (OSError, UnicodeDecodeError, zlib.error, EOFError):
        _read_text(path)  # says where in the file; `file` knows the position in its buffer only
        raise


def _iter_lines(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"line {number}", _loads(path, line, first_line=number)


def _iter_list(path: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    """Decodes the rest of a JSON list, behind its "[", item by item."""
    buffer, start, mark, number = "", 0, ",", 0
    while mark == ",":
        if item := _decode_item(buffer, start):
            record, mark, start = item
            number += 1
            yield f"record {number}", record
        elif more := file.read(max(CHUNK_SIZE, len(buffer) - start)):
            buffer, start = buffer[start:] + more, 0
        else:
            break
    if mark == "," or (buffer[start:] + file.read()).strip():
        records = _loads(path, _read_text(path))  # raises, with the position in the whole text
        assert not records, f"{number} of {len(records)} records were read one by one"


def _decode_item(buffer: str, start: int) -> tuple[Any, str, int] | None:
    """Returns an item of a list, the mark behind it and where that ends, or None if they are not all there.

    Without the mark, the 1 of a 12 that continues in the next chunk would be an item.
    """
    skip_space = re.compile(r"[ \t\n\r]*").match
    try:
        item, end = json.JSONDecoder().raw_decode(buffer, skip_space(buffer, start).end())
    except (ValueError, RecursionError):
        return None
    end = skip_space(buffer, end).end()
    mark = buffer[end : end + 1]
    return (item, mark, end + 1) if mark and mark in ",]" else None


def _loads(path: Path, text: str, first_line: int = 1) -> Any:
    expected = "expected a JSON list of records, or one record per line"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1} column {error.colno}"
        raise InputError(f"{path}: broken JSON at {place}: {error.msg}; {expected}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise InputError(f"{path}: unreadable JSON ({error}); {expected}") from error


# ------------------------------------------------------------------------------------------------ validating


@dataclass(slots=True)
class PreferenceRecord:
    """R responses, each with its prompt (the same one, as a rule) and its preference score (higher is better)."""

    prompts: list[str]
    responses: list[str]
    scores: list[float]
    query_id: str
    answer_keys: list[str]
    is_apo: bool = False


def load_preference_data(path: str | Path, data_type: str, add_sep_token: bool = False) -> list[PreferenceRecord]:
    """Reads and validates a whole file; see `iter_preference_data`."""
    return list(iter_preference_data(path, data_type, add_sep_token))


def iter_preference_data(path: str | Path, data_type: str, add_sep_token: bool = False) -> Iterator[PreferenceRecord]:
    """Reads and validates a file record by record, in flat memory.

    Args:
        path: `.json`, `.jsonl`, `.gz` of these, or `.parquet`.
        data_type: `comparison_pair` (text-scores or prompt / chosen / rejected records) or `reject_sample`.
        add_sep_token: whether every text must hold one `<sep>`; without it a text that has none is one whole sequence.

    Yields:
        The records, in file order; none behind a bad one, so that no work goes into a file that will be refused.

    Raises:
        InputError: at the end of the file, one line that counts all bad records and shows the first five with place,
            field, found, expected; if some are no JSON objects, those alone.
    """
    assert data_type in DATA_TYPES, data_type
    problems = []
    for index, (place, raw) in enumerate(iter_records(path)):
        try:
            record = parse_record(raw, data_type, str(index), add_sep_token)
        except BadField as error:
            problems.append(f"{place}: {error}")
        if not problems:
            yield record
    raise_bad_records(path, problems)


def require(raw: dict[str, Any], field: str, expected: str) -> Any:
    """Returns a field of a record; raises `BadField` if it is not there."""
    if field not in raw:
        raise BadField(field, f"no such field (the record has {', '.join(raw) or 'none'})", expected)
    return raw[field]


def _check_text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadField(field, describe(value), "a non-empty string")
    return _check_unicode(field, value)


def _check_unicode(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(field, f"half a surrogate pair at character {error.start + 1}", "valid Unicode") from error
    return value


def require_text(raw: dict[str, Any], field: str) -> str:
    """Returns a field that must hold a non-empty string; raises `BadField` otherwise."""
    return _check_text(field, require(raw, field, "a non-empty string"))


def require_string(raw: dict[str, Any], field: str) -> str:
    """Returns a field that must hold a string, which may be empty; raises `BadField` otherwise."""
    value = require(raw, field, "a string")
    if not isinstance(value, str):
        raise BadField(field, describe(value), "a string")
    return _check_unicode(field, value)


def _require_list(raw: dict[str, Any], field: str, expected: str) -> list[Any]:
    value = require(raw, field, expected)
    if not isinstance(value, list):
        raise BadField(field, describe(value), expected)
    return value


def require_query_id(raw: dict[str, Any], default: str | None = None) -> str:
    """Returns the query id as a string; raises `BadField` if it is none, or absent without a default."""
    query_id = (
        require(raw, "query_id", "a non-empty string or an integer")
        if default is None
        else raw.get("query_id", default)
    )
    if isinstance(query_id, bool) or not isinstance(query_id, (str, int)) or query_id == "":
        raise BadField("query_id", describe(query_id), "a non-empty string or an integer")
    return _check_unicode("query_id", str(query_id))


def _split_text(field: str, text: str, add_sep_token: bool) -> tuple[str, str]:
    """Splits "<prompt><sep><response>"; a text without `<sep>` is a response to no prompt."""
    parts = text.split(SEPARATOR)
    if len(parts) == 2:
        return parts[0], parts[1]
    if len(parts) > 2:
        raise BadField(field, f"{len(parts) - 1} {SEPARATOR}", f"one {SEPARATOR} between prompt and response")
    if add_sep_token:
        raise BadField(field, f"no {SEPARATOR}", f"one {SEPARATOR}, or a run without --add_sep_token")
    return "", text


def parse_record(
    raw: dict[str, Any], data_type: str, default_id: str, add_sep_token: bool = False
) -> PreferenceRecord:
    """Validates one record; arguments as in `iter_preference_data`, and the id of a record that has none.

    Raises:
        BadField: the first field that is wrong.
    """
    return _parse_answers(raw) if data_type == "reject_sample" else _parse_preference(raw, default_id, add_sep_token)


def _parse_preference(raw: dict[str, Any], default_id: str, add_sep_token: bool) -> PreferenceRecord:
    if "text" not in raw and ("chosen" in raw or "rejected" in raw):
        texts, scores = _pair_texts(raw), [1.0, 0.0]
    else:
        texts = _require_list(raw, "text", "a list of at least two texts")
        scores = _require_list(raw, "scores", "a list of numbers, one for each text")
    if len(texts) < 2:
        raise BadField("text", f"{len(texts)} response(s)", "at least two")
    if len(scores) != len(texts):
        raise BadField("scores", f"{len(scores)} scores", f"{len(texts)}, one for each text")
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= MAX_SCORE:
            raise BadField(f"scores[{i}]", describe(score), f"a finite number, at most {MAX_SCORE:g} in size")
    splits = [
        _split_text(f"text[{i}]", _check_text(f"text[{i}]", text), add_sep_token) for i, text in enumerate(texts)
    ]
    return PreferenceRecord(
        prompts=[prompt for prompt, _ in splits],
        responses=[response for _, response in splits],
        scores=[float(score) for score in scores],
        query_id=require_query_id(raw, default_id),
        answer_keys=[str(i) for i in range(len(texts))],
        is_apo=raw.get("type") == "apo",
    )


def _pair_texts(raw: dict[str, Any]) -> list[str]:
    """The two texts of a prompt / chosen / rejected record, chosen first."""
    if isinstance(raw.get("chosen"), list):
        dialogues = [_require_list(raw, field, "a list of messages") for field in ("chosen", "rejected")]
        prompt = raw.get("prompt", [])
        return [_render_dialogue(prompt, dialogue) for dialogue in dialogues]
    chosen, rejected = require_text(raw, "chosen"), require_text(raw, "rejected")
    if "prompt" not in raw:
        return [chosen, rejected]
    prompt = require_text(raw, "prompt")
    return [prompt + SEPARATOR + chosen, prompt + SEPARATOR + rejected]


def _render_dialogue(prompt: Any, dialogue: list[Any]) -> str:
    """Messages in the Helpful&Harmless form: "\\n\\nHuman: ...\\n\\nAssistant:<sep> <last answer>"."""
    if not isinstance(prompt, list):
        raise BadField("prompt", describe(prompt), "a list of messages, as in chosen and rejected")
    roles = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\nSystem: "}
    messages = prompt + dialogue
    for message in messages:
        if not (
            isinstance(message, dict)
            and message.get("role") in tuple(roles)
            and isinstance(message.get("content"), str)
        ):
            expected = "a message with a role (user, assistant, system) and a content string"
            raise BadField("chosen/rejected", describe(message), expected)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadField("chosen/rejected", "no assistant message at the end", "one")
    context = "".join(roles[m["role"]] + m["content"] for m in messages[:-1])
    return f"{context}\n\nAssistant:{SEPARATOR} {messages[-1]['content']}"


def is_answer_key(key: str) -> bool:
    """Whether a field of a `reject_sample` record holds an answer to score."""
    return key.startswith(("sample_", "ans_")) or "gpt4" in key


def _parse_answers(raw: dict[str, Any]) -> PreferenceRecord:
    query_id, query = require_query_id(raw), require_text(raw, "query")
    keys = [key for key in raw if is_answer_key(key)]
    if not keys:
        raise BadField("sample_0", f"no answer (the record has {', '.join(raw)})", "fields sample_0, sample_1, ...")
    return PreferenceRecord(
        prompts=[query] * len(keys),
        responses=[require_string(raw, key) for key in keys],
        scores=[0.0] * len(keys),
        query_id=query_id,
        answer_keys=keys,
    )


def load_prompts(path: str | Path, data_type: str | None = None) -> list[Prompt]:
    """Reads the prompts of a file.

    Args:
        path: `.json`, `.jsonl`, `.gz` of these, or `.parquet`.
        data_type: `comparison_pair` (the prompt is what stands before `<sep>`) or `reject_sample` (records with a
            `query`); None: the first record tells.

    Raises:
        InputError: bad records, or an id that occurs twice: later stages tell prompts apart by their ids.
    """
    placed = read_records(path)
    has_query = data_type == "reject_sample" or (data_type is None and "query" in placed[0][1])
    prompts, problems = [], []
    for index, (place, raw) in enumerate(placed):
        try:
            if has_query:
                prompts.append(Prompt(place, require_query_id(raw, str(index)), require_text(raw, "query")))
            else:
                record = parse_record(raw, "comparison_pair", str(index))
                prompts.append(Prompt(place, record.query_id, record.prompts[0]))
        except BadField as error:
            problems.append(f"{place}: {error}")
    raise_bad_records(path, problems)
    first: dict[str, str] = {}
    for prompt in prompts:
        if not prompt.query.strip():
            problems.append(f"{prompt.place}: found no prompt, expected <prompt>{SEPARATOR}<response>")
        if prompt.query_id in first:
            problems.append(
                f"{prompt.place}: found the id {prompt.query_id}, which {first[prompt.query_id]} has too, "
                "expected one record a prompt"
            )
        first.setdefault(prompt.query_id, prompt.place)
    raise_bad_records(path, problems)
    return prompts
