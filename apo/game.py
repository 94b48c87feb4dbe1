"""The game: its settings, the plan of its stages, and the plan as text and as a shell script.

Round k: LLM k-1 responds to the RM prompts; reward model (RM) k learns from pairs of golden over these responses. LLM
k-1 responds to the LLM prompts; RM k scores the responses, and LLM k learns from the best. Round 0 holds what is done
once. Every stage is a command line of this project, see `apo.stages.Stage`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apo.cli import InputError, describe, read_config, suggest
from apo.processes import job
from apo.prompts import TEMPLATES
from apo.stages import Stage, working_folder

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, TRAIN, TRAIN_LLM = "tools/inference_llm.py", "train.py", "train_llm.py"
# The program of each stage, in the order of a round; the first two are of round 0 only.
PROGRAMS = {
    "testing_rm": TRAIN,
    "sft": TRAIN_LLM,
    "sample_rm": SAMPLE,
    "pair": "tools/apo_data_converter.py",
    "train_rm": TRAIN,
    "sample_eval": SAMPLE,
    "pair_eval": "tools/apo_data_converter.py",
    "evaluate_rm": TRAIN,
    "sample_llm": SAMPLE,
    "score": TRAIN,
    "select": "tools/rejection_sampling.py",
    "align": TRAIN_LLM,
    "sample_test": SAMPLE,
    "score_own": TRAIN,
    "score_testing": TRAIN,
    "judge": "tools/dev/judge_sample.py",
}
IN_ROUND_0 = ("testing_rm", "sft", "sample_test", "score_testing")
WITH_MODEL = (SAMPLE, TRAIN, TRAIN_LLM)  # these take a launcher and a seed
SWITCHES_TAKE_VALUES = (TRAIN, TRAIN_LLM)
SECTIONS = [name for name in PROGRAMS if name != "judge"]  # whose flags a file may give
CHOICES = {
    "align_type": ("rjs", "rrhf", "dpo"),
    "rm_start": ("base", "previous"),
    "llm_start": ("previous", "initial"),
    "dpo_reference": ("round_start", "initial"),
    "keep_models": ("all", "last"),
    "prompt_template": TEMPLATES,
    "apo": (True, False),
    "judge": (True, False),
}
DATA = {
    "human_train": "human pairs that the RMs learn from",
    "human_all": "human pairs that the testing RM learns from",
    "human_test": "human pairs that the RMs are tested on",
    "rm_golden": "golden responses to the RM prompts",
    "eval_golden": "golden responses to held-out prompts, on which the RMs are tested",
    "llm_prompts": "prompts on which the LLM is aligned",
    "test_prompts": "prompts on which the LLM is tested",
}


@dataclass
class Game:
    """The settings of a game. The names are the keys of its file, whose further keys are stages with their flags."""

    rounds: int
    output_dir: str
    llm: str
    rm_base: str
    align_type: str
    data: dict[str, list[str]]
    testing_rm: str | None = None  # a trained one; None: the game trains it
    seed: int = 42
    apo: bool = True  # False: the RM learns from human pairs only, the control
    rm_start: str = "base"
    llm_start: str = "previous"
    dpo_reference: str = "round_start"
    prompt_template: str = "plain"
    judge: bool = False  # by rule, for the prompts of data/sample
    keep_models: str = "all"
    launcher: dict[str, str] = field(default_factory=dict)  # stage -> words before the program
    slurm: dict[str, str] = field(default_factory=dict)  # stage -> options of sbatch
    server: dict[str, str] = field(default_factory=dict)  # "command" and "base_url"
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> flags

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(json.dumps(choice) for choice in choices)
                raise InputError(f"{name}: found {describe(getattr(self, name))}, expected one of {expected}")
        for name, kind in (("rounds", int), ("seed", int), ("output_dir", str), ("llm", str), ("rm_base", str)):
            value = getattr(self, name)
            if type(value) is not kind or (value < 1 if kind is int else not value):
                expected = "a whole number above 0" if kind is int else "a path"
                raise InputError(f"{name}: found {describe(value)}, expected {expected}")
        check_keys("data", self.data, DATA)
        check_keys("server", self.server, ("command", "base_url"))
        with_model = [name for name in SECTIONS if PROGRAMS[name] in WITH_MODEL]
        for name, known in (("launcher", with_model), ("slurm", SECTIONS), ("sections", SECTIONS)):
            check_keys(name, getattr(self, name), known)
        for name in ("launcher", "slurm", "server"):
            for key, words in getattr(self, name).items():
                check_words(f"{name}: {key}", words)
        for name, flags in self.sections.items():
            if not isinstance(flags, dict) or not isinstance(flags.get("per_round") or {}, dict):
                raise InputError(f"{name}: found {describe(flags)}, expected flags of {PROGRAMS[name]}")
        if self.server and len(self.server) < 2:
            raise InputError(f"server: found only {', '.join(self.server)}, expected command and base_url")
        if self.server and (both := [name for name in self.slurm if PROGRAMS[name] == SAMPLE]):
            raise InputError(f"slurm: {both[0]} gets its responses from the server, which is started on this machine")
        self._check_data()

    def _check_data(self) -> None:
        unused = {"rm_golden": not self.apo, "human_all": self.testing_rm is not None}
        for name, what in DATA.items():
            paths = self.data.get(name) or []
            self.data[name] = paths = paths if isinstance(paths, list) else [paths]
            if wrong := [path for path in paths if not isinstance(path, str)]:
                raise InputError(f"data: {name}: found {describe(wrong[0])}, expected {what}")
            found = "several files" if len(paths) > 1 and not name.startswith("human") else ""
            found = found or "none" * (not paths and not unused.get(name))
            if found:
                raise InputError(f"data: {name}: found {found}, expected {what}")

    def check_files(self) -> None:
        """Raises an InputError for the first data file that does not exist; a plan can be printed without them."""
        for name, paths in self.data.items():
            if missing := [path for path in paths if not Path(str(path)).is_file()]:
                raise InputError(f"data: {name}: {missing[0]}: no such file; expected {DATA[name]}")


def read_game(path: str, changes: Mapping[str, Any]) -> Game:
    """Reads a file of the game.

    Args:
        changes: values that win over those of the file.

    Raises:
        InputError: see `apo.cli.read_config`; an unknown or missing key, or a value that is none.
    """
    settings = read_config(path) | changes
    general = [field.name for field in fields(Game) if field.name != "sections"]
    required = ("rounds", "output_dir", "llm", "rm_base", "align_type", "data")
    try:
        check_keys("", settings, [*general, *SECTIONS])
        given = [name for name in SECTIONS if name in settings]
        if isinstance(settings.get("testing_rm"), str):  # a trained one, and not the flags of its training
            given.remove("testing_rm")
        sections = {name: settings.pop(name) or {} for name in given}
        if missing := [name for name in required if name not in settings]:
            raise InputError(f"found no {missing[0]}, expected it; see docs/game.md")
        return Game(**settings, sections=sections)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def check_keys(name: str, found: Any, known: Collection[str]) -> None:
    """Raises an InputError, with a suggestion, for the first key that is not known; `name` is where they are."""
    where = f"{name}: " if name else ""
    if not isinstance(found, dict):
        raise InputError(f"{where}found {describe(found)}, expected a mapping with keys among {', '.join(known)}")
    for key in found:
        if key not in known:
            hint = suggest(str(key), known) or f"expected one of {', '.join(known)}"
            raise InputError(f"{where}unknown key {key}; {hint}")


def check_words(name: str, words: Any) -> None:
    """Raises an InputError if a value is no line of words for a shell."""
    try:
        if not isinstance(words, str):
            raise ValueError("no text")
        shlex.split(words)
    except ValueError as error:
        raise InputError(f"{name}: found {describe(words)} ({error}), expected words as in a shell") from error


# ------------------------------------------------------------------------------------------------ plan


class Planner:
    """Makes the stages of a game, in the order in which they run."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.stages: list[Stage] = []

    def add(self, round_: int, name: str, **flags: Any) -> str:
        """Adds a stage and returns its folder.

        Args:
            flags: those that the game sets; the others come from the section of the stage.
        """
        game, program = self.game, PROGRAMS[name]
        folder = Path(game.output_dir, f"round_{round_}", name)
        output = {"output_path": working_folder(folder) / "verdicts.json"} if name == "judge" else {}
        flags |= output or {"output_dir": working_folder(folder)}
        flags |= {"resume_from_checkpoint": True} if flags.get("do_train") else {}
        if program in WITH_MODEL:
            flags["seed"] = game.seed + (round_ if program == SAMPLE else 0)  # new draws in each round
        given = self.flags_of(round_, name)
        if both := given.keys() & flags.keys():
            raise InputError(f"{name}: {min(both)} is set by the game ({flags[min(both)]}); leave it out")
        with_server = program == SAMPLE and bool(game.server)
        flags |= {"engine": "openai", "base_url": game.server["base_url"]} if with_server else {}
        words = {key: to_words(value, program) for key, value in {**flags, **given}.items()}
        words = {key: values for key, values in words.items() if values is not None}
        launcher = tuple(shlex.split(game.launcher.get(name, "python"))) if program in WITH_MODEL else ("python",)
        slurm = game.slurm.get(name)
        self.stages.append(Stage(round_, name, folder, launcher, program_path(program), words, slurm, with_server))
        return str(folder)

    def flags_of(self, round_: int, name: str) -> dict[str, Any]:
        """Returns the flags of a section, with the values of the round for those under `per_round`."""
        section = self.game.sections.get(name, {})
        given = {flag: value for flag, value in section.items() if value is not None}
        per_round = given.pop("per_round", {})
        for flag, values in per_round.items():
            expected = "no such key: the stage runs in round 0 too" if name in IN_ROUND_0 else ""
            if flag in given:
                expected = expected or f"no {flag} beside it"
            if not isinstance(values, list) or len(values) < self.game.rounds:
                expected = expected or f"a list of {self.game.rounds} values, one a round"
            if expected:
                raise InputError(f"{name}: per_round: {flag}: found {describe(values)}, expected {expected}")
            given[flag] = values[round_ - 1]
        without = ("apo_", "rm_kl_coeff") if name == "train_rm" and not self.game.apo else ()
        without = ("beta",) if name == "align" and self.game.align_type != "dpo" else without
        return {flag: value for flag, value in given.items() if not flag.startswith(without)}

    def sample(self, round_: int, name: str, llm: str, number: int, data: str, task_type: str = "sampling") -> str:
        """Adds a stage in which LLM `number` responds to prompts; returns the file of its responses."""
        flags = {"model_name_or_path": llm, "model_prefix": f"llm_{number}", "task_type": task_type}
        flags |= {"data_path": self.game.data[data][0], "data_suffix": name}
        folder = self.add(round_, name, **flags, prompt_template=self.game.prompt_template)
        return f"{folder}/llm_{number}_{task_type}_{name}_results.json"

    def pair(self, round_: int, name: str, golden: str, samples: str) -> str:
        """Adds a stage that makes golden-over-sampled pairs; returns their file."""
        flags = {"golden_data_path": self.game.data[golden][0], "sample_data_path": samples}
        folder = self.add(round_, name, **flags, apo_data_name="golden_over_sampled")
        one_each = "_sampled" if self.game.sections.get(name, {}).get("sampling") else ""
        return f"{folder}/golden_over_sampled{one_each}_text_scores.json"

    def score(self, round_: int, name: str, rm: str, suffix: str, *data_paths: str) -> str:
        """Adds a stage in which a reward model scores responses; returns its folder."""
        flags = {"task_type": "inference", "data_type": "reject_sample", "model_name_or_path": rm}
        return self.add(round_, name, **flags, eval_data_path=data_paths, data_suffix=suffix)


