"""The command line: the reference's spelling works, and what is wrong is said in one line before anything loads."""

import logging
import os

import pytest
import torch
from conftest import CHECKPOINT, E2E, command_line

from apo.cli import InputError
from arguments import RENAMED_FLAGS, UNUSED_FLAGS, build_arguments, parse_flags

NEEDED = {"model_name_or_path": CHECKPOINT, "eval_data_path": E2E / "eval_a.json", "use_cpu": True}
REFERENCE_COMMAND = f"""--task_type hh_split --do_train True --eval_at_start False --model_type reward
    --model_name_or_path {CHECKPOINT} --data_type comparison_pair --train_data_path A.json
    --eval_data_path B.json C.json --data_suffix rm_base --add_sep_token True --remove_unused_columns false
    --output_dir O --num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
    --gradient_accumulation_steps 8 --evaluation_strategy steps --padding_side right --truncation_side left
    --pooling_type last --max_length 512 --save_strategy steps --save_total_limit 10 --learning_rate 1e-6
    --warmup_steps 100 --logging_steps 10 --eval_steps 50 --weight_decay 0. --tf32 false --fp16 false --use_cpu true"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """Parsing sets variables for accelerate; the working folder is a fresh one."""
    environment = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(environment)


def parse(*parts, **flags):
    return build_arguments(parse_flags(command_line(*parts, **flags)))


def test_reference_command_line_parses_word_for_word():
    model_args, data_args, args = build_arguments(parse_flags(REFERENCE_COMMAND.split()))
    assert data_args.eval_data_path == ["B.json", "C.json"]
    assert (model_args.max_length, model_args.pooling_type, model_args.add_sep_token) == (512, "last", True)
    assert (args.task_type, args.learning_rate, args.warmup_steps, args.weight_decay) == ("hh_split", 1e-6, 100, 0)
    assert (args.eval_strategy, args.eval_steps, args.save_total_limit) == ("steps", 50, 10)
    assert args.do_train and not args.eval_on_start and not args.remove_unused_columns


@pytest.mark.parametrize("task_type, more", [("training", ""), ("apo", "--apo_loss_coeff 0.1 --apo_sample_num 4")])
def test_other_reward_models_of_the_reference_parse(task_type, more):
    command = REFERENCE_COMMAND.replace("--task_type hh_split", f"--task_type {task_type}")
    command = command.replace("A.json", "A.json A_text_scores.json") + " " + more
    _, data_args, args = build_arguments(parse_flags(command.split()))
    assert data_args.train_data_path == ["A.json", "A_text_scores.json"]
    assert (args.task_type, args.apo_sample_num) == (task_type, 4 if more else 1)


@pytest.mark.parametrize("flag", ["eval_strategy", "evaluation_strategy"])
def test_both_names_of_the_evaluation_strategy_work(flag):
    assert parse(**NEEDED, **{flag: "epoch"})[2].eval_strategy == "epoch"


def test_eval_at_start_evaluates_before_the_first_step():
    assert parse(**NEEDED, eval_at_start=True)[2].eval_on_start
    assert not parse(**NEEDED)[2].eval_on_start


@pytest.mark.parametrize("flag", UNUSED_FLAGS)
def test_flag_that_the_reference_never_reads_is_accepted_with_a_warning(flag, caplog):
    parse(**NEEDED, **{flag: "5"})
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"--{flag} has no effect" in warnings[0]


def test_remove_unused_columns_true_is_a_warning(caplog):
    assert not parse(**NEEDED, remove_unused_columns=True)[2].remove_unused_columns
    assert "--remove_unused_columns has no effect" in caplog.text


def test_given_flags_without_effect_on_the_task_are_named(caplog):
    parse(**NEEDED, task_type="hh_split", apo_loss_coeff=0.1)
    assert "no effect with --task_type hh_split" in caplog.text


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"pooling_tpye": "last"}, "unknown flag --pooling_tpye; did you mean --pooling_type"),
        ({"train_data": "A.json"}, "unknown flag --train_data; did you mean --train_data_path"),
        ({"qqqqqqqq": 1}, "unknown flag --qqqqqqqq; see --help"),
        ({"max_length": 7}, "--max_length 7: expected 8 or more"),
        ({"max_length": "many"}, "--max_length.*many"),
        ({"task_type": "sft"}, "--task_type.*'sft'.*'training', 'hh_split', 'apo', 'inference'"),
        ({"pooling_type": "first"}, "--pooling_type.*'first'.*'last', 'eos', 'average', 'max'"),
        ({"model_type": "sft"}, "--model_type.*'sft'.*'reward'"),
        ({"apo_loss_type": "hinge"}, "--apo_loss_type.*'hinge'.*'ranking', 'diff'"),
        ({"apo_sample_num": 0}, "--apo_sample_num 0: expected 1 or more"),
        ({"apo_loss_coeff": -1}, "--apo_loss_coeff -1.0: expected 0 or more"),
        ({"rm_kl_coeff": -0.5}, "--rm_kl_coeff -0.5: expected 0 or more"),
        ({"lm_loss_coeff": -2}, "--lm_loss_coeff -2.0: expected 0 or more"),
        ({"calibration_bins": [10, 0]}, r"--calibration_bins \[10, 0\]: expected 1 or more"),
        ({"eval_token_budget": 0}, "--eval_token_budget 0: expected 1 or more"),
        ({"batching": "trees"}, "--batching.*'trees'.*'tree', 'padded'"),
        ({"learning_rate": "fast"}, "--learning_rate.*fast"),
        ({"do_train": True}, "without training data; give --train_data_path"),
        ({"task_type": "inference", "do_train": True}, "inference.*no --do_train"),
        ({"task_type": "inference", "eval_data_path": None}, "inference needs the files to score in --eval_data_path"),
        ({"data_type": "reject_sample"}, "reject_sample is for --task_type inference"),
        ({"eval_data_path": None}, "nothing to do"),
        ({"response_keys": "my_gpt4"}, "--response_keys is for --data_type reject_sample"),
        ({"model_name_or_path": None}, "--model_name_or_path"),
        (
            {"eval_data_path": None, "do_train": True, "train_data_path": "A", "eval_strategy": "epoch"},
            "--eval_strategy without",
        ),
        (
            {"eval_data_path": None, "do_train": True, "train_data_path": "A", "do_eval": True},
            "--do_eval.* without",
        ),
        ({"do_train": True, "train_data_path": "A", "dtype": "float16"}, "--dtype float16: such weights overflow"),
        ({"fp16": True}, "--fp16 true has no effect on a CPU"),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "best needs --metric_for_best_model"),
        ({"metric_for_best_model": "accuracy"}, "need --eval_strategy steps or epoch"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_flag_is_refused_in_one_line(flags, message):
    with pytest.raises(InputError, match=message) as error:
        parse(**NEEDED | flags)
    assert "\n" not in str(error.value)


def test_value_without_a_flag_is_refused():
    with pytest.raises(InputError, match='"stray" belongs to no flag'):
        parse(**NEEDED, fp16=["false", "stray"])


def test_abbreviated_flag_is_refused():
    """argparse would otherwise accept any unambiguous prefix of a flag."""
    with pytest.raises(InputError, match="--pooling_typ; did you mean --pooling_type"):
        parse(**NEEDED, pooling_typ="last")


@pytest.mark.parametrize("flag, replacement", RENAMED_FLAGS.items())
def test_flag_of_2023_is_refused_with_its_new_name(flag, replacement):
    with pytest.raises(InputError, match=f"{flag} is no flag of transformers 5") as error:
        parse(flag, "1", **NEEDED)
    assert replacement in str(error.value)


def test_deepspeed_config_that_accelerate_would_drop_is_refused(tmp_path, monkeypatch):
    """With ACCELERATE_USE_CPU accelerate trains without DeepSpeed and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match=r"ACCELERATE_USE_CPU.*unset it.*--use_cpu true"):
        parse(**NEEDED, deepspeed=tmp_path / "ds.json")


