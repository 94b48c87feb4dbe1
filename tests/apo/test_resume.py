"""What is kept of a run that was killed: every whole part, and never one of other settings."""

import pytest
from conftest import read_json
from hypothesis import given
from hypothesis import strategies as st

from apo.cli import InputError
from apo.resume import ResultStore, model_version, refuse_overwriting

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


def test_a_result_is_read_back_by_its_own_settings_only(tmp_path):
    store = filled(tmp_path)
    assert store.load_result() == []
    store.finish([{"query_id": "é"}])
    assert store.load_result() == [{"query_id": "é"}]
    assert ResultStore(tmp_path / "x_results.json", {"seed": 2}).load_result() == []


def test_changed_notes_are_named_and_lose_nothing(tmp_path, caplog):
    def store(url: str) -> ResultStore:
        return ResultStore(tmp_path / "x_results.json", SETTINGS, notes={"base_url": url})

    first = store("one")
    first.open()
    assert store("two").load() == {} and caplog.text == ""
    first.append("a", [" x"])
    assert store("one").load() == {"a": [" x"]} and caplog.text == ""
    assert store("two").load() == {"a": [" x"]}
    assert "base_url was one for what is kept, and is two now" in caplog.text
    first.finish([{"query_id": "a"}])
    assert read_json(tmp_path / "x_results.settings.json")["base_url"] == "one"
    caplog.clear()
    assert store("one").load_result() == [{"query_id": "a"}] and caplog.text == ""
    assert store("two").load_result() == [{"query_id": "a"}] and "base_url was one" in caplog.text


@pytest.mark.parametrize("name", ["file/x.json", "folder.json"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=rf"{name}: cannot be written \(.+\), expected a place") as caught:
        ResultStore(tmp_path / name, SETTINGS).open()
    assert "\n" not in str(caught.value)


def test_the_data_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
    refuse_overwriting("x.json", tmp_path / "y.json")
    for name in ("x.json", "a/../x.json", "link.json"):
        with pytest.raises(InputError, match=r"x\.json: found the data to read where the result goes"):
            refuse_overwriting(name, tmp_path / "x.json")


def test_model_version_changes_with_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    version = model_version(str(tmp_path), None)
    (tmp_path / "results.json").write_text("[]")
    assert version == model_version(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"three")
    assert model_version(str(tmp_path), None) != version
    assert model_version("name/on-the-hub", "abc") == "abc"
