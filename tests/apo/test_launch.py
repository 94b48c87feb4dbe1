"""How a process starts and ends."""

import os

import torch.distributed as dist

from apo.launch import end_distributed, set_ranks_of_one_process

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_process_without_launcher_becomes_a_run_of_one_and_ends_it(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    set_ranks_of_one_process()
    ranks = dict(os.environ)
    assert (ranks["RANK"], ranks["LOCAL_RANK"], ranks["WORLD_SIZE"]) == ("0", "0", "1")
    monkeypatch.undo()
    for name in NAMES:
        monkeypatch.setenv(name, ranks[name])
    dist.init_process_group("gloo")
    end_distributed()
    assert not dist.is_initialized()
    end_distributed()  # nothing to end


def test_ranks_of_a_launcher_are_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "3"})
    set_ranks_of_one_process()
    assert os.environ == {"RANK": "3"}