@pytest.mark.parametrize(
    "config", [None, "{", "[]", '"x"', "3", '{"zero_optimization": []}', '{"zero_optimization": {"stage": 7}}']
)
def test_deepspeed_config_that_is_missing_or_has_another_shape_is_refused(tmp_path, config):
    if config:
        (tmp_path / "ds.json").write_text(config)
    with pytest.raises(InputError, match=r"ds.json: no such file, or its content is not a JSON object"):
        parse(**NEEDED, deepspeed=tmp_path / "ds.json")


def test_deepspeed_without_an_accelerator_needs_use_cpu():
    """Otherwise DeepSpeed compiles for minutes before anything is said."""
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(InputError, match="no accelerator was found; add --use_cpu true"):
        parse(**NEEDED | {"use_cpu": None}, deepspeed="configs/zero2.json")


def test_lower_calibration_error_is_better():
    flags = NEEDED | {"eval_strategy": "epoch", "metric_for_best_model": "eval_a.json_calibration_ECE_bin10"}
    assert parse(**flags)[2].greater_is_better is False
    assert parse(**flags, greater_is_better=True)[2].greater_is_better


def test_evaluating_at_the_start_needs_evaluation_data():
    run = {"model_name_or_path": "m", "do_train": True, "train_data_path": "A", "use_cpu": True}
    with pytest.raises(InputError, match=r"--eval_at_start .*without --eval_data_path"):
        parse(**run, eval_at_start=True)


