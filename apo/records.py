"""Record types, file formats, readers and checks. A new format or a new kind of record goes here.

A **text-scores** record (the reference's format) holds R >= 2 responses to one prompt, the higher score preferred:

    {"text": ["<prompt><sep><response>", ...], "scores": [1.0, 0.0, ...], "query_id": "...", "type": "apo"}

`query_id` and `type` are optional; `"type": "apo"` marks golden-over-sampled records. `prompt` / `chosen` / `rejected`
records, plain or conversational, are read as text-scores records of two responses.

A **query** record holds responses without scores: `{"query_id", "query", "sample_0": "<response>", ...}` (sampled) or
`{"query_id", "query", "golden": "<response>"}` (golden). **Rewards** are `{"<query_id>:<response key>": reward}`.
A field that is null is absent; one that nothing reads is named in `PreferenceRecord.remarks`.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from apo.cli import BadField, InputError, describe, raise_bad_records
from apo.prompts import DOUBTS, REASONING_TAG, ROLES, Prompt, find_doubts, normalize_space

logger = logging.getLogger(__name__)

SEPARATOR = "<sep>"
DATA_TYPES = ("comparison_pair", "reject_sample")  # values of --data_type; `parse_record` explains all kinds
MAX_SCORE = 1e38  # the range of float32
SIDES = ("chosen", "rejected")
RESPONSE_KEY = re.compile(r"(sample|ans)_[0-9]+")
PROMPT_FIELD = re.compile(  # of other formats: can hold the prompt or a part of it
    r"(?i)(\w+_)?(prompt|instruction|input|question|query|system|messages?|context|history|dialog(ue)?|conversations?|post)"
)
MESSAGES_AS_TEXT = re.compile(  # JSON or Python: an object with role and content, or a list of such
    r"""(?s)\s*(array\()?\[?\s*\{(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value)["']\s*:).*[\]})]\s*"""
)

T = TypeVar("T")
Parser = Callable[[dict[str, Any], str], T]  # (record, id to use if it has none) -> result; raises `BadField`


def iter_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Reads a JSON list, JSON lines (both also as `.gz`) or a `.parquet` file. Only a JSON list is read at once.

    Yields:
        (place, record) in file order; the place is "record 3" (counted from 1), or "line 3" for JSON lines.

    Raises:
        InputError: no such file, empty or broken (with the position).
    """
    path = Path(path)
    if not path.is_file():
        found = "found a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}; give the path of an existing .json, .jsonl, .gz or .parquet file")
    place = None
    for place, record in _iter_parquet(path) if path.suffix == ".parquet" else _iter_json(path):
        yield place, record
    if place is None:
        raise InputError(f"{path}: the file is empty or holds no records; expected at least one")


def _iter_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"record {number}", row
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
    try:
        text = data.decode("utf-8-sig")
        del data  # a long list needs the memory
        return JSON_DECODER.decode(text)
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        problem = f"line {line} cannot be read as UTF-8 ({error})"
    except json.JSONDecodeError as error:
        problem = f"broken JSON at line {first_line + error.lineno - 1} column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        problem = f"unreadable JSON ({error})"
    raise InputError(f"{path}: {problem}; expected a JSON list of records, or one record per line")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of JSON; a key that comes twice gets a value that no field may have."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        record |= {key: {"two values under one key": None} for key in record if counts[key] > 1}
    return record


JSON_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


@dataclasses.dataclass(slots=True)
class PreferenceRecord:
    """R responses, each with its prompt (the same but for spaces) and its score (higher is better; 0 if unknown)."""

    prompts: list[str]
    responses: list[str]
    scores: list[float]
    query_id: str
    response_keys: list[str]
    is_apo: bool = False
    place: str = ""  # "record 3" or "line 3" of its file
    remarks: list[str] = dataclasses.field(default_factory=list)  # fields that are not read, and keys of `DOUBTS`


def log_remarks(path: str | Path, remarks: Iterable[list[str]]) -> None:
    """Logs the remarks on the records of a file in one warning, with the number of records."""
    if counts := Counter(remark for found in remarks for remark in found):
        text = "; ".join(f"{DOUBTS.get(remark, remark)} ({count})" for remark, count in counts.items())
        logger.warning("%s: number of records with: %s", path, text)


def iter_valid(
    path: str | Path, parse: Parser[T], *, unique_ids: bool = False, problems: list[str] | None = None
) -> Iterator[tuple[str, T]]:
    """Yields (place, result) of each record until the first bad one.

    Args:
        path: see `iter_records`.
        unique_ids: whether a repeated `query_id` is bad.
        problems: gets the place, field, found and expected of each bad record; with it good ones after a bad one are
            yielded too, and bad ones are no error.

    Raises:
        InputError: at the end of the file, one line that counts all bad records and shows the first five.
    """
    bad = [] if problems is None else problems
    first_places: dict[str, str] = {}
    for index, (place, raw) in enumerate(iter_records(path)):
        if not isinstance(raw, dict):
            bad.append(f"{place}: found {describe(raw)}, expected an object")
            continue
        try:
            result = parse(raw, str(index))
            if unique_ids and (first := first_places.setdefault(result.query_id, place)) != place:
                raise BadField("query_id", f"{describe(result.query_id)}, which {first} has too", "one record per id")
        except BadField as error:
            bad.append(f"{place}: {error}")
            continue
        if problems is not None or not bad:
            yield place, result
    if problems is None:
        raise_bad_records(path, bad)


def iter_preference_data(
    path: str | Path, kind: str, add_sep_token: bool = False, response_keys: Iterable[str] = ()
) -> Iterator[PreferenceRecord]:
    """Reads and validates a file record by record; see `parse_record` for the arguments, `iter_valid` for the errors.

    The query ids of all kinds but `comparison_pair` must be unique: rewards and golden responses are matched by them.
    """
    parse = functools.partial(parse_record, kind=kind, add_sep_token=add_sep_token, response_keys=response_keys)
    for place, record in iter_valid(path, parse, unique_ids=kind != "comparison_pair"):
        record.place = place
        yield record


def load_preference_data(path: str | Path, kind: str, add_sep_token: bool = False) -> list[PreferenceRecord]:
    """Reads and validates a whole file, with its warnings; see `iter_preference_data`."""
    records = list(iter_preference_data(path, kind, add_sep_token))
    log_remarks(path, (record.remarks for record in records))
    return records


def load_prompts(path: str | Path, data_type: str | None = None) -> list[Prompt]:
    """Reads the prompts of a file; the query id of each must be its own.

    Args:
        path: see `iter_records`.
        data_type: `comparison_pair` (the prompt is the text before `<sep>`) or `reject_sample` (records with a
            `query`; id and responses are optional); None: the kind of the first record.
    """

    def parse(raw: dict[str, Any], default_id: str) -> PreferenceRecord:
        nonlocal data_type
        data_type = data_type or record_kind(raw)
        kind = "comparison_pair" if data_type == "comparison_pair" else "query"
        record = parse_record(raw, default_id, kind=kind)
        if not record.prompts[0].strip():
            raise BadField("text" if "text" in raw else "prompt", "no prompt", f"one, in a text before {SEPARATOR}")
        return record

    placed = list(iter_valid(path, parse, unique_ids=True))
    log_remarks(path, (record.remarks for _, record in placed))
    return [Prompt(place, record.query_id, record.prompts[0]) for place, record in placed]


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
    if raw.get("query") is None or {"text", *SIDES} & raw.keys():
        return "comparison_pair"
    return "golden" if raw.get("golden") is not None else "reject_sample"


def find_response_keys(raw: dict[str, Any], more: Iterable[str] = (), samples_only: bool = False) -> list[str]:
    """Returns the fields of a query record that hold its responses.

    These are `sample_<number>`, `ans_<number>` and those that `more` names, in the order of the record. With
    `samples_only` they are `sample_<number>` in numeric order: golden responses are paired with exactly these.
    """
    keys = [key for key in raw if RESPONSE_KEY.fullmatch(key) or key in more]
    if samples_only:
        keys = sorted((k for k in keys if k.startswith("sample_")), key=lambda k: int(k.removeprefix("sample_")))
    if not keys:
        raise BadField("sample_0", f"no response among {', '.join(raw)}", "sample_0, ..., or --response_keys")
    return keys


def parse_record(
    raw: dict[str, Any], default_id: str, *, kind: str, add_sep_token: bool = False, response_keys: Iterable[str] = ()
) -> PreferenceRecord:
    """Validates one record (a JSON object); raises `BadField` for the first field that is wrong.

    Args:
        default_id: query id of a `comparison_pair` or a `query` that has none.
        kind: `comparison_pair` (text-scores or prompt / chosen / rejected), `reject_sample` (responses to score),
            `golden` or `sampled` (responses to make pairs of, so that their query must not contain `<sep>`), `query`.
        add_sep_token: whether every text of a `comparison_pair` must hold one `<sep>`; without it a text that has none
            is one whole sequence.
        response_keys: see `find_response_keys`; for `reject_sample`.
    """
    assert kind in (*DATA_TYPES, "golden", "sampled", "query"), kind
    raw = {key: value for key, value in raw.items() if value is not None or RESPONSE_KEY.fullmatch(key)}
    if kind == "comparison_pair":
        return _parse_preference(raw, default_id, add_sep_token)
    query_id, query = _require_query_id(raw, default_id if kind == "query" else None), _require_text(raw, "query")
    if kind in ("golden", "sampled"):
        _forbid_separator("query", query)
    keys = {"golden": ["golden"], "query": []}
    keys = keys[kind] if kind in keys else find_response_keys(raw, response_keys, kind == "sampled")
    responses = [_check_unicode(key, _require(raw, key, "a string", str)) for key in keys]
    record = PreferenceRecord([query] * max(len(keys), 1), responses, [0.0] * len(keys), query_id, keys)
    record.remarks = _passed_over(raw, ["query", "golden", *keys, *filter(RESPONSE_KEY.fullmatch, raw)])
    record.remarks += ["reasoning_in_responses"] * any(map(REASONING_TAG.search, responses))
    return record


def _parse_preference(raw: dict[str, Any], default_id: str, add_sep_token: bool) -> PreferenceRecord:
    sides = [side for side in SIDES if side in raw]
    if sides and ("text" in raw or "scores" in raw):
        raise BadField(sides[0], "text or scores beside it", "either text and scores, or chosen and rejected")
    texts, scores = (_split_pair(raw, add_sep_token), [1.0, 0.0]) if sides else _split_text_scores(raw, add_sep_token)
    prompts, responses = map(list, zip(*texts.values(), strict=True))
    first, *others = texts
    for field, prompt in zip(others, prompts[1:], strict=True):
        if prompt != prompts[0] and normalize_space(prompt) != normalize_space(prompts[0]):
            raise BadField(field, f"another prompt, {describe(prompt)}", f"that of {first}, {describe(prompts[0])}")
    keys, kind = [str(i) for i in range(len(texts))], raw.get("type", "human")
    if kind not in ("apo", "human"):
        raise BadField("type", describe(kind), '"apo" (golden over sampled), "human", or no such field')
    record = PreferenceRecord(prompts, responses, scores, _require_query_id(raw, default_id), keys, kind == "apo")
    record.remarks = _passed_over(raw, ["type", *(("prompt", *SIDES) if sides else ("text", "scores"))])
    record.remarks += find_doubts(prompts[0], responses, scores)
    return record


def _passed_over(raw: dict[str, Any], known: list[str]) -> list[str]:
    """Names the fields of a record and of its messages that hold something and are not read."""
    rest = {key: value for key, value in raw.items() if key not in known and key != "query_id"}
    for field in (field for field in known if field in ("prompt", *SIDES) and isinstance(raw.get(field), list)):
        rest |= {f"{field}[].{k}": m[k] for m in raw[field] for k in m if k not in ("role", "content")}
    advice = ", which the model could read as a part of the prompt"
    names = [key for key, value in rest.items() if value not in (None, "", [], {})]
    return [f"field {name} passed over{advice if PROMPT_FIELD.fullmatch(name) else ''}" for name in names]


def _split_text_scores(raw: dict[str, Any], add_sep_token: bool) -> tuple[dict[str, tuple[str, str]], list[float]]:
    """Returns {field: (prompt, response)} and the scores of a text-scores record."""
    texts = _require(raw, "text", "a list of at least two texts, or chosen and rejected", list)
    scores = _require(raw, "scores", "a list of numbers, one for each text", list)
    if len(texts) < 2:
        raise BadField("text", f"{len(texts)} response(s)", "at least two")
    if len(scores) != len(texts):
        raise BadField("scores", f"{len(scores)} scores", f"{len(texts)}, one for each text")
    scores = [_check_number(f"scores[{i}]", score) for i, score in enumerate(scores)]
    return _split_texts(raw, {f"text[{i}]": text for i, text in enumerate(texts)}, add_sep_token), scores


def _split_texts(raw: dict[str, Any], texts: dict[str, Any], add_sep_token: bool) -> dict[str, tuple[str, str]]:
    """Splits each "<prompt><sep><response>" of {field: text}; a text without `<sep>` is a response to no prompt."""
    parts = {field: _require_text(texts, field).split(SEPARATOR) for field in texts}
    names = filter(PROMPT_FIELD.fullmatch, raw if max(map(len, parts.values())) == 1 else ())
    if holders := [name for name in names if isinstance(raw[name], (str, list, dict)) and raw[name]]:
        expected = f'it in "prompt" beside chosen and rejected, or before {SEPARATOR} in each text'
        raise BadField(", ".join(holders), "what can be the prompt, but is not read here", expected)
    for field, part in parts.items():
        if len(part) > 2:
            raise BadField(field, f"{len(part) - 1} {SEPARATOR}", f"one {SEPARATOR} between prompt and response")
        if len(part) < 2 and add_sep_token:
            ways = 'a field "prompt", or a run' if field in SIDES else "or a run"
            raise BadField(field, f"no {SEPARATOR}", f"one {SEPARATOR}, {ways} without --add_sep_token")
    return {field: ("", *part)[-2:] for field, part in parts.items()}


def parse_plain_pair(raw: dict[str, Any], default_id: str = "") -> tuple[str, str]:
    """Returns the texts `chosen` and `rejected`; raises `BadField` if one is not a non-empty string."""
    return _require_text(raw, "chosen"), _require_text(raw, "rejected")


def _split_pair(raw: dict[str, Any], add_sep_token: bool) -> dict[str, tuple[str, str]]:
    """Returns {side: (prompt, response)}."""
    for name in ("score_{}", "{}_score", "rating_{}", "{}_rating"):
        scores = [raw.get(name.format(side)) for side in SIDES]
        if all(isinstance(score, (int, float)) for score in scores) and scores[0] < scores[1]:
            raise BadField(name.format("chosen"), f"{scores[0]:g}", f"no less than rejected has, {scores[1]:g}")
    if isinstance(raw.get("chosen"), list):
        return {side: _split_dialogue(raw, side) for side in SIDES}
    texts = dict(zip(SIDES, parse_plain_pair(raw), strict=True))
    if "prompt" not in raw:
        return _split_texts(raw, texts, add_sep_token)
    prompt = _forbid_separator("prompt", _require_text(raw, "prompt"))
    return {side: (prompt, _forbid_separator(side, text)) for side, text in texts.items()}


def _split_dialogue(raw: dict[str, Any], side: str) -> tuple[str, str]:
    """Renders messages in the Helpful&Harmless form: ("\\n\\nHuman: ...\\n\\nAssistant:", " <last response>")."""
    dialogue, prompt = _require(raw, side, "a list of messages", list), raw.get("prompt", [])
    turns = [_render_message(f"{side}[{i}]", message) for i, message in enumerate(dialogue)]
    if not dialogue or dialogue[-1]["role"] != "assistant":
        raise BadField(side, "no assistant message at the end", "a last message whose role is assistant")
    if prompt not in ([message["content"] for message in dialogue[:-1]]):  # a text that repeats a message
        messages = _require({"prompt": prompt}, "prompt", f"a list of messages, or the text of one in {side}", list)
        if messages != dialogue[: len(messages)]:
            turns = [_render_message(f"prompt[{i}]", message) for i, message in enumerate(messages)] + turns
    if len(turns) < 2:
        raise BadField(side, "one message", 'the messages of the prompt before it, or in "prompt"')
    return "".join(turns[:-1]) + "\n\nAssistant:", turns[-1].removeprefix("\n\nAssistant:")


def _render_message(field: str, message: Any) -> str:
    if not isinstance(message, dict):
        raise BadField(field, describe(message), "a message, which is an object with role and content")
    names = {role: name for name, role in ROLES.items()}
    if message.get("role") not in tuple(names):
        raise BadField(f"{field}.role", describe(message.get("role")), "user, assistant or system")
    text = _require_text({f"{field}.content": message.get("content")}, f"{field}.content")
    return f"\n\n{names[message['role']]}: {_forbid_separator(f'{field}.content', text)}"


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
    if MESSAGES_AS_TEXT.fullmatch(text):
        raise BadField(field, f"messages as one text, {describe(text)}", "a list of messages")
    return _check_unicode(field, text)


def _forbid_separator(field: str, text: str) -> str:
    if SEPARATOR in text:
        raise BadField(field, f"a text with {SEPARATOR}", f"a text without {SEPARATOR}, which is added after a prompt")
    return text


def _check_unicode(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(field, f"an unpaired surrogate at character {error.start + 1}", "valid Unicode") from error
    return value


def _check_number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_SCORE:
        raise BadField(field, describe(value), f"a finite number, at most {MAX_SCORE:g} in size")
    return value
