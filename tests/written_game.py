"""A game whose outputs are written by hand, as the stages would; its figures can be computed by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from conftest import read_json, write_records
from tiny_game import make_game

from apo.game import Game, plan_game
from apo.stages import Records, Stage

SCRIPT = "<script>alert(1)</script>"
# Rewards of two responses to each of three test prompts.
TESTING = {0: [[0, 2], [1, 1], [2, 4]], 1: [[1, 3], [2, 2], [4, 6]], 2: [[1, 3], [2, 2], [4, 6]]}
OWN_BEFORE, OWN = [[0, 2], [0, 2], [0, 2]], [[1, 3], [1, 3], [2, 4]]
# Golden and sampled: the RM ranks both pairs of the first two prompts as it should, and none of the third.
EVALUATED = [[3, 2], [3, 1], [3, 2], [3, 1], [0, 2], [0, 1]]
FLAWLESS = {0: [1, 0, 0, 0, 0, 0], 1: [1, 1, 1, 0, 0, 0], 2: [1, 1, 1, 0, 0, 0]}


def write_rewards(path: Path, rewards: list[list[float]]) -> None:
    write_records(path, [{f"p{i}:sample_{j}": r} for i, own in enumerate(rewards) for j, r in enumerate(own)])


def write_samples(stage: Stage) -> None:
    """Responses to three prompts, one of six empty, two cut; the file is named as the flags say."""
    words = {name: values[0] for name, values in stage.flags.items() if values}
    path = stage.working / f"{words['model_prefix']}_{words['task_type']}_{words['data_suffix']}_results.json"
    texts = [" one", " three"], [" ", " four"], [SCRIPT, " x"]
    records = [{"query_id": f"p{i}", "query": "Why?", "sample_0": a, "sample_1": b} for i, (a, b) in enumerate(texts)]
    write_records(path, records)
    write_records(path.with_suffix(".settings.json"), {"broken_off": ["p0:sample_0", "p1:sample_1"]})


def write_evaluation(stage: Stage, num_evaluated: int) -> None:
    names = [path.rpartition("/")[2] for path in stage.flags["eval_data_path"]]
    sizes = [len(read_json(path)) for path in stage.flags["eval_data_path"]]
    keys = {"pairs": sizes[0], "ties": 0, "accuracy": 0.5, "calibration_ECE_bin10": 0.125}
    results = {name: {f"eval_{name}_{key}": value for key, value in keys.items()} for name in names}
    write_records(stage.working / "final_eval_results.json", results)
    if num_evaluated:
        human = [{"query_id": str(i), "rewards": [1, 0], "scores": [1, 0]} for i in range(sizes[0])]
        golden = [
            {"query_id": str(i), "rewards": r, "scores": [1, 0]} for i, r in enumerate(EVALUATED[:num_evaluated])
        ]
        write_records(stage.working / "eval_rewards.json", dict(zip(names, (human, golden), strict=True)))


def write_outputs(stage: Stage, num_evaluated: int, flawless: dict[int, list[int]]) -> None:
    """Writes what the report reads of a stage."""
    folder, k = stage.working, stage.round
    if stage.name.startswith("sample"):
        write_samples(stage)
    elif stage.name.startswith("pair"):
        texts = [[f"{'<i>' * i}Why?<sep> {SCRIPT}", f"{'<i>' * i}Why?<sep> {n}"] for i in range(3) for n in range(2)]
        records = [{"text": text, "scores": [1, 0]} for text in texts]
        write_records(folder / "golden_over_sampled_text_scores.json", records)
    elif stage.name == "evaluate_rm":
        write_evaluation(stage, num_evaluated)
    elif stage.name == "score_testing":
        write_rewards(folder / f"llm_{k}_testing_sample_test_results_pred_testing_rm_results.json", TESTING[k])
    elif stage.name == "score_own":
        for llm, rewards in ((k - 1, OWN_BEFORE), (k, OWN)):
            write_rewards(folder / f"llm_{llm}_testing_sample_test_results_pred_rm_{k}_results.json", rewards)
    elif stage.name == "select":
        curve = [{"n": n, "mean": float(n), "interval_95": [n - 0.5, n + 0.5], "prompts": 3} for n in (1, 2)]
        report = {"prompts": 3, "pairs": 2, "ties": 0.25, "prompts_left_out": [], "best_of_n": curve}
        write_records(folder / "best_report.json", report)
    elif stage.name == "judge":
        keys = [f"p{i}:sample_{j}" for i in range(3) for j in range(2)]
        verdicts = {key: ["flawless"] * holds for key, holds in zip(keys, flawless[k], strict=True)}
        shares = {"flawless": {"mean": sum(flawless[k]) / 6, "interval_95": [0.0, 1.0]}}
        write_records(folder / "verdicts.json", {"shares": shares, "verdicts": verdicts})
    else:
        write_records(folder / "all_results.json", {"num_input_tokens_seen": 12345})


def play_by_hand(
    folder: Path,
    num_stages: int | None = None,
    seconds: float = 1.0,
    num_evaluated: int = len(EVALUATED),
    flawless: dict[int, list[int]] = FLAWLESS,
    **changes: object,
) -> tuple[Game, list[Stage]]:
    """Writes a game of which the first stages are done.

    Args:
        num_evaluated: golden-over-sampled pairs with rewards; 0: the evaluation has written none.
    """
    game = make_game(folder, **{"judge": True} | changes)
    stages = plan_game(game)
    records = Records(stages)
    run = {"attempts": 1, "counts": {"pairs": 6}, "commit": "abc", "versions": {"torch": "2"}, "finished": "today"}
    for stage in stages[:num_stages]:
        write_outputs(stage, num_evaluated, flawless)
        record = {"settings": stage.settings, "inputs": records.inputs(stage), "seconds": seconds, **run}
        records.finish(stage, record)
    write_records(Path(game.output_dir) / "game.json", asdict(game))
    return game, stages
