"""Judges responses to the prompts of data/sample by rule: their texts come from templates, so the verdict is exact.

    python tools/dev/judge_sample.py --data_path outputs/samples/llm_sampling_game_prompts_results.json \\
        --output_path outputs/samples/verdicts.json

A response is

    polite       the first sentence is a polite one, and none is rude
    concrete     it has steps of a task
    right_task   its steps are those of the task that the prompt asks about
    flawless     all three, and without a defect

The defects, of which a response can have several; the first five are the flaws of sampled responses:

    repeats                   it has a step twice
    stops_early               it ends within a sentence
    filler                    it has a sentence without meaning
    changes_subject           it has a sentence that leads over to another task
    answers_another_question  it has steps of another task, outside of such a sentence
    runs_on                   it continues as the user
    other_text                it is not made of the templates: another sentence, or sentences or steps in another order

Prints the share of each with a 95 % interval over prompts, because the responses to one prompt are not independent.
`any_flawless` is the share of prompts with a flawless response: what a perfect selection reaches. The JSON file also
lists the qualities and defects of each response, by "<query_id>:<response key>" as rewards are.
The sentences are in `sample_texts.yaml`, from which `make_sample_data.py` writes the data.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from apo.cli import InputError, OneLineParser, describe, exit_on_input_error, sha256_of_file, write_json
from apo.prompts import SAMPLE_STOP_STRINGS, count_cuts, format_response
from apo.records import iter_preference_data, iter_records, record_kind
from apo.resume import refuse_overwriting
from apo.run_files import format_table
from apo.statistics import mean_and_interval, wilson_interval

TEXTS = yaml.safe_load(Path(__file__).with_name("sample_texts.yaml").read_text(encoding="utf-8"))
TASKS: dict[str, list[str]] = TEXTS["tasks"]
# step -> its task and its place among the task's steps; no two tasks share a step
STEPS = {step: (task, place) for task, steps in TASKS.items() for place, step in enumerate(steps)}


def one_of(texts: Iterable[str]) -> str:
    """Returns the pattern of any of the texts; where one is the start of another, the longer is tried first."""
    return "(?:" + "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) + ")"


STEP, LINK = one_of(STEPS), one_of(TEXTS["repeat_links"])
FIELDS = {"a": f"({STEP})", "b": f"({STEP})", "c": STEP, "task": one_of(TASKS), "steps": rf"({STEP})(?:{LINK}\1)+"}


def sentence(templates: Iterable[str], end: str = "") -> re.Pattern[str]:
    """Returns the pattern of a sentence by any of the templates; its groups are the steps {a}, {b} and {steps}."""
    escaped = [re.escape(template) for template in templates if template]
    filled = [re.sub(r"\\{(\w+)\\}", lambda field: FIELDS[field[1]], template) for template in escaped]
    return re.compile(f"(?:{'|'.join(filled)}){end}(?: |$)")


# kind -> pattern of a sentence; a text has the first kind that fits
SENTENCES = {
    "repeats": sentence([TEXTS["repeats"]]),
    "steps": sentence(TEXTS["steps"]),
    "unfinished": sentence([template.removesuffix(".") for template in TEXTS["steps"]], one_of(TEXTS["unfinished"])),
    **{name: sentence(TEXTS[name]) for name in ("polite_openers", "polite_closers", "rude_openers", "rude_closers")},
    **{name: sentence(TEXTS[name]) for name in ("empty_talk", "filler", "drifts")},
    "other": re.compile(r"[^.?!]*(?:[.?!]+\s*|$)"),
}
LETTERS = {"polite_openers": "o", "rude_openers": "o", "polite_closers": "c", "rude_closers": "c", "repeats": "s"}
LETTERS |= {"steps": "s", "empty_talk": "s", "unfinished": "u", "filler": "f", "drifts": "d", "other": "x"}
# Opener, steps or what stands for them with or without flaws, closer. Flaws may be combined as no template does.
ORDER = re.compile("of?(?:sf?d?c?|u)")


class Sentence(NamedTuple):
    """A sentence of a response and the steps in it, none of `drifts`."""

    kind: str
    steps: list[str]


def split_response(text: str) -> list[Sentence]:
    """Splits a response without spaces around it; what no template gives becomes sentences of the kind "other"."""
    sentences = []
    while text:
        matches = ((kind, pattern.match(text)) for kind, pattern in SENTENCES.items())
        kind, match = next((kind, match) for kind, match in matches if match)
        steps = [step for step in match.groups() if step]
        sentences.append(Sentence(kind, steps * 2 if kind == "repeats" else steps))
        text = text[match.end() :]
    return sentences


def in_order(steps: list[str]) -> bool:
    """Says whether a template can have these steps: none, or steps of one task, not in reverse."""
    places = [STEPS[step] for step in steps]
    return len({task for task, _ in places}) <= 1 and places == sorted(places)


def judge(task: str, response: str) -> dict[str, bool]:
    """Decides for each quality and defect whether a response to a question about `task` has it."""
    text = format_response(response, SAMPLE_STOP_STRINGS).strip()
    sentences = split_response(text)
    kinds = [sentence.kind for sentence in sentences]
    steps = [step for sentence in sentences for step in sentence.steps]
    tasks = {STEPS[step][0] for step in steps}
    ordered = ORDER.fullmatch("".join(LETTERS[kind] for kind in kinds)) and all(in_order(s.steps) for s in sentences)

    qualities = {
        "polite": kinds[:1] == ["polite_openers"] and not {"rude_openers", "rude_closers"} & set(kinds),
        "concrete": bool(steps),
        "right_task": tasks == {task},
    }
    defects = {
        "repeats": len(set(steps)) < len(steps),
        "stops_early": "unfinished" in kinds or not text.endswith((".", "?", "!")),
        "filler": "filler" in kinds,
        "changes_subject": "drifts" in kinds,
        "answers_another_question": not tasks <= {task},
        "runs_on": count_cuts([response], SAMPLE_STOP_STRINGS) > 0,
        "other_text": not ordered,
    }
    return qualities | {"flawless": all(qualities.values()) and not any(defects.values())} | defects


def task_of(prompt: str) -> str | None:
    """Returns the task that the last turn of a prompt asks about; None if it names no task, or several."""
    named = [task for task in TASKS if task in prompt.rpartition("\n\nHuman:")[2]]
    return named[0] if len(named) == 1 else None


def judge_file(path: Path) -> dict[str, dict[str, dict[str, bool]]]:
    """Returns {query id: {response key: verdict}} for records of sampled or golden responses, or of pairs.

    Raises:
        InputError: a prompt that is not about one task of the sample data, or that comes twice.
    """
    kind = record_kind(next(iter_records(path))[1])
    verdicts: dict[str, dict[str, dict[str, bool]]] = {}
    for record in iter_preference_data(path, kind, add_sep_token=True):
        task = task_of(record.prompts[0])
        if task is None or record.query_id in verdicts:
            found = describe(record.prompts[0][-40:]) if task is None else f"the query_id {record.query_id} again"
            expected = "a prompt of data/sample, about one of its tasks, and each once"
            raise InputError(f"{path}: {record.place}: found {found}, expected {expected}")
        responses = zip(record.response_keys, record.responses, strict=True)
        verdicts[record.query_id] = {key: judge(task, response) for key, response in responses}
    return verdicts


def share_of_prompts(shares: list[float]) -> dict[str, Any]:
    """Mean of one share per prompt, and its 95 % interval: Wilson's if each share is 0 or 1, else normal."""
    result = mean_and_interval(np.array(shares))
    if set(shares) <= {0.0, 1.0}:
        return result | {"interval_95": list(wilson_interval(result["mean"], len(shares)))}
    low, high = result["interval_95"] or (0.0, 1.0)
    return result | {"interval_95": [max(low, 0.0), min(high, 1.0)]}