def plan_game(game: Game) -> list[Stage]:
    """Returns all stages, in the order in which they run."""
    planner, data = Planner(game), game.data
    llm, testing_rm = game.llm, game.testing_rm
    human_training = {"task_type": "training", "do_train": True}
    if testing_rm is None:
        flags = {**human_training, "model_name_or_path": game.rm_base, "train_data_path": data["human_all"]}
        testing_rm = planner.add(0, "testing_rm", **flags)
    if "sft" in game.sections:
        template = game.prompt_template
        llm = planner.add(0, "sft", align_type="sft", do_train=True, model_name_or_path=llm, prompt_template=template)

    def test_llm(round_: int, rm: str | None, earlier: str | None = None) -> str:
        responses = planner.sample(round_, "sample_test", llm, round_, "test_prompts", "testing")
        if rm:
            planner.score(round_, "score_own", rm, f"rm_{round_}", earlier, responses)
        planner.score(round_, "score_testing", testing_rm, "testing_rm", responses)
        if game.judge:
            planner.add(round_, "judge", data_path=responses)
        return responses

    initial_llm, rm, responses = llm, game.rm_base, test_llm(0, None)
    for k in range(1, game.rounds + 1):
        # ---- the reward model's move
        if game.apo:
            samples = planner.sample(k, "sample_rm", llm, k - 1, "rm_golden")
            pairs = [planner.pair(k, "pair", "rm_golden", samples)]
        if game.apo or game.rm_start == "previous" or k == 1:
            training = {"task_type": "apo", "do_train": True} if game.apo else human_training
            training = {**training, "model_name_or_path": game.rm_base if game.rm_start == "base" else rm}
            train_data = [*data["human_train"], *(pairs if game.apo else [])]
            rm = planner.add(k, "train_rm", **training, train_data_path=train_data)
        samples = planner.sample(k, "sample_eval", llm, k - 1, "eval_golden")
        pairs_eval = planner.pair(k, "pair_eval", "eval_golden", samples)
        planner.add(k, "evaluate_rm", model_name_or_path=rm, eval_data_path=[*data["human_test"], pairs_eval])

        # ---- the LLM's move
        samples = planner.sample(k, "sample_llm", llm, k - 1, "llm_prompts")
        scores = planner.score(k, "score", rm, f"rm_{k}", samples)
        score_path = f"{scores}/{Path(samples).stem}_pred_rm_{k}_results.json"
        selection = {"data_path": samples, "score_path": score_path, "output_file_name": "best.json", "to_pairs": True}
        best = planner.add(k, "select", **selection) + "/best_text_scores.json"
        start = llm if game.llm_start == "previous" else initial_llm
        training = {"align_type": game.align_type, "do_train": True, "model_name_or_path": start}
        training["train_data_path"] = best
        if game.align_type == "dpo":
            training["reference_model"] = start if game.dpo_reference == "round_start" else initial_llm
        llm = planner.add(k, "align", **training, prompt_template=game.prompt_template)
        responses = test_llm(k, rm, responses)
    return planner.stages


