"""What a process does before it begins and when it ends: logging, DeepSpeed's build tool and backend, the way out."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings


def setup_logging() -> None:
    """Logs from the main process only; the others report errors."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "DeepSpeed", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # torch.distributed, at every step under DeepSpeed
    logging.captureWarnings(True)


def prepare_deepspeed(device_type: str) -> None:
    """Makes DeepSpeed find its build tool, and start over gloo where there is no accelerator."""
    # Another `ninja` further on the path would compile everything anew, and an environment need not be activated.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    if device_type == "cpu":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def leave() -> None:
    """Ends one process of several without taking the interpreter apart.

    A finished ZeRO-3 run was once seen to abort in its shutdown, and torchrun called it failed. Not reproduced; gloo's
    threads, which outlive their process groups, are the only foreign ones at that point, and a known hazard there.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
