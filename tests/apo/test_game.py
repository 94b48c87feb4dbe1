"""The game: its file, who starts from whom, the plan of its stages, and the shell script."""

import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import REPO_ROOT
from tiny_game import make_game, settings

from apo.cli import InputError
from apo.game import Game, describe_game, plan_game, read_game, shell_script
from apo.processes import job
from apo.stages import Stage

ROUND = ["sample_rm", "pair", "train_rm", "sample_eval", "pair_eval", "evaluate_rm", "sample_llm", "score", "select"]
ROUND += ["align", "sample_test", "score_own", "score_testing"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO_ROOT)


def by_label(game: Game) -> dict[str, Stage]:
    return {stage.label: stage for stage in plan_game(game)}


def flag(game: Game, label: str, name: str) -> str:
    """The value of a flag, with the folder of the game left out."""
    return " ".join(by_label(game)[label].flags[name]).replace(f"{game.output_dir}/", "")


# ------------------------------------------------------------------------------------------------ plan


def test_round_has_its_stages_in_order(tmp_path):
    labels = list(by_label(make_game(tmp_path)))
    assert labels == ["0/sample_test", "0/score_testing", *(f"{k}/{name}" for k in (1, 2) for name in ROUND)]


def test_round_0_trains_what_is_not_given(tmp_path):
    """The testing RM on all human pairs, and the first LLM; the exact judge is asked about every LLM."""
    game = make_game(tmp_path, testing_rm={"max_steps": 1}, sft={"train_data_path": "golden.json"}, judge=True)
    labels = list(by_label(game))
    assert labels[:5] == ["0/testing_rm", "0/sft", "0/sample_test", "0/score_testing", "0/judge"]
    assert [label for label in labels if "judge" in label] == ["0/judge", "1/judge", "2/judge"]
    assert flag(game, "0/testing_rm", "train_data_path").endswith("human_all.json")
    assert flag(game, "0/sample_test", "model_name_or_path") == "round_0/sft"
    assert flag(game, "2/score_testing", "model_name_or_path") == "round_0/testing_rm"


def test_files_go_from_stage_to_stage(tmp_path):
    """Pairs of the round's samples train the RM; it scores responses of the same LLM, which learns from them."""
    game = make_game(tmp_path)
    samples = "round_2/sample_rm/llm_1_sampling_sample_rm_results.json"
    responses = "round_2/sample_llm/llm_1_sampling_sample_llm_results.json"
    assert flag(game, "2/sample_rm", "model_name_or_path") == "round_1/align"
    assert flag(game, "2/pair", "sample_data_path") == samples
    human, pairs = flag(game, "2/train_rm", "train_data_path").split()
    assert human.endswith("human_train.json") and pairs == "round_2/pair/golden_over_sampled_text_scores.json"
    assert flag(game, "2/score", "eval_data_path") == responses == flag(game, "2/select", "data_path")
    scores = "round_2/score/llm_1_sampling_sample_llm_results_pred_rm_2_results.json"
    assert flag(game, "2/select", "score_path") == scores
    assert flag(game, "2/align", "train_data_path") == "round_2/select/best_text_scores.json"
    before, after = flag(game, "2/score_own", "eval_data_path").split()
    assert before.startswith("round_1/sample_test/llm_1_") and after.startswith("round_2/sample_test/llm_2_")


def test_who_starts_from_whom_by_default(tmp_path):
    """The paper's choices: each RM from the base, each LLM from the last one."""
    game = make_game(tmp_path, "base")
    assert [flag(game, f"{k}/train_rm", "model_name_or_path") for k in (1, 2)] == ["base", "base"]
    assert [flag(game, f"{k}/align", "model_name_or_path") for k in (1, 2)] == ["base", "round_1/align"]
    assert [flag(game, f"{k}/align", "reference_model") for k in (1, 2)] == ["base", "round_1/align"]
    assert "DPO reference: what LLM k starts from (the paper does not say)" in describe_game(game)


def test_who_starts_from_whom_otherwise(tmp_path):
    game = make_game(tmp_path, "base", rm_start="previous", dpo_reference="initial")
    assert flag(game, "2/train_rm", "model_name_or_path") == "round_1/train_rm"
    assert flag(game, "2/align", "model_name_or_path") == "round_1/align"
    assert flag(game, "2/align", "reference_model") == "base"
    game = make_game(tmp_path, "base", llm_start="initial", align_type="rrhf")
    assert flag(game, "2/align", "model_name_or_path") == "base"
    assert "reference_model" not in by_label(game)["2/align"].flags
    assert "LLM k: from LLM 0" in describe_game(game)