def to_words(value: Any, program: str) -> list[str] | None:
    """Returns the values of a flag as words; None if the flag is not given. A null is a flag that is not given."""
    if isinstance(value, bool):
        if program in SWITCHES_TAKE_VALUES:
            return [json.dumps(value)]
        return [] if value else None
    if value is None:
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    return [json.dumps(word) if isinstance(word, dict) else str(word) for word in values]


def program_path(program: str) -> str:
    """Returns where a program is: "train.py" in the folder of the project, else its whole path."""
    path = ROOT / program
    return program if Path(program).resolve() == path else str(path)


# ------------------------------------------------------------------------------------------------ words


def describe_game(game: Game) -> str:
    """Returns who starts from whom, in a few lines."""
    paper, unknown = " (the paper's choice)", " (the paper does not say)"
    human = ", ".join(game.data["human_train"])
    rm = f"from {'the base, ' + game.rm_base if game.rm_start == 'base' else 'RM k-1, the first from ' + game.rm_base}"
    rm += f", on {human}" + (" and golden over sampled of LLM k-1" if game.apo else " only: the control")
    if not game.apo and game.rm_start == "base":
        rm += "; trained once, in round 1, and the RM of all rounds"
    rm += paper * (game.apo and game.rm_start == "base")
    testing = game.testing_rm or f"trained once, from {game.rm_base} on {', '.join(game.data['human_all'])}"
    llm = "LLM k-1" + paper if game.llm_start == "previous" else "LLM 0"
    lines = [
        f"game in {game.output_dir}: {game.rounds} rounds of {game.align_type}, seed {game.seed}",
        f"  testing RM: {testing}; no player learns from it",
        f"  LLM 0: {game.llm}" + ", fine-tuned (0/sft)" * ("sft" in game.sections),
        f"  RM k: {rm}",
        f"  LLM k: from {llm}, on its own responses as RM k scores them",
    ]
    if game.align_type == "dpo":
        is_start = game.dpo_reference == "round_start"
        lines.append(f"  DPO reference: {'what LLM k starts from' if is_start else 'LLM 0'}{unknown}")
    where = f"a server: {game.server['command']}" if game.server else "this project's own engine"
    return "\n".join([*lines, f"  responses: from {where}"])


