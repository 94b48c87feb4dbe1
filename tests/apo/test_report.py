"""The report of a game: a folder is written by hand, as the stages would, and its figures are computed by hand."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import read_json
from tiny_game import write_data
from written_game import SCRIPT, play_by_hand

from apo.cli import InputError
from apo.game import Game
from apo.report import make_report
from apo.report_page import render_page, write_page
from apo.stages import Records, Stage
from apo.statistics import wilson_interval
from apo.verdict import change_of, judge_gain, judge_over_optimisation, judge_rm


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> tuple[Game, list[Stage]]:
    return play_by_hand(tmp_path_factory.mktemp("played"))


@pytest.fixture(scope="module")
def report(played) -> dict:
    return make_report(*played)


def figures_of(report: dict) -> dict:
    """All that two equal games share."""
    return {name: value for name, value in report.items() if name not in ("game", "players", "stages")}


def paper_rows(report: dict) -> dict[str, list[str]]:
    """The rows of the tables that have the paper's figures, by their first cell."""
    page = render_page(report).partition("The paper beside it")[2].partition("<h2>")[0]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL) for row in page.split("<tr>")]
    return {cells[0]: [cell.strip() for cell in cells[1:]] for cells in rows if cells}


# ------------------------------------------------------------------------------------------------ figures


def test_reward_by_the_testing_rm_by_hand(report):
    """Means of the prompts: LLM 0 has 1, 1, 3, LLM 1 has 2, 2, 5; differences 1, 1, 2: mean 4/3, s = 0.57735, half
    1.95996 s / sqrt(3) = 0.65332. LLM 2 has the rewards of LLM 1."""
    first, second, third = report["llm"]
    assert first["testing_reward"]["mean"] == pytest.approx(5 / 3) and first["testing_gain"] is None
    gain = second["testing_gain"]
    assert gain["mean"] == pytest.approx(4 / 3) and gain["prompts"] == 3
    assert gain["interval_95"] == pytest.approx([4 / 3 - 0.65332, 4 / 3 + 0.65332], abs=1e-5)
    assert third["testing_gain"] == {"mean": 0.0, "interval_95": [0.0, 0.0], "prompts": 3}
    assert report["since_llm_0"]["round"] == 2 and report["since_llm_0"]["testing"] == gain


def test_gains_in_standard_deviations_by_hand(report):
    """RM k gives LLM k-1 0 and 2 three times, s = sqrt(6/5); gains 1, 1, 2 a round: 4/3 / s, and twice that after
    round 2. The testing RM gives LLM 0 the rewards 0, 2, 1, 1, 2, 4, s = sqrt((62/6 - 1)/5) = 1.36626."""
    one, two = report["gains_in_sd"]
    assert one["own"]["mean"] == pytest.approx(4 / 3 / math.sqrt(6 / 5))
    assert two["own"]["mean"] == pytest.approx(2 * one["own"]["mean"])
    assert one["testing"]["mean"] == two["testing"]["mean"] == pytest.approx(4 / 3 / 1.36626, abs=1e-5)
    assert two["excess"]["mean"] == pytest.approx(two["own"]["mean"] - two["testing"]["mean"])