def test_beta_is_a_flag_of_dpo_only(tmp_path):
    align = {"align": {"beta": 3.0}}
    assert by_label(make_game(tmp_path, **align))["1/align"].flags["beta"] == ["3.0"]
    assert "beta" not in by_label(make_game(tmp_path, align_type="rjs", **align))["1/align"].flags


def test_control_plays_with_the_base_rm(tmp_path):
    """The same flags on human pairs only; one RM for all rounds, unless each starts from the last one."""
    game = make_game(tmp_path, apo=False)
    plan, apo_plan = by_label(game), by_label(make_game(tmp_path))
    assert set(apo_plan) - set(plan) == {"1/sample_rm", "1/pair", "2/sample_rm", "2/pair", "2/train_rm"}
    flags, apo_flags = plan["1/train_rm"].flags, apo_plan["1/train_rm"].flags
    assert {name for name in apo_flags if apo_flags[name] != flags.get(name)} == {
        *("task_type", "train_data_path", "apo_loss_coeff", "apo_sample_num")
    }
    assert flag(game, "2/score", "model_name_or_path") == "round_1/train_rm"
    assert "only: the control; trained once, in round 1" in describe_game(game)
    assert "2/train_rm" in by_label(make_game(tmp_path, apo=False, rm_start="previous"))


def test_values_per_round_and_seeds(tmp_path):
    """Sampling draws anew in each round; training does not change its seed."""
    game = make_game(tmp_path, seed=7)
    assert [flag(game, f"{k}/align", "learning_rate") for k in (1, 2)] == ["0.001", "0.0005"]
    assert [flag(game, f"{k}/sample_llm", "seed") for k in (1, 2)] == ["8", "9"]
    assert [flag(game, f"{k}/train_rm", "seed") for k in (1, 2)] == ["7", "7"]


def test_switches_are_bare_and_a_null_is_not_given(tmp_path):
    game = make_game(
        tmp_path, pair={"group": True, "sampling": False}, sample_rm={"top_k": None, "skip_refused": True}
    )
    assert by_label(game)["1/pair"].command[-1] == "--group"
    assert by_label(game)["1/sample_rm"].command[-1] == "--skip_refused"
    assert by_label(game)["1/train_rm"].flags["do_train"] == ["true"]


def test_null_takes_a_merged_list_of_rounds_out(tmp_path):
    assert "beta" not in by_label(make_game(tmp_path, align={"per_round": None}))["1/align"].flags


def test_launcher_stands_before_programs_with_a_model(tmp_path):
    game = make_game(tmp_path, launcher={"train_rm": "torchrun --nproc_per_node 2", "align": "accelerate launch"})
    assert by_label(game)["1/train_rm"].command[:4] == ["torchrun", "--nproc_per_node", "2", "train.py"]
    assert by_label(game)["1/align"].command[:3] == ["accelerate", "launch", "train_llm.py"]
    assert by_label(game)["1/score"].command[:2] == ["python", "train.py"]


def test_server_gives_the_responses(tmp_path):
    server = {"command": "vllm serve {model} --port 8000", "base_url": "http://localhost:8000/v1"}
    plan = by_label(make_game(tmp_path, server=server))
    words = shlex.join(plan["1/sample_rm"].command)
    assert "--engine openai --base_url http://localhost:8000/v1" in words
    assert [label for label in plan if plan[label].with_server] == [name for name in plan if "sample_" in name]


