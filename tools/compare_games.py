"""Prints what several games have brought, side by side: methods against each other, APO against its control.

    python tools/compare_games.py outputs/game_dpo outputs/game_control

Games that differ in the seed only are one row. The first table has the share of flawless responses, where the games
have a judge; the other one the gain of reward by the testing RM since LLM 0, in standard deviations (SD) of LLM 0's
rewards. The value of a prompt is the mean over its responses and over the games. Intervals are at 95 % and over
prompts; they leave the seed out: what it does is seen from the differences of each game.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from apo.cli import InputError, OneLineParser, exit_on_input_error, read_json
from apo.game import Game, plan_game
from apo.report import Results, average, deviation, differences, flawless, means
from apo.run_files import format_table

RMS = {True: "APO", False: "control"}
Values = Mapping[str, float]  # query id -> value of the prompt
Measure = Callable[[Results, int], Values]  # of an LLM: (the results of its game, its number) -> values
Groups = dict[tuple[str, str], list[Results]]  # (align_type, RM) -> games that differ in the seed


def load_game(folder: str) -> Results:
    """Reads the results of a game.

    Raises:
        InputError: no game, one that was played under another path, or one that is not finished.
    """
    settings = read_json(Path(folder, "game.json"))
    if not settings:
        raise InputError(f"{folder}: found no game.json, expected the output_dir of a game")
    try:
        game = Game(**settings)
    except TypeError as error:
        raise InputError(f"{folder}/game.json: {error}; expected the settings of this version") from error
    if Path(game.output_dir).resolve() != Path(folder).resolve():
        raise InputError(
            f"{folder}: found a game of {game.output_dir}; paths count from where it was played, go there"
        )
    results = Results(game, plan_game(game))
    if results.rounds_done < game.rounds:
        raise InputError(f"{folder}: {results.rounds_done} of {game.rounds} rounds are done; play it to its end")
    return results


def share_of_flawless(results: Results, round_: int) -> Values:
    """Returns the share of flawless responses of LLM k to each test prompt, in %."""
    return {query_id: 100 * share for query_id, share in means(flawless(results, round_)).items()}


def gain(results: Results, round_: int) -> Values:
    """Returns what LLM k has gained since LLM 0 by the testing RM on each test prompt, in SD of LLM 0's rewards."""
    first = results.rewards(0, "score_testing", 0)
    changes = differences(results.rewards(round_, "score_testing", round_), first)
    return {query_id: change / deviation(first) for query_id, change in changes.items()}


def group_games(games: list[Results]) -> Groups:
    """Groups games that differ in the seed only.

    Raises:
        InputError: a game of the group has other settings, or the same seed.
    """
    ignored = ("seed", "output_dir", "apo", "align_type", "launcher", "slurm", "server", "keep_models")
    first, groups = games[0].game, {}
    for results in sorted(games, key=lambda results: (results.game.align_type, not results.game.apo)):
        game = results.game
        changed = [name for name, value in vars(game).items() if name not in ignored and value != getattr(first, name)]
        if changed:
            raise InputError(f"{game.output_dir}: {changed[0]} differs from that of {first.output_dir}")
        group = groups.setdefault((game.align_type, RMS[game.apo]), [])
        if game.seed in [other.game.seed for other in group]:
            raise InputError(f"{game.output_dir}: found a game of the same settings and seed; give it once")
        group.append(results)
    return groups


def over_games(measure: Measure, group: list[Results], round_: int) -> Values:
    """Returns the value of each prompt, averaged over the games of a group."""
    return average_prompts([measure(results, round_) for results in group])


def average_prompts(games: list[Values]) -> Values:
    """Returns the mean value of each prompt that all games have; with --skip_refused one may lack some."""
    shared = [query_id for query_id in games[0] if all(query_id in values for values in games)]
    return {query_id: float(np.mean([values[query_id] for values in games])) for query_id in shared}


def in_words(values: Values, form: str) -> str:
    """Returns "55.2 (51.2 to 59.1)"; of one prompt the value alone."""
    figure = average(values.values())
    bounds = " to ".join(f"{bound:{form}}" for bound in figure["interval_95"] or [])
    return f"{figure['mean']:{form}}" + (f" ({bounds})" if bounds else "")


def compare_rounds(groups: Groups, measure: Measure, form: str) -> str:
    """Returns the table of what each LLM is worth by a measure, a row a group."""
    num_rounds = next(iter(groups.values()))[0].game.rounds
    rows = [
        (*names, str(len(group)), *(in_words(over_games(measure, group, k), form) for k in range(num_rounds + 1)))
        for names, group in groups.items()
    ]
    return format_table(("method", "RM", "games", *(f"LLM {k}" for k in range(num_rounds + 1))), rows, 2)


def compare_control(groups: Groups, measure: Measure, form: str) -> str | None:
    """Returns the table of APO minus control after the last round; None where no method has both."""
    rows = []
    for method in dict.fromkeys(method for method, _ in groups):
        pair = [{results.game.seed: results for results in groups.get((method, rm), [])} for rm in RMS.values()]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        of_seeds = []
        for seed in seeds:
            apo, control = (measure(games[seed], games[seed].game.rounds) for games in pair)
            of_seeds.append({query_id: apo[query_id] - control[query_id] for query_id in apo if query_id in control})
        if seeds:
            change = average_prompts(of_seeds)
            each = ", ".join(f"{np.mean(list(own.values())):{form}}" for own in of_seeds)
            rows.append((method, in_words(change, form), f"{each} ({', '.join(map(str, seeds))})"))
    return format_table(("method", "APO minus control", "each game (seed)"), rows) if rows else None


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("game_dirs", nargs="+", help="output folders of finished games")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads, groups, prints."""
    groups = group_games([load_game(folder) for folder in parse_args().game_dirs])
    judged = all(results.game.judge for group in groups.values() for results in group)
    measures = [("flawless responses, %", share_of_flawless, ".1f")] * judged
    for title, measure, form in [*measures, ("gain by the testing RM, SD", gain, "+.2f")]:
        tables = compare_rounds(groups, measure, form), compare_control(groups, measure, f"+{form.lstrip('+')}")
        print(title, *filter(None, tables), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