def test_accuracy_counts_prompts_and_not_pairs(report):
    """Pairs have no id; three prompts with 2, 2 and 0 of 2 pairs are as good as 2 independent pairs."""
    human, golden = report["rm"][0]["evaluations"]
    assert human["data"] == "human_test.json" and human["accuracy"]["mean"] == 1.0 and human["prompts"] == 6
    assert golden["data"] == "golden over sampled" and golden["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert golden["accuracy"]["interval_95"] == pytest.approx(wilson_interval(2 / 3, 2))
    assert (golden["pairs"], golden["prompts"], golden["ece"], golden["ece_bins"]) == (6, 3, 0.125, 10)


def test_responses_selection_and_judge_by_hand(report):
    """Characters without spaces around: "one", "three"; "", "four"; the script of 25 and "x". Flawless of the prompts:
    1/2, 0, 0, then 1, 1/2, 0: differences 1/2, 1/2, 0. KL of best of two: log 2 - 1/2."""
    row = report["llm"][0]
    assert row["characters"]["mean"] == pytest.approx((4 + 2 + 13) / 3)
    assert row["empty"] == pytest.approx(1 / 6) and row["broken_off"] == pytest.approx(2 / 6)
    assert report["since_llm_0"]["flawless"]["mean"] == pytest.approx(1 / 3)
    [one, two] = report["selection"][0]["best_of_n"]
    assert one["kl"] == 0 and two["kl"] == pytest.approx(math.log(2) - 0.5)


def test_examples_are_held_out_prompts_with_their_rewards(report):
    examples = report["examples"]
    assert examples["round"] == 2
    assert sorted(example["prompt"] for example in examples["prompts"]) == ["<i><i>Why?", "<i>Why?", "Why?"]
    [example] = [example for example in examples["prompts"] if example["prompt"] == "<i><i>Why?"]
    assert example["golden"] == (f" {SCRIPT}", 0) and example["best"] == (" 0", 2) and example["worst"] == (" 1", 1)


def test_models_and_stages_are_reported(report):
    players = {row["stage"]: (row["start"], row["reference"]) for row in report["players"]}
    assert players["2/train_rm"] == ("llm", None) and players["2/align"] == ("1/align", "1/align")
    assert [row["tokens_trained"] for row in report["stages"] if row["stage"] == "1/align"] == [12345]
    assert report["rounds_done"] == 2


def test_equal_games_have_equal_figures(report, tmp_path):
    again = make_report(*play_by_hand(tmp_path, seconds=2.0))
    assert figures_of(again) == figures_of(report) and again["stages"] != report["stages"]
    assert str(tmp_path) not in json.dumps(figures_of(again))


@pytest.mark.parametrize("num_stages", range(0, 31, 2))
def test_half_a_game_has_the_figures_of_what_is_done(tmp_path, report, num_stages):
    """Those that are there are those of the whole game, and the report changes nothing in the folder."""
    game, stages = play_by_hand(tmp_path, num_stages)
    before = sorted(tmp_path.rglob("*"))
    found = make_report(game, stages)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(found["stages"]) == num_stages and len(found["verdict"]) == 3
    for name in ("rm", "selection", "gains_in_sd"):
        assert found[name] == report[name][: len(found[name])]
    for row, whole in zip(found["llm"], report["llm"], strict=False):
        assert all(value in (None, whole[name]) for name, value in row.items())


def test_control_and_game_without_a_judge_have_a_page(tmp_path):
    report = make_report(*play_by_hand(tmp_path, apo=False, align_type="rjs", judge=False))
    assert [row["golden_over_sampled_pairs_learnt"] for row in report["rm"]] == [0, 0]
    assert report["since_llm_0"]["flawless"] is None and "flawless" not in report["verdict"][0]
    page = PageParser(render_page(report))
    assert "the control: human pairs only" in page.text and "Judged by rule" not in page.text
    rows = paper_rows(report)
    assert rows["base RM"][0].startswith("100.0") and rows["RM of round 1"][0] == rows["RM of round 2"][0] == "–"


def test_evaluation_of_an_earlier_version_has_no_interval(tmp_path):
    report = make_report(*play_by_hand(tmp_path, num_evaluated=0))
    golden = report["rm"][0]["evaluations"][-1]
    assert golden["accuracy"] == {"mean": 0.5, "interval_95": None} and golden["prompts"] is None
    assert report["examples"] is None and "50.0 % (no interval) of 6 held-out pairs." in report["verdict"][2]
    render_page(report)


def test_stage_that_its_game_is_about_to_rename_is_left_to_it(tmp_path):
    game, stages = play_by_hand(tmp_path, 2)
    stages[1].folder.rename(stages[1].working)
    assert [row["stage"] for row in make_report(game, stages)["stages"]] == ["0/sample_test"]
    assert stages[1].working.is_dir()


def test_game_whose_llm_0_is_drawn_again_has_no_gain_and_no_start(tmp_path):
    game, stages = play_by_hand(tmp_path)
    for stage in Records(stages).made_from("0/sample_test"):
        shutil.rmtree(stage.folder)
    report = make_report(game, stages)
    assert report["verdict"][0] == "Gain: nothing to compare yet; LLM 0 has no rewards by the testing RM."
    assert paper_rows(report)["start"][0] == "–"


def test_evaluation_of_the_first_records_only(tmp_path):
    """Of the six golden-over-sampled pairs, --debug_mode evaluates the first five: four are ranked as they should."""
    game, stages = play_by_hand(tmp_path, num_evaluated=5)
    golden = make_report(game, stages)["rm"][0]["evaluations"][-1]
    assert golden["accuracy"]["mean"] == pytest.approx(4 / 5) and golden["prompts"] == 3


def test_stage_that_does_not_fit_is_refused(tmp_path):
    game, stages = play_by_hand(tmp_path)
    stages[0].folder.joinpath("llm_0_testing_sample_test_results.json").write_text("[]")
    with pytest.raises(InputError, match=r"0/sample_test: .*_results.json was changed; restore it, or --redo"):
        make_report(game, stages)


# ------------------------------------------------------------------------------------------------ verdict


def figure(low: float, high: float) -> dict:
    return {"mean": (low + high) / 2, "interval_95": [low, high]}


def test_verdict_has_its_figures(report):
    gain, over_optimisation, rm = report["verdict"]
    assert "LLM 2 is better than LLM 0 by the testing RM" in gain and "+1.33 (95 % interval +0.68 to +1.99)" in gain
    assert "flawless responses changes by +33.3 points" in gain
    assert (
        "the gain is +2.43 (95 %" in over_optimisation
        and "both rise, the RMs that it learnt from more" in rm + over_optimisation
    )
    assert "RM 2 ranks golden over sampled responses of LLM 1 in 66.7 % (95 % interval" in rm and "does not tell" in rm


@pytest.mark.parametrize(
    ("own", "testing", "words"),
    [
        (figure(1, 2), figure(-2, -1), "they part, which is over-optimisation"),
        (figure(1, 2), figure(-1, 1), "only the RMs that it learnt from see a gain"),
        (figure(1, 2), figure(1, 2), "both rise, and do not part"),
        (figure(-1, 2), figure(1, 2), "no gain by the RMs that it learnt from"),
    ],
)
def test_over_optimisation_is_named(own, testing, words):
    rows = [{"round": 1, "own": own, "testing": testing, "excess": figure(-1, 1)}]
    llm = [{"round": 1, "testing_gain": testing, "own_gain": own}]
    assert words in judge_over_optimisation({"gains_in_sd": rows, "llm": llm})


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.6, 0.8, "still a game"), (0.4, 0.6, "no game is left"), (0.1, 0.4, "prefers the sampled")],
)
def test_rm_that_cannot_tell_ends_the_game(low, high, words):
    row = {"round": 1, "evaluations": [{"accuracy": figure(low, high), "pairs": 9}]}
    assert words in judge_rm({"rm": [row]})