def test_command_outside_of_the_repository_names_the_whole_path(tmp_path, monkeypatch):
    game = make_game(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert by_label(game)["1/pair"].program == str(REPO_ROOT / "tools" / "apo_data_converter.py")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": 3}, "unknown key round; did you mean rounds?"),
        ({"train_mr": {}}, "unknown key train_mr; did you mean train_rm?"),
        ({"rounds": None}, "found no rounds, expected it"),
        ({"rounds": -1}, "expected a whole number above 0"),
        ({"launcher": {"pair": "nice"}}, "launcher: unknown key pair"),
        ({"launcher": {"align": ["torchrun"]}}, "launcher: align: found a list of 1"),
        ({"launcher": {"align": "bash 'x"}}, "(No closing quotation), expected words as in a shell"),
        ({"slurm": {"align": None}}, "slurm: align: found null"),
        ({"align": {"per_round": [1]}}, "align: found an object"),
        ({"data": {"human_train": [None]}}, "data: human_train: found null, expected human pairs"),
        ({"rounds": "three"}, 'rounds: found the string "three", expected a whole number above 0'),
        ({"align_type": "ppo"}, 'align_type: found the string "ppo", expected one of "rjs", "rrhf", "dpo"'),
        ({"rm_start": "last"}, 'expected one of "base", "previous"'),
        ({"score": ["use_cpu"]}, "score: found a list of 1, expected flags of train.py"),
        ({"align": {"output_dir": "x"}}, "align: output_dir is set by the game"),
        ({"align": {"per_round": {"beta": [0.1]}}}, "per_round: beta: found a list of 1, expected a list of 2 values"),
        ({"align": {"per_round": {"beta": [1, 2]}, "beta": 1}}, "beta: found a list of 2, expected no beta beside it"),
        ({"sample_test": {"per_round": {"top_k": [1, 2]}}}, "expected no such key: the stage runs in round 0 too"),
        ({"launcher": {"trian_rm": "torchrun"}}, "launcher: unknown key trian_rm; did you mean train_rm?"),
        ({"server": {"command": "vllm"}}, "server: found only command, expected command and base_url"),
        (
            {"server": {"command": "x", "base_url": "y"}, "slurm": {"sample_rm": ""}},
            "sample_rm gets its responses from",
        ),
        ({"data": {}}, "data: human_train: found none, expected human pairs"),
    ],
)
def test_wrong_file_is_one_line(tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        plan_game(make_game(tmp_path, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_needless_data_files(tmp_path):
    data = settings(tmp_path, "llm")["data"]
    with pytest.raises(InputError, match=r"data: llm_prompts: gone.json: no such file; expected prompts on which"):
        make_game(tmp_path, data=data | {"llm_prompts": "gone.json"}).check_files()
    with pytest.raises(InputError, match="data: rm_golden: found several files"):
        make_game(tmp_path, data=data | {"rm_golden": [data["rm_golden"]] * 2})
    make_game(tmp_path, apo=False, data={name: path for name, path in data.items() if name != "rm_golden"})
    with pytest.raises(InputError, match="data: human_all: found none"):
        make_game(tmp_path, testing_rm=None, data={name: path for name, path in data.items() if name != "human_all"})


def test_key_that_comes_twice_is_refused(tmp_path):
    """Also within a section; a merged anchor is no second key."""
    path = tmp_path / "game.yaml"
    for text in ("rounds: 1\nrounds: 2\n", "align:\n  beta: 1\n  beta: 2\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="twice, expected each key once"):
            read_game(str(path), {})
    path.write_text("score: &score {use_cpu: true}\nscore_own: {<<: *score, use_cpu: false}\n", encoding="utf-8")
    with pytest.raises(InputError, match="found no rounds"):
        read_game(str(path), {})


# ------------------------------------------------------------------------------------------------ script


def test_script_runs_every_command_and_renames_its_folder(tmp_path):
    """With programs that only write down their words."""
    game = make_game(tmp_path, slurm={"align": "--gpus 8"}, align={"beta": 0.1})
    (tmp_path / "bin").mkdir()
    for name in ("python", "sbatch"):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n(printf '%s ' {name} \"$@\"; echo) >> {tmp_path}/words\n", encoding="utf-8")
        path.chmod(0o755)
    stages = plan_game(game)
    script = tmp_path / "game.sh"
    script.write_text(shell_script(game, stages), encoding="utf-8")
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run(["bash", script], check=True, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, cwd="/")
    lines = (tmp_path / "words").read_text(encoding="utf-8").splitlines()
    expected = [
        " ".join(job(stage, stage.working / "logs" / "attempt_1.log") if stage.slurm else stage.command)
        for stage in stages
    ]
    assert [line.strip() for line in lines] == expected
    assert all(Path(stage.folder).is_dir() and not stage.working.exists() for stage in stages)


def test_script_starts_and_ends_the_server(tmp_path):
    """The server stands for one that replies at once; the script must end it, and itself."""
    server = {"command": f"{tmp_path}/bin/serve {{model}}", "base_url": "http://localhost:1/v1"}
    game = make_game(tmp_path, server=server)
    (tmp_path / "bin").mkdir()
    programs = {"python": "exit 0", "curl": "exit 0", "serve": f"echo $1 >> {tmp_path}/served; exec sleep 600"}
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    script = tmp_path / "game.sh"
    script.write_text(shell_script(game, plan_game(game)[:3]), encoding="utf-8")
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", script], check=True, env=env, timeout=60)
    assert (tmp_path / "game" / "round_1" / "sample_rm").is_dir()
