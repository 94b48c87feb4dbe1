"""How a process begins and ends."""

import subprocess
import sys

import pytest
from conftest import REPO_ROOT

SCRIPT = """
import atexit
from apo.launch import leave

class Lingering:
    def __del__(self):
        print("taken apart")

lingering = Lingering()
atexit.register(print, "exit handler")
print("work")
leave()
"""


@pytest.mark.parametrize(
    "world_size, expected", [("2", "work\nexit handler\n"), ("1", "work\nexit handler\ntaken apart\n")]
)
def test_one_process_of_several_leaves_with_its_exit_handlers_but_is_not_taken_apart(
    world_size, expected, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPO_ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
