"""How a process starts and ends."""

import os
import subprocess
import sys

import pytest
from conftest import REPO_ROOT

from apo.launch import remove_stale_build_locks, set_ranks_of_one_process

ENDS = """
import atexit, os
import torch.distributed as dist
from apo.launch import exit_worker, set_ranks_of_one_process

class Kept:
    def __del__(self):
        print("teardown")

kept = Kept()
atexit.register(print, "exit handler")
set_ranks_of_one_process()
dist.init_process_group("gloo")
os.environ["WORLD_SIZE"] = "{world_size}"
exit_worker()
print(dist.is_initialized())
"""


def test_process_without_launcher_becomes_a_run_of_one(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    set_ranks_of_one_process()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]
    assert {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@pytest.mark.parametrize(("world_size", "printed"), [(1, "False\nexit handler\nteardown\n"), (2, "exit handler\n")])
def test_worker_closes_its_group_and_skips_the_teardown_if_it_is_one_of_several(world_size, printed):
    """Exit handlers run in both cases."""
    command = [sys.executable, "-c", ENDS.format(world_size=world_size)]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, env=environment, cwd=REPO_ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_ranks_of_a_launcher_are_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "3"})
    set_ranks_of_one_process()
    assert os.environ == {"RANK": "3"}


def test_lock_of_a_killed_build_is_deleted_and_one_of_a_running_build_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held, new = (tmp_path / name / "lock" for name in ("stale", "held", "new"))
    for lock in (stale, held, new):
        lock.parent.mkdir()
        lock.touch()
    for lock in (stale, held):
        os.utime(lock, (0, 0))
    with held.open():
        remove_stale_build_locks()
    assert [lock.exists() for lock in (stale, held, new)] == [False, True, True]
    assert f"{stale}: deleted" in caplog.text


READS_CHECKPOINTS = """
import io, sys, torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from apo.launch import prepare_deepspeed

class Attribute:
    def __init__(self, *words): self.words = words
    def __reduce__(self): return getattr, self.words

def reload(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)

prepare_deepspeed("cuda")
assert reload(Attribute(ZeroStageEnum, "weights")) is ZeroStageEnum.weights
try:
    reload(Attribute(LossScaler, "__init__"))
except Exception as error:
    print(error)
"""


def test_checkpoint_of_deepspeed_may_hold_members_of_its_enum_but_no_other_attributes():
    """Python 3.11.2, for one, pickles the member of an enum as `getattr(kind, name)`."""
    done = subprocess.run([sys.executable, "-c", READS_CHECKPOINTS], cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "expected a member of" in done.stdout
