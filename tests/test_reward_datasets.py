"""Preference data sets: tokens are made once, batches lose none of them."""

import logging
import socket

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, E2E, pair, write_records
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apo.cli import InputError
from apo.records import PreferenceRecord, load_preference_data
from apo.tokenizer import load_reward_tokenizer
from reward_datasets import (
    RewardDataCollator,
    build_sequence,
    load_preference_dataset,
    merge_training_data,
    name_datasets,
    normalize_scores,
    preferred_pairs,
    tokenize_records,
)

PAIRS = [pair(f"Question {i}?", f" answer {i}", " none", query_id=f"q{i}") for i in range(3)]
SETTINGS = {"max_length": 64, "truncation_side": "left", "add_sep_token": True}


@pytest.fixture(scope="module")
def tokenizer():
    return load_reward_tokenizer(str(CHECKPOINT))


# ------------------------------------------------------------------------------------------------ tokenising


def test_pairs_are_of_different_scores():
    assert preferred_pairs([0.5, 1.0, 0.5]) == [(1, 0), (1, 2)]


def test_sequence_is_bos_prompt_separator_response_eos(tokenizer):
    """bos 1, separator 4 and eos 2 around the given ids; 7 tokens cut to 5 lose the two of the chosen side."""
    cut = {"max_length": 5, "add_sep_token": True}
    whole = build_sequence([10, 11], [12, 13], tokenizer, truncation_side="left", **cut | {"max_length": 9})
    assert whole == [1, 10, 11, 4, 12, 13, 2]
    assert build_sequence([10, 11], [12, 13], tokenizer, truncation_side="left", **cut) == [11, 4, 12, 13, 2]
    assert build_sequence([10, 11], [12, 13], tokenizer, truncation_side="right", **cut) == [1, 10, 11, 4, 12]
    without = build_sequence([10], [12], tokenizer, truncation_side="left", max_length=9, add_sep_token=False)
    assert without == [1, 10, 12, 2]


def test_scores_are_normalised_into_the_open_unit_interval():
    """(s - 1 + 1e-5) / (3 - 1 + 2e-5) for 1, 2, 3; equal scores all become 1e-5 / 2e-5 = 1/2."""
    assert normalize_scores([1, 2, 3]) == pytest.approx([1e-5 / 2.00002, 0.5, 2.00001 / 2.00002], abs=1e-7)
    assert normalize_scores([4, 4]) == [0.5, 0.5]


NUMBERS = (
    st.floats(-1e38, 1e38) | st.integers(-(10**38), 10**38) | st.sampled_from([0.1, 0.1 + 1e-12, 2**53, 2**53 + 1])
)


@given(st.lists(NUMBERS, min_size=2, max_size=6))
@example([1e38, 1.0, 0.0])
@example([1700000001, 1700000000, 0])
def test_normalising_keeps_every_pair_and_makes_none(scores):
    """Also where float32 cannot hold the difference; penalties and time stamps are such scores."""
    normalised = normalize_scores(scores)
    assert all(0 <= score <= 1.00001 for score in normalised)
    assert preferred_pairs(np.float32(normalised).tolist()) == preferred_pairs(scores)


def load(path, tokenizer, **more):
    return load_preference_dataset(path, tokenizer, data_type="comparison_pair", **SETTINGS | more)


