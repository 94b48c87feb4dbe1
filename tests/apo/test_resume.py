"""The store keeps every complete item and mixes no settings; the loop survives any interruption."""

import os

import pytest
from conftest import read_json
from hypothesis import given
from hypothesis import strategies as st

from apo.cli import InputError
from apo.resume import ResultStore, complete_items, model_version, refuse_overwriting

SETTINGS = {"seed": 1}
RESPONSES = {"a": [" é", " two\nlines"], "b": ["", " x"], "c": []}


def filled(folder, settings=SETTINGS, rank=0, responses=RESPONSES) -> ResultStore:
    store = ResultStore(folder / "x_results.json", settings, rank)
    for query_id, texts in responses.items():
        store.append(query_id, texts)
    return store


def partial_files(folder) -> list:
    return sorted(folder.glob("*.partial.jsonl"))


def test_items_of_all_processes_and_runs_are_loaded(tmp_path):
    filled(tmp_path)
    filled(tmp_path, rank=1, responses={"d": [" d"]})
    filled(tmp_path, responses={"e": [" e"]})
    assert ResultStore(tmp_path / "x_results.json", SETTINGS, 5).load() == RESPONSES | {"d": [" d"], "e": [" e"]}


def test_settings_never_mix_and_others_are_logged(tmp_path, caplog):
    filled(tmp_path)
    other = ResultStore(tmp_path / "x_results.json", {"seed": 2})
    assert other.load() == {}
    with caplog.at_level("INFO"):
        complete_items(other, {}, {}, lambda todo, keep: None, lambda values: [], noun="prompts", progress=False)
    assert partial_files(tmp_path)[0].name in caplog.text


@given(st.integers(min_value=0))
def test_only_an_incomplete_last_line_is_lost(tmp_path_factory, cut):
    """Cut anywhere, as by a kill while writing: what is left is read, and so is what is added later."""
    folder = tmp_path_factory.mktemp("store")
    store = filled(folder)
    path = partial_files(folder)[0]
    data = path.read_bytes()
    data = data[: len(data) - cut % len(data)]
    path.write_bytes(data)
    rest = store.load()
    assert len(rest) >= data.count(b"\n") - 1 and rest == {key: RESPONSES[key] for key in rest}
    filled(folder, responses={key: texts for key, texts in RESPONSES.items() if key not in rest})
    assert store.load() == RESPONSES


def test_finish_writes_result_and_settings_and_deletes_the_rest(tmp_path):
    store = filled(tmp_path)
    assert store.load_result() is None
    store.finish([{"query_id": "a"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_results.json", "x_results.settings.json"]
    assert read_json(tmp_path / "x_results.json") == [{"query_id": "a"}]
    assert store.load_result() == [{"query_id": "a"}]
    assert ResultStore(tmp_path / "x_results.json", {"seed": 2}).load_result() is None


@pytest.mark.parametrize("name", ["x_results.json", "x_results.settings.json"])
@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_changed_result_is_not_used(tmp_path, name, content):
    store = filled(tmp_path)
    store.finish([{"query_id": "a"}])
    (tmp_path / name).write_text(content)
    assert store.load_result() is None


def test_two_processes_may_finish(tmp_path):
    first, second = filled(tmp_path), filled(tmp_path, rank=1)
    first.finish([])
    second.finish([])
    assert second.load() == {} and second.load_result() == []


def test_a_changed_note_is_a_warning_only(tmp_path, caplog):
    def store(url: str) -> ResultStore:
        return ResultStore(tmp_path / "x_results.json", SETTINGS, notes={"base_url": url})

    first = store("one")
    first.append("a", [" x"])
    assert store("one").load() == {"a": [" x"]} and caplog.text == ""
    assert store("two").load() == {"a": [" x"]}
    assert "base_url was one for what is kept, and is two now" in caplog.text
    first.finish([{"query_id": "a"}])
    assert read_json(tmp_path / "x_results.settings.json")["base_url"] == "one"
    caplog.clear()
    assert store("one").load_result() == [{"query_id": "a"}] and caplog.text == ""
    assert store("two").load_result() == [{"query_id": "a"}] and "base_url was one" in caplog.text


def squares(folder, share: list[str] | None = None, rank: int = 0, num_items: int | None = None):
    """Squares 0 to 5 in the process of a rank, interrupted after `num_items`; returns the records and the work.

    As in `generate_responses`, a finished result is not made again.
    """
    seen: list[int] = []

    def work(todo: dict[str, int], keep) -> None:
        for key, number in todo.items():
            if len(seen) == num_items:
                raise KeyboardInterrupt
            keep(key, [number**2])
            seen.append(number)

    def make_records(values: dict[str, list[int]]) -> list[dict]:
        return [{"key": key, "square": values[key][0]} for key in "012345"]

    store = ResultStore(folder / "x.json", SETTINGS, rank)
    items = {str(number): number for number in range(6)}
    done = store.load()
    if store.load_result():
        return None, seen
    records = complete_items(store, items, done, work, make_records, noun="numbers", share=share, progress=False)
    return records, seen


SQUARES = [{"key": str(number), "square": number**2} for number in range(6)]


@given(st.lists(st.integers(0, 5), max_size=4), st.permutations("012345"), st.integers(1, 4))
def test_any_interruption_ends_with_the_same_file_and_no_work_twice(tmp_path_factory, stops, order, num_processes):
    """Interrupted by some processes, then completed by others in turn: the last one writes the result."""
    folder = tmp_path_factory.mktemp("loop")
    num_kept = 0
    for stop in stops:
        if stop < 6 - num_kept:
            with pytest.raises(KeyboardInterrupt):
                squares(folder, order, rank=stop, num_items=stop)
            num_kept += stop
    assert not (folder / "x.json").exists()
    results = [squares(folder, order[rank::num_processes], rank) for rank in range(num_processes)]
    assert [records for records, _ in results if records] == [SQUARES] == [read_json(folder / "x.json")]
    assert sum(len(seen) for _, seen in results) == 6 - num_kept
    assert sorted(path.name for path in folder.iterdir()) == ["x.json", "x.settings.json"]


def test_a_process_without_work_writes_nothing_while_others_are_at_work(tmp_path, caplog):
    caplog.set_level("INFO")
    assert squares(tmp_path, share=[]) == (None, []) and list(tmp_path.iterdir()) == []
    assert "other processes have not finished their share" in caplog.text


def test_the_data_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
    refuse_overwriting("x.json", tmp_path / "y.json")
    for name in ("x.json", "a/../x.json", "link.json"):
        with pytest.raises(InputError, match=r"x\.json: found the data to read where the result goes"):
            refuse_overwriting(name, tmp_path / "x.json")
    with pytest.raises(InputError, match="found a folder where the result goes"):
        refuse_overwriting("x.json", tmp_path)


def test_model_version_changes_with_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    version = model_version(str(tmp_path), None)
    (tmp_path / "results.json").write_text("[]")
    assert version == model_version(str(tmp_path), None)
    os.utime(tmp_path / "model.safetensors", (0, 0))
    assert version == model_version(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_version(str(tmp_path), None) != version
    assert model_version("name/on-the-hub", "abc") == "abc"
