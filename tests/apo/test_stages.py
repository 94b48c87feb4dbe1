"""Stages: what is recorded of one, what makes a record count no more, and the checks of what a stage wrote."""

import os
from pathlib import Path

import pytest
from conftest import CHECKPOINT, copy_checkpoint, write_records

from apo.cli import InputError, sha256_of_file
from apo.stages import DONE, STARTED, Records, Stage, check_outputs

PROGRAMS = {"make": "make.py", "train": "train.py", "use": "use.py"}


@pytest.fixture
def stages(tmp_path: Path) -> list[Stage]:
    """A file is made from a file, a model from that, a result from the model; the programs are played by `finish`."""
    (tmp_path / "data.json").write_text("[1]", encoding="utf-8")
    flags = {
        "make": {"data_path": [str(tmp_path / "data.json")], "beta": ["0.1"], "base_url": ["http://a"]},
        "train": {"train_data_path": [str(tmp_path / "make" / "made.json")], "task_type": ["apo"]},
        "use": {"model_name_or_path": [str(tmp_path / "train")], "seed": ["1"]},
    }
    return [Stage(1, name, tmp_path / name, ("python",), PROGRAMS[name], flags[name]) for name in flags]


def changed(stage: Stage, **flags: list[str]) -> Stage:
    return Stage(stage.round, stage.name, stage.folder, stage.launcher, stage.program, stage.flags | flags)


def started(stage: Stage, records: Records) -> dict:
    record = {"settings": stage.settings, "inputs": records.inputs(stage)}
    write_records(stage.working / STARTED, record)
    return record


def finish_all(stages: list[Stage]) -> None:
    """Does what the game does in each stage; one trains a model, the others write a file."""
    records = Records(stages)
    for stage in stages:
        record = started(stage, records)
        (stage.working / "logs").mkdir()
        (stage.working / "logs" / "attempt_1.log").touch()
        if stage.name == "train":
            copy_checkpoint(stage.working)
        else:
            (stage.working / "made.json").write_text(stage.name, encoding="utf-8")
        records.finish(stage, record)


def load(stages: list[Stage]) -> Records:
    records = Records(stages)
    records.load()
    return records


def refusal(stages: list[Stage]) -> str:
    with pytest.raises(InputError) as error:
        load(stages)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ records


def test_done_stage_records_files_and_parents(stages, tmp_path):
    finish_all(stages)
    records = load(stages)
    assert list(records.done) == ["1/make", "1/train", "1/use"]
    record = records.done["1/use"]
    assert record["parents"] == ["1/train"]
    weights = str(tmp_path / "train" / "model.safetensors")
    assert record["inputs"][weights]["sha256"] == sha256_of_file(CHECKPOINT / "model.safetensors")
    assert list(record["outputs"]) == ["made.json"]
    assert record["outputs"]["made.json"]["sha256"] == sha256_of_file(tmp_path / "use" / "made.json")
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    assert not (tmp_path / "use" / STARTED).exists()


