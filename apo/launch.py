"""Start and end of a process: logging, ranks, DeepSpeed, the process group."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import glob
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# Messages of libraries that repeat what is logged or refused here anyway.
REDUNDANT = ("LOAD REPORT", "Setting accelerator to CPU")


def process_rank() -> int:
    """Number of this process among all; 0 is the main process, and the only one without a launcher."""
    return int(os.environ.get("RANK", "0"))


def count_processes() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def setup_logging() -> None:
    """Logs from the main process only, at the level that the environment variable LOG_LEVEL names (default: INFO)."""
    level = logging.getLevelName("ERROR" if process_rank() else os.environ.get("LOG_LEVEL", "").upper())
    level = level if isinstance(level, int) else logging.INFO  # not the name of a level
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "DeepSpeed", "filelock", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("transformers.modeling_utils", "DeepSpeed"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in REDUNDANT))
    warnings.simplefilter("ignore", FutureWarning)  # torch.distributed, at every step under DeepSpeed
    logging.captureWarnings(True)


def set_ranks_of_one_process() -> None:
    """Gives DeepSpeed the ranks that a launcher sets: a plain `python` start is a run of one process."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = "0"  # a free one, so that several runs fit on one machine


def prepare_deepspeed(device_type: str) -> None:
    """Makes DeepSpeed find its build tool, use gloo where there is no accelerator, and run no code of a checkpoint."""
    # Another `ninja` earlier on the path would compile everything anew, and an environment need not be activated.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    remove_stale_build_locks()
    import deepspeed
    import torch
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed unpickles without a limit; so torch refuses all but tensors and these.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

    def enum_member(kind: type, name: str) -> ZeroStageEnum:
        """Stands for `getattr`, by which some versions of Python pickle the member of an enum."""
        if kind is not ZeroStageEnum:
            raise UnpicklingError(f"found an attribute of {kind}, expected a member of {ZeroStageEnum}")
        return ZeroStageEnum[name]

    allowed = [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address]
    allowed += [(enum_member, "builtins.getattr")]
    torch.serialization.add_safe_globals(allowed)
    if device_type == "cpu":
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


@contextlib.contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Loads and runs models as a whole, in one process too, where ZeRO-3 would divide them among all processes."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from a seed, such as new weights; afterwards torch draws as if nothing had been drawn."""
    import torch

    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for _ in cuda:
            torch.cuda.manual_seed(seed)
        yield


def remove_stale_build_locks() -> None:
    """Deletes the locks that killed builds of PyTorch extensions left: every later run would wait for them forever.

    PyTorch keeps a lock open while it builds, so that one which no process has open is stale.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock"):
        open_files = set()
        for file in glob.iglob("/proc/[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # of another user, or closed by now
                open_files.add(os.readlink(file))
        with contextlib.suppress(FileNotFoundError):  # another process deletes it too
            is_old = time.time() - lock.stat().st_mtime > 5  # before, its process may not have opened it
            if is_old and str(lock.resolve()) not in open_files:
                lock.unlink()
                logger.warning("%s: deleted, the build that made it was killed", lock)


def end_with_launcher() -> None:
    """Makes a process of torchrun get SIGTERM when torchrun is killed, instead of running on alone (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Makes this process get SIGTERM when the one that started it is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def exit_worker(status: int = 0) -> None:
    """Closes the process group, and ends one process of several without interpreter teardown.

    In that teardown gloo's threads, which DeepSpeed keeps alive, can abort the process (PyTorch issue 190489).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and not status:  # after an error, others may still wait in it
        distributed.destroy_process_group()
    if count_processes() > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)