@pytest.mark.parametrize(("share", "agree"), [(figure(0.1, 0.2), False), (figure(-0.2, -0.1), True)])
def test_judge_and_testing_rm_disagree_if_one_rises_and_the_other_falls(share, agree):
    since = {"round": 1, "testing": figure(-2, -1) | {"prompts": 3}, "flawless": share}
    assert ("do not agree" in judge_gain({"since_llm_0": since})) != agree
    since["testing"] = figure(-2, 1) | {"prompts": 3}
    assert "do not agree" not in judge_gain({"since_llm_0": since})


def test_change_needs_an_interval_on_one_side_of_zero():
    assert change_of({"mean": 5.0, "interval_95": None}) == change_of(None) == change_of(figure(-1, 5)) == "unclear"


# ------------------------------------------------------------------------------------------------ page


class PageParser(HTMLParser):
    """Checks that elements are closed in order, and collects tags, ids, links and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            self.ids += [value] * (name == "id")
            self.links += [value] * (name in ("src", "href", "xlink:href", "action", "data"))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_one_file_without_scripts_and_texts_are_escaped(report, tmp_path):
    path = write_page(tmp_path / "report", report)
    page = path.read_text(encoding="utf-8")
    parser = PageParser(page)
    assert parser.open == [] and not parser.tags & {"script", "link", "iframe", "img", "object", "base"}
    assert SCRIPT in parser.text and "<script" not in page and "<i>" not in page
    assert len(parser.ids) == len(set(parser.ids)) and {link.removeprefix("#") for link in parser.links} <= {
        *parser.ids
    }
    assert all(link.startswith("#") for link in parser.links)
    assert {*re.findall(r"url\((.)", page)} <= {"#"} and "@import" not in page
    assert page.count("<svg") == 4
    for sentence in report["verdict"]:
        assert sentence in parser.text
    assert read_json(tmp_path / "report" / "report.json")["verdict"] == report["verdict"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "report.json"]


@pytest.mark.parametrize("num_stages", [0, 1, 2, 9, 20])
def test_page_of_half_a_game(tmp_path, num_stages):
    parser = PageParser(render_page(make_report(*play_by_hand(tmp_path, num_stages))))
    assert parser.open == [] and ("Nothing yet." in parser.text) == (num_stages < 20)


def test_file_name_is_no_formula(tmp_path):
    name = r"a $\x$.json"
    data = write_data(tmp_path / "src")
    data["human_test"] = str(Path(data["human_test"]).rename(tmp_path / name))
    assert name in PageParser(render_page(make_report(*play_by_hand(tmp_path, data=data)))).text


def test_page_is_the_same_each_time(report):
    assert render_page(report) == render_page(report)
