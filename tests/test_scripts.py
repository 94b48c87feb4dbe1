"""The scripts as a newcomer runs them."""

import os
import subprocess

import pytest
from conftest import REPO_ROOT, read_json

SCRIPTS = sorted((REPO_ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_shell(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow
def test_quickstart_shows_what_the_method_is_for():
    """On held-out prompts the APO RM puts golden over sampled at least 10 points more often; on human pairs it loses
    at most 2."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_DATASETS_CACHE"}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=REPO_ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    base, apo = (
        {
            key: value
            for metrics in read_json(REPO_ROOT / "outputs" / "quickstart" / run / "final_eval_results.json").values()
            for key, value in metrics.items()
        }
        for run in ("rm_base", "rm_apo")
    )
    golden = "eval_golden_over_sampled_text_scores.json_accuracy"
    human = "eval_hh_cleaned_origin.test.json_accuracy"
    assert apo[golden] >= base[golden] + 0.10
    assert apo[human] >= base[human] - 0.02
    assert "rm_apo" in done.stdout.splitlines()[-1]