def test_one_process_that_sees_several_gpus_is_refused(monkeypatch):
    """transformers would spread each batch over them, which neither trees nor ragged items survive."""
    monkeypatch.setattr("arguments.RewardTrainingArguments.n_gpu", 2)
    with pytest.raises(InputError, match="sees 2 GPUs; launch one a GPU with torchrun --nproc_per_node=2"):
        parse(**NEEDED)


# ------------------------------------------------------------------------------------------------ run files


def write_run(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml"


def test_run_file_holds_flags_and_given_flags_win_over_it(tmp_path):
    """Lists are several values, null is a flag that is not given, a mapping is the JSON that transformers takes."""
    path = write_run(
        tmp_path,
        f"""
model_name_or_path: {CHECKPOINT}
eval_data_path: [a.json, b.json]
add_sep_token: true
max_length: 512
learning_rate: 1e-6
tokenizer_path: null
lr_scheduler_kwargs: {{num_cycles: 2}}
use_cpu: true
""",
    )
    model_args, data_args, args = parse(config=path, max_length=64, eval_data_path="c.json")
    assert (model_args.max_length, data_args.eval_data_path) == (64, ["c.json"])
    assert (model_args.add_sep_token, model_args.tokenizer_path) == (True, None)
    assert (args.learning_rate, args.lr_scheduler_kwargs) == (1e-6, {"num_cycles": 2})
    assert parse(f"--config={path}", max_length=64)[1].eval_data_path == ["a.json", "b.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("pooling_tpye: last", "unknown flag --pooling_tpye; did you mean --pooling_type"),
        ("max_length: many", "--max_length.*many"),
        ("max_length: 8\nmax_length: 9", "run.yaml: line 1: found max_length twice"),
        ("- max_length", "run.yaml: expected a mapping"),
        ("max_length: [8", "run.yaml: .*expected a YAML file"),
    ],
)
def test_wrong_run_file_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        parse(config=write_run(tmp_path, text), **NEEDED)
    assert "\n" not in str(error.value)


def test_missing_run_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--config nowhere.yaml: .*No such file"):
        parse(config="nowhere.yaml", **NEEDED)