def summarize(verdicts: dict[str, dict[str, dict[str, bool]]]) -> dict[str, dict[str, Any]]:
    """Returns for each quality and defect, and for `any_flawless`, the share and its interval."""
    prompts = [list(of_prompt.values()) for of_prompt in verdicts.values()]
    shares = {name: [sum(verdict[name] for verdict in one) / len(one) for one in prompts] for name in prompts[0][0]}
    shares["any_flawless"] = [float(any(verdict["flawless"] for verdict in one)) for one in prompts]
    return {name: share_of_prompts(values) for name, values in shares.items()}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    add = (parser := OneLineParser(description=__doc__)).add_argument
    add("--data_path", type=Path, required=True, help="responses: sample_0, ...; golden; or text and scores")
    add("--output_path", type=Path, required=True, help="JSON file for the shares and the verdict on each response")
    return parser.parse_args()


@exit_on_input_error
def main() -> None:
    """Reads, judges, writes, prints the table."""
    args = parse_args()
    refuse_overwriting(args.data_path, args.output_path)
    verdicts = judge_file(args.data_path)
    shares = summarize(verdicts)
    judged = [(f"{i}:{key}", verdict) for i, of_prompt in verdicts.items() for key, verdict in of_prompt.items()]
    found = {key: [name for name, holds in verdict.items() if holds] for key, verdict in judged}
    report = {"data": str(args.data_path), "sha256": sha256_of_file(args.data_path)}
    report |= {"prompts": len(verdicts), "responses": len(found), "shares": shares, "verdicts": found}
    write_json(args.output_path, report)
    percent = {name: 100 * np.array([s["mean"], *s["interval_95"]]) for name, s in shares.items()}
    rows = [(name, f"{mean:.1f}", f"{low:.1f} to {high:.1f}") for name, (mean, low, high) in percent.items()]
    print(format_table(("quality or defect", "share %", "95 % interval"), rows))
    print(f"{len(found)} responses to {len(verdicts)} prompts; written: {args.output_path}")


if __name__ == "__main__":
    main()