def test_word_that_is_a_folder_by_chance_is_no_input(stages, tmp_path, monkeypatch):
    """--task_type apo, beside a folder apo with a file whose name looks like a tokenizer's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apo").mkdir()
    (tmp_path / "apo" / "tokenizer.py").touch()
    finish_all(stages)
    assert list(load(stages).done["1/train"]["inputs"]) == [str(tmp_path / "make" / "made.json")]


def test_changed_flag_is_named(stages):
    finish_all(stages)
    error = refusal([changed(stages[0], beta=["0.2"]), *stages[1:]])
    assert error.startswith("1/make was run with beta 0.1, now 0.2; give the same again, or --redo 1/make")
    assert list(load([changed(stages[0], base_url=["http://b"]), *stages[1:]]).done) == ["1/make", "1/train", "1/use"]


def test_changed_program_or_launcher_is_named(stages):
    finish_all(stages)
    first = stages[0]
    other = Stage(1, "make", first.folder, ("torchrun",), "make.py", first.flags)
    assert "program python make.py, now torchrun make.py" in refusal([other, *stages[1:]])


def test_changed_input_is_named_but_not_a_copy_of_it(stages, tmp_path):
    finish_all(stages)
    data = tmp_path / "data.json"
    os.utime(data, (1, 1))
    assert load(stages).done
    data.write_text("[2]", encoding="utf-8")
    assert f"1/make: {data} is not what it was made from" in refusal(stages)
    data.unlink()
    assert f"1/make: {data} is not what it was made from" in refusal(stages)


@pytest.mark.parametrize(("name", "file"), [("make", "made.json"), ("train", "model.safetensors")])
def test_changed_or_missing_output_is_named(stages, tmp_path, name, file):
    finish_all(stages)
    path = tmp_path / name / file
    path.write_bytes(path.read_bytes() + b"x")
    assert refusal(stages).startswith(f"1/{name}: {path} was changed; restore it, or --redo 1/{name}")
    path.unlink()
    assert refusal(stages).startswith(f"1/{name}: {path} is missing")


def test_stage_whose_parent_is_gone_is_refused(stages, tmp_path):
    """Before anything runs: the parent would be made again for nothing."""
    finish_all(stages)
    (tmp_path / "make").rename(tmp_path / "elsewhere")
    assert refusal(stages).startswith("1/train was made from 1/make, which is not done; restore")


def test_folder_without_record_is_refused(stages, tmp_path):
    finish_all(stages)
    (tmp_path / "use" / DONE).unlink()
    assert refusal(stages).startswith(f"{tmp_path / 'use'}: found no {DONE}")


def test_kill_between_record_and_rename_loses_nothing(stages, tmp_path):
    finish_all(stages)
    (tmp_path / "use").rename(stages[2].working)
    assert list(load(stages).done) == ["1/make", "1/train", "1/use"]
    assert (tmp_path / "use" / "made.json").is_file() and not stages[2].working.exists()


def test_half_stage_goes_on_only_with_its_settings(stages):
    finish_all(stages[:1])
    started(stages[1], load(stages))
    other = [stages[0], changed(stages[1], task_type=["training"]), stages[2]]
    assert list(load(other).done) == ["1/make"]  # it has written nothing yet
    (stages[1].working / "config.json").touch()
    assert list(load(stages).done) == ["1/make"]
    error = refusal(other)
    assert error.startswith("1/train was run with task_type apo, now training")


def test_deleted_weights_still_count_as_what_was_read(stages, tmp_path):
    finish_all(stages)
    load(stages).delete_weights(stages[1])
    assert not (tmp_path / "train" / "model.safetensors").exists()
    assert (tmp_path / "train" / "config.json").is_file()
    records = load(stages)
    assert records.done["1/train"]["deleted"] == ["model.safetensors"] and "1/use" in records.done
    (tmp_path / "train" / "config.json").unlink()
    assert "config.json is missing" in refusal(stages)


def test_made_from_follows_the_files(stages):
    records = Records(stages)
    assert [stage.label for stage in records.made_from("1/train")] == ["1/train", "1/use"]
    assert [stage.label for stage in records.made_from("1/use")] == ["1/use"]


# ------------------------------------------------------------------------------------------------ checks


def stage_of(tmp_path: Path, program: str, **flags: list[str]) -> Stage:
    stage = Stage(1, "stage", tmp_path / "stage", ("python",), program, flags)
    stage.working.mkdir()
    return stage


def samples(tmp_path: Path, responses: list[list[str]]) -> Path:
    rows = [
        {"query_id": f"q{i}", "query": "Why?"} | {f"sample_{j}": text for j, text in enumerate(texts)}
        for i, texts in enumerate(responses)
    ]
    return write_records(tmp_path / "samples.json", rows)


def stopped(stage: Stage) -> str:
    with pytest.raises(InputError) as error:
        check_outputs(stage)
    assert str(error.value).startswith("the game stops after 1/stage: ") and "--redo 1/stage" in str(error.value)
    return str(error.value)


def test_samples_cover_the_prompts_and_are_not_empty(tmp_path):
    """One empty response in twenty is allowed, two are not."""
    prompts = write_records(tmp_path / "prompts.json", [{"query_id": f"q{i}", "query": "Why?"} for i in range(10)])
    stage = stage_of(tmp_path, "tools/inference_llm.py", data_path=[str(prompts)])
    result = stage.working / "x_results.json"
    samples(tmp_path, [[" a", " b"]] * 9 + [[" a", ""]]).rename(result)
    assert check_outputs(stage) == {"prompts": 10, "responses": 20, "empty": 1}
    samples(tmp_path, [[" a", " b"]] * 8 + [[" a", ""]] * 2).rename(result)
    assert "2 of 20 responses are empty, more than a twentieth" in stopped(stage)
    samples(tmp_path, [[" a", " b"]] * 9).rename(result)
    assert "1 of 10 prompts have no response, such as q9" in stopped(stage)
    stage.flags["skip_refused"] = []
    assert check_outputs(stage)["prompts"] == 9


def test_enough_pairs_are_usable(tmp_path):
    """One pair of ten responses is a tenth, of eleven less."""
    stage = stage_of(tmp_path, "tools/apo_data_converter.py", sample_data_path=[""])
    write_records(stage.working / "x_text_scores.json", [{"text": ["a", "b"], "scores": [1, 0]}])
    stage.flags["sample_data_path"] = [str(samples(tmp_path, [[" a", " b"]] * 5))]
    assert check_outputs(stage) == {"pairs": 1, "responses": 10}
    samples(tmp_path, [[" a"] * 11])
    assert "1 pairs of 11 possible ones are usable, less than a tenth" in stopped(stage)


def scoring(tmp_path: Path, rewards: list[list[float]]) -> Stage:
    data = samples(tmp_path, [[" a"] * len(row) for row in rewards])
    stage = stage_of(tmp_path, "train.py", task_type=["inference"], eval_data_path=[str(data)], data_suffix=["rm"])
    found = [{f"q{i}:sample_{j}": reward} for i, row in enumerate(rewards) for j, reward in enumerate(row)]
    write_records(stage.working / "samples_pred_rm_results.json", found)
    return stage


def test_every_response_has_a_reward(tmp_path):
    stage = scoring(tmp_path, [[0.5, 1.0], [2.0, 2.0]])
    assert check_outputs(stage) == {"rewards": 4}
    samples(tmp_path, [[" a", " a"], [" a", " a", " a"]])
    assert "1 responses of" in stopped(stage)


@pytest.mark.parametrize("rewards", [[[0.5, 0.5], [1.0, 1.0]], [[0.5], [0.5]]])
def test_game_stops_if_all_rewards_are_tied(tmp_path, rewards):
    assert "all rewards of a prompt are equal" in stopped(scoring(tmp_path, rewards))


def test_reward_that_is_no_number_is_refused(tmp_path):
    stage = scoring(tmp_path, [[0.5, 1.0]])
    (stage.working / "samples_pred_rm_results.json").write_text('[{"q0:sample_0": NaN}, {"q0:sample_1": 1}]')
    with pytest.raises(InputError, match="q0:sample_0"):
        check_outputs(stage)


def test_selection_leaves_enough_pairs(tmp_path):
    stage = stage_of(tmp_path, "tools/rejection_sampling.py")
    write_records(stage.working / "best_text_scores.json", [{}] * 10)
    write_records(stage.working / "best_report.json", {"pairs": 1, "prompts": 10})
    assert check_outputs(stage) == {"prompts": 10, "pairs": 1}
    write_records(stage.working / "best_report.json", {"pairs": 1, "prompts": 11})
    assert "1 of 11 prompts make a pair" in stopped(stage)


def test_evaluation_is_finite_and_of_every_file(tmp_path):
    stage = stage_of(tmp_path, "train.py", eval_data_path=["a.json", "b.json"])
    with pytest.raises(InputError, match=r"all_results\.json: not written, although the command ended well"):
        check_outputs(stage)
    write_records(stage.working / "all_results.json", {"eval_a.json_pairs": 3, "eval_b.json_pairs": 4, "margin": 0.5})
    write_records(stage.working / "final_eval_results.json", {"a.json": {}, "b.json": {}})
    assert check_outputs(stage) == {"pairs": 7}
    write_records(stage.working / "final_eval_results.json", {"a.json": {}})
    assert "results of 1 evaluation files, expected 2" in stopped(stage)
    (stage.working / "all_results.json").write_text('{"train_loss": NaN}', encoding="utf-8")
    assert "train_loss is nan" in stopped(stage)


def test_trained_model_is_whole(tmp_path):
    stage = stage_of(tmp_path, "train.py", do_train=["true"])
    copy_checkpoint(stage.working)
    write_records(stage.working / "all_results.json", {"train_loss": 0.5})
    weights = stage.working / "model.safetensors"
    state = {"state": "finished", "depends_on": {}, "files": {weights.name: sha256_of_file(weights)}}
    write_records(stage.working / "run_state.json", state)
    assert check_outputs(stage) == {"train_loss": 0.5}
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    assert "the model is not whole: model.safetensors is damaged" in stopped(stage)
    weights.write_bytes(content)
    for name, what in (("config.json", "configuration missing"), ("run_state.json", "does not say")):
        (stage.working / name).rename(tmp_path / name)
        assert what in stopped(stage)
        (tmp_path / name).rename(stage.working / name)
    for path in stage.working.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer missing" in stopped(stage)
