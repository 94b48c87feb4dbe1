"""A game so small that its stages take as long as their imports: files, settings, and a way to play it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from conftest import CHECKPOINT, REPO_ROOT, read_json, write_records

from apo.game import Game, read_game

SAMPLE = REPO_ROOT / "data" / "sample"
FILES = {
    "human_train": ("rm_data/hh_split_rm.train.json", 8),
    "human_all": ("hh_cleaned_origin.train.json", 8),
    "human_test": ("eval_data/hh_cleaned_origin.test.json", 6),
    "rm_golden": ("rm_data/hh_split_rm.golden.json", 4),
    "eval_golden": ("eval_data/hh_cleaned_origin_test.golden.json", 3),
    "llm_prompts": ("llm_data/hh_split_llm.train.json", 5),
    "test_prompts": ("eval_data/hh_split_llm.valid.json", 3),
}
ON_CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
TRAINING = ON_CPU | {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
TRAIN_RM = TRAINING | {"max_steps": 6, "learning_rate": 1e-3, "max_length": 128, "add_sep_token": True}
SECTIONS = {
    "train_rm": TRAIN_RM | {"apo_loss_coeff": 0.1, "apo_sample_num": 4},
    "align": TRAINING | {"max_steps": 3, "max_length": 264, "per_round": {"learning_rate": [1e-3, 5e-4, 2e-4]}},
    **dict.fromkeys(("evaluate_rm", "score", "score_own", "score_testing"), ON_CPU),
    **{name: {"max_new_tokens": 8} for name in ("sample_rm", "sample_eval", "sample_llm", "sample_test")},
}


def write_data(folder: Path) -> dict[str, str]:
    """Writes the first records of each file of data/sample; returns the paths."""
    paths = {}
    for name, (source, size) in FILES.items():
        paths[name] = str(write_records(folder / f"{name}.json", read_json(SAMPLE / source)[:size]))
    return paths


def settings(folder: Path, llm: object, **changes: object) -> dict[str, Any]:
    """The keys of a game of two rounds, whose testing RM is given; a change to None takes a key out."""
    general = {"rounds": 2, "align_type": "dpo", "testing_rm": str(CHECKPOINT), "llm": str(llm), "rm_base": str(llm)}
    found = general | {"output_dir": str(folder / "game"), "data": write_data(folder / "data")} | SECTIONS | changes
    return {name: value for name, value in json.loads(json.dumps(found)).items() if value is not None}


def write_game(folder: Path, llm: object, **changes: object) -> Path:
    """Writes the file of a game."""
    path = folder / "game.yaml"
    path.write_text(yaml.safe_dump(settings(folder, llm, **changes)), encoding="utf-8")
    return path


def make_game(folder: Path, llm: object = "llm", **changes: object) -> Game:
    return read_game(str(write_game(folder, llm, **changes)), {})


def play(config: Path, *words: object, exit_status: int = 0) -> subprocess.CompletedProcess:
    """Runs `play.py` as a user does, and checks its exit status."""
    command = [sys.executable, "play.py", "--config", str(config), *map(str, words)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == exit_status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