def test_rows_are_those_of_the_records(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.json", PAIRS)
    rows = list(load(path, tokenizer, cache_dir=str(tmp_path)))
    expected = list(tokenize_records(load_preference_data(path, "comparison_pair", True), tokenizer, **SETTINGS))
    assert len(rows) == 3
    for row, other in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(other.pop("scores"), abs=1e-7)
        assert {name: row[name] for name in other} == other


def test_second_run_does_not_tokenise_again(tmp_path, tokenizer, monkeypatch):
    path = write_records(tmp_path / "a.json", PAIRS)
    first = load(path, tokenizer, cache_dir=str(tmp_path))[:]

    def fail(self, texts):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("apo.tokenizer.RewardTokenizer.encode", fail)
    assert load(path, load_reward_tokenizer(str(CHECKPOINT)), cache_dir=str(tmp_path))[:] == first


@pytest.mark.parametrize("change", [{"max_length": 32}, {"truncation_side": "right"}, {"add_sep_token": False}])
def test_other_settings_do_not_take_the_cache_of_these(tmp_path, tokenizer, change):
    long = [pair("word " * 50, " yes", " no")]
    path = write_records(tmp_path / "a.json", long)
    first = load(path, tokenizer, cache_dir=str(tmp_path))[:]
    assert load(path, tokenizer, cache_dir=str(tmp_path), **change)[:]["input_ids"] != first["input_ids"]


def test_changed_file_or_tokenizer_does_not_take_the_old_cache(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.json", PAIRS)
    first = load(path, tokenizer, cache_dir=str(tmp_path))[:]
    other = load_reward_tokenizer(str(CHECKPOINT), backend="transformers")
    assert load(path, other, cache_dir=str(tmp_path))[:]["input_ids"] != first["input_ids"]
    write_records(path, PAIRS[:2])
    assert len(load(path, tokenizer, cache_dir=str(tmp_path))) == 2


def test_bad_records_stop_the_load_through_the_cache_too(tmp_path, tokenizer):
    """The rows of the first two batches are written by then; nothing of them stays."""
    path = write_records(tmp_path / "a.json", [pair()] * 1200 + [pair() | {"scores": [1]}])
    for _ in range(2):
        with pytest.raises(InputError, match='record 1201: field "scores"'):
            load(path, tokenizer, cache_dir=str(tmp_path))
    assert {file.suffix for file in (tmp_path / "preference_data").iterdir()} <= {".lock"}


def test_training_files_are_concatenated_in_order(tmp_path, tokenizer):
    paths = [write_records(tmp_path / name, records) for name, records in (("a.json", PAIRS[:1]), ("b.json", PAIRS))]
    merged = merge_training_data({str(path): load(path, tokenizer, cache_dir=str(tmp_path)) for path in paths})
    assert merged["query_id"][:] == ["q0", "q0", "q1", "q2"]


def test_training_file_of_equal_scores_is_refused(tmp_path, tokenizer):
    """A file with at least one preferred response is accepted."""
    paths = [tmp_path / "mixed.json", tmp_path / "equal.json"]
    write_records(paths[0], [pair(), pair() | {"scores": [1, 1]}])
    write_records(paths[1], [pair() | {"scores": [1, 1]}] * 2)
    parts = {str(path): load(path, tokenizer, cache_dir=str(tmp_path)) for path in paths}
    message = f'^{paths[1]}: field "scores": found equal scores within each of the 2 records, expected at least one'
    with pytest.raises(InputError, match=message):
        merge_training_data(parts)
    del parts[str(paths[1])]
    assert len(merge_training_data(parts)) == 2


def test_rows_of_several_batches_keep_the_order_of_the_file(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.json", [pair(f"Question {i % 7}?", query_id=i) for i in range(1200)])
    rows = load(path, tokenizer, cache_dir=str(tmp_path))
    assert rows["query_id"][:] == [str(i) for i in range(1200)]


def test_partial_cache_of_a_killed_run_is_not_used(tmp_path, tokenizer):
    path = write_records(tmp_path / "a.json", PAIRS)
    first = load(path, tokenizer, cache_dir=str(tmp_path))[:]
    [cached] = (tmp_path / "preference_data").glob("*.arrow")
    cached.with_suffix(f".{socket.gethostname()}.incomplete").write_bytes(cached.read_bytes()[:100])
    cached.unlink()
    assert load(path, tokenizer, cache_dir=str(tmp_path))[:] == first
    assert not cached.with_suffix(f".{socket.gethostname()}.incomplete").exists()


def flip_bit(path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x40
    path.write_bytes(data)


def copy_other(path) -> None:
    """Both files are those of another cache entry."""
    for suffix in (".arrow", ".sha256"):
        [other] = [file for file in path.parent.glob(f"*{suffix}") if file.stem != path.stem]
        path.with_suffix(suffix).write_bytes(other.read_bytes())


BITS = (0.05, 0.2, 0.35, 0.5, 0.7, 0.9)  # places of flipped bits, as shares of the file
DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    **{
        f"bit at {place}": lambda path, place=place: flip_bit(path, place)
        for place in (0.05, 0.2, 0.35, 0.5, 0.7, 0.9)
    },
    "other content": copy_other,
    "no hash": lambda path: path.with_suffix(".sha256").unlink(),
    "binary hash": lambda path: path.with_suffix(".sha256").write_bytes(b"\xff\xfe"),
    "deep hash": lambda path: path.with_suffix(".sha256").write_bytes(b"[" * 99999),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_cache_is_made_again(tmp_path, tokenizer, caplog, damage):
    path = write_records(tmp_path / "a.json", PAIRS)
    first = load(path, tokenizer, cache_dir=str(tmp_path))[:]
    [cached] = (tmp_path / "preference_data").glob("*.arrow")
    load(path, tokenizer, cache_dir=str(tmp_path), max_length=32)
    whole = cached.read_bytes()
    damage(cached)
    assert load(path, tokenizer, cache_dir=str(tmp_path))[:] == first
    assert caplog.messages == [f"{cached}: damaged, made again from {path}"]
    assert cached.read_bytes() == whole
    assert load(path, tokenizer, cache_dir=str(tmp_path))[:] == first and len(caplog.messages) == 1


@pytest.mark.parametrize("suffix", [".arrow", ".sha256"])
def test_folder_in_place_of_a_cache_file_is_one_line(tmp_path, tokenizer, suffix):
    path = write_records(tmp_path / "a.json", PAIRS)
    load(path, tokenizer, cache_dir=str(tmp_path))
    [file] = (tmp_path / "preference_data").glob(f"*{suffix}")
    file.unlink()
    (file / "full").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{suffix}: cannot be written \(.*Is a directory"):
        load(path, tokenizer, cache_dir=str(tmp_path))


def test_rows_count_tokens_after_truncation(tokenizer, monkeypatch):
    """Prompt 3 tokens, responses 2 and 4: bos p p p sep r r eos (8) and bos p p p sep s s s s eos (10), 5 shared.

    Cut to 9 on the left the second has lost its bos, so that they share nothing: 8 + 9.
    """
    ids = {"prompt": [10, 11, 12], "two": [20, 21], "four": [30, 31, 32, 33]}
    monkeypatch.setattr(tokenizer, "encode", lambda texts: [ids[text] for text in texts])
    record = PreferenceRecord(["prompt"] * 2, ["two", "four"], [1.0, 0.0], "q", ["0", "1"])
    names = ("length", "num_tokens", "longest")
    for max_length, expected in ((64, [13, 18, 10]), (9, [17, 17, 9])):
        [row] = tokenize_records([record], tokenizer, **SETTINGS | {"max_length": max_length})
        assert [row[name] for name in names] == expected


def test_truncated_responses_and_indistinguishable_pairs_are_counted_and_logged(tmp_path, tokenizer, caplog):
    """Left truncation to 64 tokens: both of record 2 are cut; of record 3 nothing but the same long end is left."""
    tail = " the same words again and again" * 20
    records = [
        pair("Why?"),
        pair("word " * 99),
        pair("Why?", " yes" + tail, " no" + tail),
        pair() | {"scores": [1, 1]},
    ]
    path = write_records(tmp_path / "a.json", records)
    with caplog.at_level(logging.INFO, logger="reward_datasets"):
        dataset = load(path, tokenizer, cache_dir=str(tmp_path))
    assert dataset["num_truncated"][:] == [0, 2, 2, 0]
    assert dataset["num_identical"][:] == [0, 0, 1, 0]
    assert dataset["num_pairs"][:] == [1, 1, 1, 0]
    assert "4 items, 3 pairs, 4 responses truncated, 1 items without a pair" in caplog.text
    assert "the two sides of 1 pairs are the same tokens" in caplog.text


def test_repeated_prompts_are_encoded_once(tokenizer, monkeypatch):
    """Both texts of each of the 64 records share their prompt."""
    texts = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda batch: texts.extend(batch) or encode(batch))
    records = load_preference_data(E2E / "train.json", "comparison_pair", True)
    assert len(list(tokenize_records(records, tokenizer, **SETTINGS))) == 64
    assert len(texts) == len({record.prompts[0] for record in records}) + 2 * 64


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "paths, names",
    [
        (["x/a.json", "y/b.json"], ["a.json", "b.json"]),
        (["x/a.json", "y/a.json"], ["x/a.json", "y/a.json"]),
        (["v1/x/a.json", "v2/x/a.json", "x/b.json"], ["v1/x/a.json", "v2/x/a.json", "b.json"]),
        (["a.json", "x/a.json"], ["a.json", "x/a.json"]),
        (["x/a.json", "x/./a.json", "x/a.json"], ["a.json"]),
    ],
)
def test_evaluation_sets_of_the_same_name_get_their_folders(paths, names):
    named = name_datasets(paths)
    assert list(named) == names
    assert len(set(named.values())) == len(names)


# ------------------------------------------------------------------------------------------------ collating

EXAMPLE = [
    {"input_ids": [[1, 7, 2], [1, 2]], "scores": [0.9, 0.1], "is_apo": False},
    {"input_ids": [[1, 2]], "scores": [0.5], "is_apo": True},
]


def test_collator_docstring_example_holds():
    batch = RewardDataCollator(pad_token_id=3)(EXAMPLE)
    assert batch["input_ids"].tolist() == [[1, 7, 2], [1, 2, 3], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    torch.testing.assert_close(batch["scores"], torch.tensor([[0.9, 0.1], [0.5, -1.0]]))
    assert batch["apo_mask"].tolist() == [0, 1]


def test_collator_pads_on_the_left():
    batch = RewardDataCollator(pad_token_id=3, padding_side="left")(EXAMPLE)
    assert batch["input_ids"].tolist() == [[1, 7, 2], [3, 1, 2], [3, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]


@given(st.lists(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1))
@settings(deadline=None)
def test_collating_loses_and_adds_no_token(items):
    """The tokens under the mask are those of the items, in order; a row exists for each present response only."""
    rows = [{"input_ids": item, "scores": [0.5] * len(item), "is_apo": False} for item in items]
    batch = RewardDataCollator(pad_token_id=3)(rows)
    assert batch["input_ids"][batch["attention_mask"].bool()].tolist() == [
        i for item in items for r in item for i in r
    ]
    assert batch["input_ids"].shape[1] == max(len(response) for item in items for response in item)
    assert (batch["scores"] >= 0).sum(1).tolist() == [len(item) for item in items]
    assert len(batch["input_ids"]) == (batch["scores"] >= 0).sum()


def test_scores_that_are_equal_in_float32_form_a_pair(tokenizer, tmp_path):
    record = {"text": ["a<sep>b", "a<sep>c", "a<sep>d"], "scores": [1.0, 1 - 1e-9, 0.0]}
    path = write_records(tmp_path / "a.json", [record])
    rows = list(tokenize_records(load_preference_data(path, "comparison_pair"), tokenizer, **SETTINGS))
    assert [row["num_pairs"] for row in rows] == [3]
