"""Errors in one line, the parser, atomic writing."""

import pytest

from apo.cli import InputError, OneLineParser, at_least


@pytest.mark.parametrize(
    ("least", "word", "number"),
    [(1, "1", 1), (0, "0", 0), (0.0, "0.5", 0.5), (0.0, "1e-3", 1e-3)],
)
def test_number_within_its_range_is_read(least, word, number):
    value = at_least(least)(word)
    assert value == number and type(value) is type(least)


@pytest.mark.parametrize(
    ("least", "word"), [(1, "0"), (1, "1.5"), (1, "one"), (0.0, "-0.1"), (0.0, "nan"), (0.0, "inf")]
)
def test_number_outside_its_range_is_refused_in_one_line(least, word):
    parser = OneLineParser()
    parser.add_argument("--rounds", type=at_least(least))
    with pytest.raises(InputError, match=rf"--rounds: found {word}, expected a (whole|finite) number of at least \d"):
        parser.parse_args([f"--rounds={word}"])
