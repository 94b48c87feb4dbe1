"""tools/compare_games.py: games are written by hand, and their tables are computed by hand; what it refuses."""

import re
from pathlib import Path

import pytest
from conftest import check_refusal
from written_game import FLAWLESS, play_by_hand

from tools.compare_games import in_words, main, over_games

CONTROL = FLAWLESS | {2: [1, 0, 0, 0, 0, 0]}  # two flaws in two prompts more than with APO
WHERE = {"a": {"seed": 1}, "b": {"seed": 2}, "control": {"seed": 1, "apo": False, "flawless": CONTROL}}


def write_game(folder: Path, name: str, **changes: object) -> str:
    return play_by_hand(folder, output_dir=str(folder / name), **changes)[0].output_dir


def refusal(capsys, monkeypatch, *folders: str) -> str:
    monkeypatch.setattr("sys.argv", ["compare_games.py", *folders])
    with pytest.raises(SystemExit) as exit_:
        main()
    return check_refusal(exit_.value.code, capsys.readouterr().err)


def tables(capsys, monkeypatch, *folders: str) -> list[list[list[str]]]:
    """The rows of each table that is printed, without their header."""
    monkeypatch.setattr("sys.argv", ["compare_games.py", *folders])
    main()
    found = re.findall(r"\|.*?(?=\n\n|\Z)", capsys.readouterr().out, re.DOTALL)
    rows = [[line.strip("| ").split("|") for line in table.strip().splitlines()] for table in found]
    return [[[cell.strip() for cell in row] for row in table[2:]] for table in rows]


def test_tables_by_hand(tmp_path, capsys, monkeypatch):
    """Shares of the three prompts: LLM 0 has 50, 0, 0, LLM 1 has 100, 50, 0. In the end APO has 50, 50, 0 more than
    the control: mean 33.3, s = 28.868, half 1.95996 s / sqrt(3) = 32.667.

    By the testing RM LLM 1 gains 1, 1, 2 on LLM 0, whose rewards 0, 2, 1, 1, 2, 4 have s = 1.36626: 0.976 SD."""
    folders = [write_game(tmp_path, name, **changes) for name, changes in WHERE.items()]
    flawless, control, gains, no_gain = tables(capsys, monkeypatch, *folders)
    start = "16.7 (-16.0 to 49.3)"
    assert flawless[0] == ["dpo", "APO", "2", start, "50.0 (-6.6 to 106.6)", "50.0 (-6.6 to 106.6)"]
    assert flawless[1][:4] == ["dpo", "control", "1", start] and flawless[1][-1] == start
    assert control == [["dpo", "+33.3 (+0.7 to +66.0)", "+33.3 (1)"]]
    assert [row[3:5] for row in gains] == [["+0.00 (+0.00 to +0.00)", "+0.98 (+0.50 to +1.45)"]] * 2
    assert no_gain == [["dpo", "+0.00 (+0.00 to +0.00)", "+0.00 (1)"]]


def test_prompt_that_one_game_lacks_is_left_out():
    """Prompt a: 1 and 3, mean 2; a single prompt has no interval."""
    group = [{"a": 1.0, "b": 9.0}, {"a": 3.0}]
    values = over_games(lambda results, round_: results, group, 1)
    assert values == {"a": 2.0} and in_words(values, "+.1f") == "+2.0"


def test_games_without_a_judge_or_a_control_have_one_table(tmp_path, capsys, monkeypatch):
    [gains] = tables(capsys, monkeypatch, write_game(tmp_path, "a", judge=False))
    assert gains[0][:3] == ["dpo", "APO", "1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "b: found a game of the same settings and seed; give it once"),
        ({"seed": 2, "rounds": 1}, "b: rounds differs from that of"),
        ({"seed": 2, "num_stages": 9}, "b: 0 of 2 rounds are done; play it to its end"),
    ],
    ids=str,
)
def test_games_that_cannot_be_compared_are_refused(tmp_path, capsys, monkeypatch, changes, words):
    folders = [write_game(tmp_path, "a", seed=1), write_game(tmp_path, "b", **changes)]
    assert words in refusal(capsys, monkeypatch, *folders)


def test_folder_that_is_no_game_or_was_moved_is_refused(tmp_path, capsys, monkeypatch):
    assert "found no game.json, expected the output_dir of a game" in refusal(capsys, monkeypatch, str(tmp_path))
    moved = tmp_path / "moved"
    Path(write_game(tmp_path, "a")).rename(moved)
    assert "go there" in refusal(capsys, monkeypatch, str(moved))
