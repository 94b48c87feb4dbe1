"""Record types, file formats, readers and checks. A new format or a new kind of record goes here.

A **text-scores** record (the reference's format) holds R >= 2 responses to one prompt, the higher score preferred:

    {"text": ["<prompt><sep><response>", ...], "scores": [1.0, 0.0, ...], "query_id": "...", "type": "apo"}

`query_id` and `type` are optional; `"type": "apo"` marks golden-over-sampled records. `prompt` / `chosen` / `rejected`
records, plain or conversational, are read as text-scores records of two responses.

A **query** record holds responses without scores: `{"query_id", "query", "sample_0": "<response>", ...}` (sampled) or
`{"query_id", "query", "golden": "<response>"}` (golden). **Rewards** are `{"<query_id>:<response key>": reward}`.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from apo.cli import BadField, InputError, describe, raise_bad_records
from apo.prompts import ROLES, Prompt

SEPARATOR = "<sep>"
DATA_TYPES = ("comparison_pair", "reject_sample")  # values of --data_type; `parse_record` explains all kinds
MAX_SCORE = 1e38  # the range of float32

T = TypeVar("T")
Parser = Callable[[dict[str, Any], str], T]  # (record, id to use if it has none) -> result; raises `BadField`


def iter_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a JSON list, JSON lines (both also as `.gz`) or a `.parquet` file. Only a JSON list is read at once.

    Yields:
        (place, record) in file order; the place is "record 3" (counted from 1), or "line 3" for JSON lines.

    Raises:
        InputError: no such file, empty or broken (with the position); at the end, if a record is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of an existing .json, .jsonl, .gz or .parquet file")
    place, problems = None, []
    for place, record in _iter_parquet(path) if path.suffix == ".parquet" else _iter_json(path):
        if isinstance(record, dict):
            yield place, record
        else:
            problems.append(f"{place}: found {describe(record)}, expected an object")
    if place is None:
        raise InputError(f"{path}: the file is empty or holds no records; expected at least one")
    raise_bad_records(path, problems)


def _iter_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"record {number}", {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({error})") from error


def _iter_json(path: Path) -> Iterator[tuple[str, Any]]:
    is_gzip = path.suffix == ".gz"
    try:
        with (gzip.open if is_gzip else open)(path, "rb") as file:
            is_list = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            file.seek(0)
            if is_list:
                records = enumerate(_decode_json(path, file.read()), start=1)
                yield from ((f"record {number}", record) for number, record in records)
            else:
                lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
                yield from ((f"line {number}", _decode_json(path, line.rstrip(), number)) for number, line in lines)
    except (OSError, zlib.error, EOFError) as error:
        raise InputError(f"{path}: cannot be read{' as gzip' * is_gzip} ({error})") from error


def _decode_json(path: Path, data: bytes, first_line: int = 1) -> Any:
    """Decodes JSON; `first_line` is the line of the file at which `data` starts, for the message."""
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(data)  # in half the memory of json, which decodes all text first
    try:  # json also reads byte order marks and NaN, and its errors give the line
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        problem = f"line {line} cannot be read as UTF-8 ({error})"
    except json.JSONDecodeError as error:
        problem = f"broken JSON at line {first_line + error.lineno - 1} column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        problem = f"unreadable JSON ({error})"
    raise InputError(f"{path}: {problem}; expected a JSON list of records, or one record per line")


@dataclasses.dataclass(slots=True)
class PreferenceRecord:
    """R responses, each with its prompt (normally the same one) and its score (higher is better; 0 if unknown)."""

    prompts: list[str]
    responses: list[str]
    scores: list[float]
    query_id: str
    response_keys: list[str]
    is_apo: bool = False
    place: str = ""  # "record 3" or "line 3" of its file


def iter_parsed(path: str | Path, parse: Parser[T]) -> Iterator[tuple[str, T | BadField]]:
    """Yields (place, result) for each record of a file; for a bad one (place, `BadField`), and continues."""
    for index, (place, raw) in enumerate(iter_records(path)):
        try:
            result = parse(raw, str(index))
        except BadField as error:
            result = error
        yield place, result


def iter_valid(path: str | Path, parse: Parser[T], unique_ids: bool = False) -> Iterator[tuple[str, T]]:
    """Yields (place, result) until the first bad record; with `unique_ids`, a repeated `query_id` is bad.

    Raises:
        InputError: at the end of the file, one line that counts all bad records and shows the first five with place,
            field, found, expected; if some are not JSON objects, those alone.
    """
    problems: list[str] = []
    first_places: dict[str, str] = {}
    for place, result in iter_parsed(path, parse):
        if unique_ids and not isinstance(result, BadField):
            first = first_places.setdefault(result.query_id, place)
            if first != place:
                found = f"{describe(result.query_id)}, which {first} has too"
                result = BadField("query_id", found, "one record per id")
        if isinstance(result, BadField):
            problems.append(f"{place}: {result}")
        elif not problems:
            yield place, result
    raise_bad_records(path, problems)


def iter_preference_data(path: str | Path, kind: str, add_sep_token: bool = False) -> Iterator[PreferenceRecord]:
    """Reads and validates a file record by record; see `parse_record` for the arguments, `iter_valid` for the errors.

    The query ids of all kinds but `comparison_pair` must be unique: rewards and golden responses are matched by them.
    """
    parse = functools.partial(parse_record, kind=kind, add_sep_token=add_sep_token)
    for place, record in iter_valid(path, parse, unique_ids=kind != "comparison_pair"):
        record.place = place
        yield record


def load_preference_data(path: str | Path, kind: str, add_sep_token: bool = False) -> list[PreferenceRecord]:
    """Reads and validates a whole file; see `iter_preference_data`."""
    return list(iter_preference_data(path, kind, add_sep_token))


def load_prompts(path: str | Path, data_type: str | None = None) -> list[Prompt]:
    """Reads the prompts of a file; the query id of each must be its own.

    Args:
        path: see `iter_records`.
        data_type: `comparison_pair` (the prompt is the text before `<sep>`) or `reject_sample` (records with a
            `query`; id and responses are optional); None: the kind of the first record.
    """
    kind = data_type

    def parse(raw: dict[str, Any], default_id: str) -> Prompt:
        nonlocal kind
        kind = kind or record_kind(raw)
        if kind != "comparison_pair":
            return Prompt("", _require_query_id(raw, default_id), _require_text(raw, "query"))
        record = _parse_preference(raw, default_id)
        if not record.prompts[0].strip():
            raise BadField("text", "no prompt", f"<prompt>{SEPARATOR}<response>")
        return Prompt("", record.query_id, record.prompts[0])

    return [dataclasses.replace(prompt, place=place) for place, prompt in iter_valid(path, parse, unique_ids=True)]


def load_rewards(path: str | Path) -> dict[str, float]:
    """Returns "<query_id>:<response key>" -> reward, in the order of a file that scoring wrote."""
    rewards: dict[str, float] = {}
    for place, new in iter_valid(path, lambda raw, _: {key: _check_number(key, raw[key]) for key in raw}):
        if repeated := rewards.keys() & new.keys():
            raise InputError(f"{path}: {place}: {BadField(min(repeated), 'a second reward', 'one per response')}")
        rewards |= new
    return rewards


def record_kind(raw: dict[str, Any]) -> str:
    """Returns the kind of a record by its fields: `comparison_pair`, `golden` or `reject_sample`."""
    if "query" not in raw:
        return "comparison_pair"
    return "golden" if "golden" in raw else "reject_sample"


def response_keys(raw: dict[str, Any], numbered_only: bool = False) -> list[str]:
    """Returns the fields of a query record that hold its responses.

    By default these are all fields that can be scored: those that start with `sample_` or `ans_` or contain `gpt4`, in
    the order of the record. With `numbered_only` they are `sample_<number>` in numeric order, and any other `sample_`
    field is an error: the reference pairs golden responses with exactly these.
    """
    keys = [key for key in raw if key.startswith(("sample_", "ans_")) or "gpt4" in key]
    if numbered_only:
        keys = [key for key in keys if key.startswith("sample_")]
        for key in keys:
            if not key.removeprefix("sample_").isdecimal():
                raise BadField(key, "no number after sample_", "a field such as sample_0")
        keys.sort(key=lambda key: int(key.removeprefix("sample_")))
    if not keys:
        raise BadField("sample_0", f"no response (the record has {', '.join(raw)})", "fields sample_0, sample_1, ...")
    return keys


def parse_record(raw: dict[str, Any], default_id: str, *, kind: str, add_sep_token: bool = False) -> PreferenceRecord:
    """Validates one record (a JSON object); raises `BadField` for the first field that is wrong.

    Args:
        default_id: query id of a `comparison_pair` that has none.
        kind: `comparison_pair` (text-scores or prompt / chosen / rejected), `reject_sample` (responses to score),
            `golden` or `sampled` (responses to make pairs of, so that their query must not contain `<sep>`).
        add_sep_token: whether every text of a `comparison_pair` must hold one `<sep>`; without it a text that has none
            is one whole sequence.
    """
    assert kind in (*DATA_TYPES, "golden", "sampled"), kind
    if kind == "comparison_pair":
        return _parse_preference(raw, default_id, add_sep_token)
    query_id, query = _require_query_id(raw), _require_text(raw, "query")
    if kind != "reject_sample" and SEPARATOR in query:
        raise BadField("query", f"a text with {SEPARATOR}", f"a text without {SEPARATOR}, which is added after it")
    keys = ["golden"] if kind == "golden" else response_keys(raw, numbered_only=kind == "sampled")
    responses = [_check_unicode(key, _require(raw, key, "a string", str)) for key in keys]
    return PreferenceRecord([query] * len(keys), responses, [0.0] * len(keys), query_id, keys)


def _parse_preference(raw: dict[str, Any], default_id: str, add_sep_token: bool = False) -> PreferenceRecord:
    if "text" not in raw and ("chosen" in raw or "rejected" in raw):
        texts, scores = _pair_texts(raw), [1.0, 0.0]
    else:
        texts = _require(raw, "text", "a list of at least two texts", list)
        scores = _require(raw, "scores", "a list of numbers, one for each text", list)
    if len(texts) < 2:
        raise BadField("text", f"{len(texts)} response(s)", "at least two")
    if len(scores) != len(texts):
        raise BadField("scores", f"{len(scores)} scores", f"{len(texts)}, one for each text")
    scores = [_check_number(f"scores[{i}]", score) for i, score in enumerate(scores)]
    splits = [_split_text(f"text[{i}]", text, add_sep_token) for i, text in enumerate(texts)]
    prompts, responses = map(list, zip(*splits, strict=True))
    keys, is_apo = [str(i) for i in range(len(texts))], raw.get("type") == "apo"
    return PreferenceRecord(prompts, responses, scores, _require_query_id(raw, default_id), keys, is_apo)


def _split_text(field: str, text: Any, add_sep_token: bool) -> tuple[str, str]:
    """Splits "<prompt><sep><response>"; a text without `<sep>` is a response to no prompt."""
    prompt, *responses = _require_text({field: text}, field).split(SEPARATOR)
    if len(responses) > 1:
        raise BadField(field, f"{len(responses)} {SEPARATOR}", f"one {SEPARATOR} between prompt and response")
    if not responses and add_sep_token:
        raise BadField(field, f"no {SEPARATOR}", f"one {SEPARATOR}, or a run without --add_sep_token")
    return (prompt, responses[0]) if responses else ("", prompt)


def parse_plain_pair(raw: dict[str, Any], default_id: str = "") -> tuple[str, str]:
    """Returns the texts `chosen` and `rejected`; raises `BadField` if one is not a non-empty string."""
    return _require_text(raw, "chosen"), _require_text(raw, "rejected")


def _pair_texts(raw: dict[str, Any]) -> list[str]:
    """Returns the two texts of a prompt / chosen / rejected record, chosen first."""
    if isinstance(raw.get("chosen"), list):
        dialogues = [_require(raw, field, "a list of messages", list) for field in ("chosen", "rejected")]
        return [_render_dialogue(raw.get("prompt", []), dialogue) for dialogue in dialogues]
    prefix = _require_text(raw, "prompt") + SEPARATOR if "prompt" in raw else ""
    return [prefix + text for text in parse_plain_pair(raw)]


def _render_dialogue(prompt: Any, dialogue: list[Any]) -> str:
    """Renders messages in the Helpful&Harmless form: "\\n\\nHuman: ...\\n\\nAssistant:<sep> <last response>"."""
    if not isinstance(prompt, list):
        raise BadField("prompt", describe(prompt), "a list of messages, as in chosen and rejected")
    names = {role: name for name, role in ROLES.items()}
    messages = prompt + dialogue
    for message in messages:
        is_known = isinstance(message, dict) and message.get("role") in tuple(names)
        if not is_known or not isinstance(message.get("content"), str):
            expected = "a message with a role (user, assistant, system) and a content string"
            raise BadField("chosen/rejected", describe(message), expected)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadField("chosen/rejected", "no assistant message at the end", "one")
    context = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages[:-1])
    return f"{context}\n\nAssistant:{SEPARATOR} {messages[-1]['content']}"


def _require(raw: dict[str, Any], field: str, expected: str, expected_type: type = object) -> Any:
    if field not in raw:
        raise BadField(field, f"no such field (the record has {', '.join(raw) or 'none'})", expected)
    if not isinstance(raw[field], expected_type):
        raise BadField(field, describe(raw[field]), expected)
    return raw[field]


def _require_query_id(raw: dict[str, Any], default: str | None = None) -> str:
    expected = "a non-empty string or an integer"
    query_id = _require(raw, "query_id", expected) if default is None else raw.get("query_id", default)
    if isinstance(query_id, bool) or not isinstance(query_id, (str, int)) or query_id == "":
        raise BadField("query_id", describe(query_id), expected)
    return _check_unicode("query_id", str(query_id))


def _require_text(raw: dict[str, Any], field: str) -> str:
    text = _require(raw, field, "a non-empty string", str)
    if not text.strip():
        raise BadField(field, describe(text), "a non-empty string")
    return _check_unicode(field, text)


def _check_unicode(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(field, f"an unpaired surrogate at character {error.start + 1}", "valid Unicode") from error
    return value


def _check_number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_SCORE:
        raise BadField(field, describe(value), f"a finite number, at most {MAX_SCORE:g} in size")
    return float(value)
