"""tools/dev/benchmark_alignment.py: its data, by hand; all contestants make the same updates; the real command."""

import importlib.util
import math

import pytest
from benchmark_alignment import ALIGNMENT_CONTESTANTS, Contestant, add_responses, check_losses, iter_rows
from benchmark_rounds import find_files
from conftest import REPO_ROOT, command_line, read_json, run_tool

from apo.records import PreferenceRecord

PAIRS = find_files(REPO_ROOT / "data" / "sample")[0]
INSTALLED = {
    align_type: [name for name in names if not name.startswith("trl") or importlib.util.find_spec("trl")]
    for align_type, names in ALIGNMENT_CONTESTANTS.items()
}


def test_each_prompt_gets_the_two_responses_of_the_next_one():
    records = [PreferenceRecord([p, p], [f"{p}0", f"{p}1"], [0.0, 1.0], p, ["", ""]) for p in "ab"]
    first, last = add_responses(records)
    assert (first.prompts[0], first.responses) == ("a", ["a0", "a1", "b0", "b1"])
    assert (last.prompts[0], last.responses) == ("b", ["b0", "b1", "a0", "a1"])
    assert len(set(first.scores)) == 4


@pytest.mark.parametrize("align_type", ALIGNMENT_CONTESTANTS)
def test_all_contestants_make_the_same_updates(tmp_path, base_llama, align_type):
    """Two updates with two items each; the tree runs fewer tokens than the rows."""
    rows = [row for row, _ in zip(iter_rows(align_type, PAIRS, str(base_llama), 96, 42), range(4), strict=False)]
    settings = {"batch_size": 2, "max_length": 96, "output_dir": str(tmp_path)}
    losses, tokens = {}, {}
    for name in INSTALLED[align_type]:
        contestant = Contestant(name, align_type, str(base_llama), rows, settings)
        _, with_reference = contestant.add_reference(rows)
        measured = contestant.train(with_reference)
        losses[name], tokens[name] = measured["losses"], measured["num_tokens"]
    check_losses(losses)
    first, second = losses["tree"]
    assert align_type == "rrhf" or (first == pytest.approx(math.log(2), abs=1e-6) and second != first)
    assert tokens["tree"] < tokens["padded"] == tokens[INSTALLED[align_type][-1]]


def test_other_losses_end_the_run():
    check_losses({"tree": [0.5, 0.7], "trl": [0.50005, 0.7]})
    with pytest.raises(AssertionError, match="trl"):
        check_losses({"tree": [0.5, 0.7], "trl": [0.5, 0.7002]})


@pytest.mark.slow
def test_command_measures_each_contestant_in_its_own_process(tmp_path, base_llama):
    contestants = ["tree", INSTALLED["dpo"][-1], "padded_all_logits"]
    flags = {"batch_size": 2, "num_batches": 1, "rounds": 1, "max_length": 96, "threads": 1}
    flags |= {"data_dir": REPO_ROOT / "data" / "sample", "model_name_or_path": base_llama, "output_dir": tmp_path}
    done = run_tool("dev/benchmark.py", *command_line(mode="alignment", contestants=contestants, **flags))
    assert "first_is_faster_in_steps" in done.stdout
    results = read_json(tmp_path / "benchmark.json")["results"]
    assert {name: list(result) for name, result in results.items()} == {
        "dpo": contestants[:2],
        "rrhf": ["tree", "padded_all_logits"],
    }
    for result in results.values():
        assert all(100 < values["peak_memory_mib"] < 4000 for values in result.values())
        assert all(values["seconds"] >= values["step_seconds"] > 0 for values in result.values())