def server_command(game: Game, model: str) -> list[str]:
    """Returns the words that start the server of a model."""
    return [word.replace("{model}", model) for word in shlex.split(game.server["command"])]


def shell_script(game: Game, stages: list[Stage]) -> str:
    """Returns a script that plays the stages, with the paths of the game; bash stops at the first that fails."""
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in describe_game(game).splitlines()), "set -euo pipefail"]
    lines += [f"cd {shlex.quote(os.getcwd())}"]
    for stage in stages:
        logs = stage.working / "logs"
        lines += ["", f"# {stage.label}", f"mkdir -p {shlex.quote(str(logs))}"]
        words = shlex.join(stage.command if stage.slurm is None else job(stage, logs / "attempt_1.log"))
        if stage.with_server:
            models = shlex.quote(f"{game.server['base_url']}/models")
            lines += [f"{shlex.join(server_command(game, stage.flags['model_name_or_path'][0]))} & server=$!"]
            lines += ["trap 'kill $server' EXIT"]
            lines += [f"until curl --silent --fail {models} >/dev/null; do kill -0 $server; sleep 1; done"]
        lines += [words]
        lines += ["trap - EXIT; kill $server; wait $server || true"] if stage.with_server else []
        lines += [f"mv -T {shlex.quote(str(stage.working))} {shlex.quote(str(stage.folder))}"]
    return "\n".join(lines)
