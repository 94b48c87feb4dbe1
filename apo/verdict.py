"""Was the game worth it? Three sentences from the figures of a report, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Figure = Mapping[str, Any]  # "mean" and "interval_95"
NOTHING_YET = "nothing to compare yet"


def change_of(figure: Figure | None) -> str:
    """Returns "rises" or "falls" if the whole interval of a difference is on that side of 0, else "unclear"."""
    if figure is None or figure["interval_95"] is None:
        return "unclear"
    low, high = figure["interval_95"]
    return "rises" if low > 0 else "falls" if high < 0 else "unclear"


def in_words(figure: Figure, scale: float = 1, digits: int = 2, unit: str = "", sign: str = "+") -> str:
    """Returns "+0.42 (95 % interval +0.31 to +0.53)"."""
    form = f"{{:{sign}.{digits}f}}"
    text = form.format(scale * figure["mean"]) + unit
    if figure["interval_95"] is None:
        return f"{text} (no interval)"
    low, high = (form.format(scale * bound) for bound in figure["interval_95"])
    return f"{text} (95 % interval {low} to {high})"


def judge_gain(figures: Mapping[str, Any]) -> str:
    """Says what has become of the responses from LLM 0 to the last LLM."""
    since = figures["since_llm_0"]
    testing, share = since["testing"], since["flawless"]
    if not since["round"] or testing is None:
        return f"Gain: {NOTHING_YET}; LLM {int(testing is not None)} has no rewards by the testing RM."
    words = {"rises": "is better", "falls": "is worse", "unclear": "is not measurably better or worse"}
    text = f"LLM {since['round']} {words[change_of(testing)]} than LLM 0 by the testing RM: its reward changes by "
    text += f"{in_words(testing)} over {testing['prompts']} prompts"
    if share:
        text += f"; the share of flawless responses changes by {in_words(share, 100, 1, ' points')}"
        if change_of(share) == "unclear":
            text += ", which is not measurable"
        elif {change_of(share), change_of(testing)} == {"rises", "falls"}:
            text += ": judge and testing RM do not agree"
    return f"{text}."


def judge_over_optimisation(figures: Mapping[str, Any]) -> str:
    """Says whether the RMs that the LLMs learnt from and the testing RM part."""
    if not figures["gains_in_sd"]:
        return f"Over-optimisation: {NOTHING_YET}."
    last = figures["gains_in_sd"][-1]
    own, testing, excess = (change_of(last[name]) for name in ("own", "testing", "excess"))
    if own != "rises":
        verdict = "no gain by the RMs that it learnt from, so there is nothing to over-optimise"
    elif testing == "falls":
        verdict = "they part, which is over-optimisation"
    elif testing == "unclear":
        verdict = "only the RMs that it learnt from see a gain: over-optimisation, or too few prompts"
    else:
        verdict = "both rise, " + ("the RMs that it learnt from more" if excess == "rises" else "and do not part")
    row = next(row for row in figures["llm"] if row["round"] == last["round"])
    if testing == "rises" and change_of(row["testing_gain"]) == "falls" and change_of(row["own_gain"]) == "rises":
        verdict += f"; in round {row['round']} alone they part, which is over-optimisation"
    text = f"By the RMs that LLM {last['round']} learnt from the gain is {in_words(last['own'])} standard deviations,"
    return f"{text} by the testing RM {in_words(last['testing'])}: {verdict}."


def judge_rm(figures: Mapping[str, Any]) -> str:
    """Says whether the last RM still tells golden from sampled responses."""
    if not figures["rm"]:
        return f"Is there still a game: {NOTHING_YET}; no RM is evaluated."
    row = figures["rm"][-1]
    golden = row["evaluations"][-1]
    accuracy = golden["accuracy"]
    k = row["round"]
    text = f"RM {k} ranks golden over sampled responses of LLM {k - 1} in "
    text += f"{in_words(accuracy, 100, 1, ' %', '')} of {golden['pairs']} held-out pairs"
    if accuracy["interval_95"] is None:
        return f"{text}."
    low, high = accuracy["interval_95"]
    if low > 0.5:
        return f"{text}: it tells them apart, so there is still a game."
    if high < 0.5:
        return f"{text}: it prefers the sampled ones, so the LLM has won against this RM, rightly or not."
    return f"{text}: it does not tell them apart, so no game is left, or this RM has learnt too little."


def make_verdict(figures: Mapping[str, Any]) -> list[str]:
    """Returns the three sentences; `figures` are those of `apo.report.make_report`."""
    return [judge_gain(figures), judge_over_optimisation(figures), judge_rm(figures)]
