"""What is kept of a run that was killed: every whole part, and never one of other settings."""

import pytest
from conftest import read_json
from hypothesis import given
from hypothesis import strategies as st

from result_store import ResultStore

SETTINGS = {"seed": 1}
RESPONSES = {"a": [" é", " two\nlines"], "b": ["", " x"], "c": []}


def filled(folder, settings=SETTINGS, rank=0, responses=RESPONSES) -> ResultStore:
    store = ResultStore(folder / "x_results.json", settings, rank)
    for query_id, texts in responses.items():
        store.append(query_id, texts)
    store.close()
    return store


def partial_files(folder) -> list:
    return sorted(folder.glob("*.partial.jsonl"))


def test_store_gives_back_what_all_processes_and_runs_kept(tmp_path):
    filled(tmp_path)
    filled(tmp_path, rank=1, responses={"d": [" d"]})
    filled(tmp_path, responses={"e": [" e"]})
    assert ResultStore(tmp_path / "x_results.json", SETTINGS, 5).load() == RESPONSES | {"d": [" d"], "e": [" e"]}


def test_other_settings_never_mix_and_are_named(tmp_path, caplog):
    filled(tmp_path)
    other = ResultStore(tmp_path / "x_results.json", {"seed": 2})
    assert other.load() == {}
    with caplog.at_level("INFO"):
        other.log_state(0, 3, "prompts")
    assert partial_files(tmp_path)[0].name in caplog.text


@given(st.integers(min_value=0))
def test_a_torn_file_loses_its_last_line_at_most(tmp_path_factory, cut):
    """Cut anywhere, as by a kill in the middle of writing: what is left is read, and what is added later as well."""
    folder = tmp_path_factory.mktemp("store")
    store = filled(folder)
    path = partial_files(folder)[0]
    data = path.read_bytes()
    data = data[: len(data) - cut % len(data)]
    path.write_bytes(data)
    left = store.load()
    assert len(left) >= data.count(b"\n") and left == {key: RESPONSES[key] for key in left}
    filled(folder, responses={key: texts for key, texts in RESPONSES.items() if key not in left})
    assert store.load() == RESPONSES


def test_finish_leaves_result_and_settings_only(tmp_path):
    store = filled(tmp_path)
    assert not store.is_finished()
    store.finish([{"query_id": "a"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_results.json", "x_results.settings.json"]
    assert read_json(tmp_path / "x_results.json") == [{"query_id": "a"}]
    assert store.is_finished()
    assert not ResultStore(tmp_path / "x_results.json", {"seed": 2}).is_finished()


@pytest.mark.parametrize("name", ["x_results.json", "x_results.settings.json"])
def test_a_result_that_was_changed_is_not_finished(tmp_path, name):
    store = filled(tmp_path)
    store.finish([{"query_id": "a"}])
    (tmp_path / name).write_text("[]")
    assert not store.is_finished()


def test_two_processes_may_finish(tmp_path):
    first, second = filled(tmp_path), filled(tmp_path, rank=1)
    first.finish([])
    second.finish([])
    assert second.load() == {} and second.is_finished()
