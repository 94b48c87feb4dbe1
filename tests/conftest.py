"""Fixtures and helpers of all tests: tiny models, small data files, a server, and ways to run `train.py` and tools.

Nothing here needs a network or a GPU. Everything runs in one thread, because tiny models get slower with more, and the
cache of tokenised data is a fresh folder, so that no run sees what an earlier one left.
"""

# ruff: noqa: E402  the environment is settled before torch and datasets read it

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CACHE_DIR = tempfile.mkdtemp(prefix="reward_tests_")
atexit.register(shutil.rmtree, CACHE_DIR, ignore_errors=True)
os.environ |= {
    "HF_DATASETS_CACHE": CACHE_DIR,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
    os.environ.pop(name, None)

import pytest
import torch
from completion_server import CompletionServer, running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train
from apo.tokenizer import RewardTokenizer, load_reward_tokenizer
from models import RewardModel, RewardModelOutput, load_config, load_reward_model
from models import resolve_settings as resolve
from reward_datasets import RewardDataCollator

torch.set_num_threads(1)

REPO_ROOT = Path(__file__).resolve().parents[1]
PARITY = REPO_ROOT / "tests" / "parity"
CHECKPOINT = PARITY / "checkpoint"
E2E = PARITY / "e2e"
TINY_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


# ------------------------------------------------------------------------------------------------ files


def read_json(path: str | Path) -> object:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_records(path: str | Path, records: object) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def pair(prompt: str = "Why?", good: str = " Because.", bad: str = " No idea.", **fields: object) -> dict:
    """A text-scores record of two responses."""
    return {"text": [f"{prompt}<sep>{good}", f"{prompt}<sep>{bad}"], "scores": [1.0, 0.0], **fields}


def training_losses(output_dir: str | Path) -> list[float]:
    return [log["loss"] for log in read_json(Path(output_dir) / "trainer_state.json")["log_history"] if "loss" in log]


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="session")
def base_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained LLaMA in the making: no reward head, sentencepiece tokenizer."""
    folder = tmp_path_factory.mktemp("base_llama")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **TINY_SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def bpe_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a byte-level tokenizer of 300 tokens that has bos and eos and no token to spare."""
    folder = tmp_path_factory.mktemp("bpe_llama")
    make_bpe_tokenizer(["<|bos|>", "<|eos|>"]).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, **TINY_SIZES)).save_pretrained(folder)
    return folder


def copy_checkpoint(folder: Path) -> Path:
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    return folder


def make_bpe_tokenizer(special_tokens: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([f"Human: question {i}? Assistant: the answer is {i}." for i in range(99)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", **roles)


def load_model(
    path: str | Path = CHECKPOINT,
    *,
    seed: int = 42,
    with_lm_head: bool = False,
    attention: str = "sdpa",
    lora: dict | None = None,
    **flags: object,
) -> tuple[RewardModel, RewardTokenizer]:
    """Loads model and tokenizer as `train.py` does; `flags` are the settings that scoring must repeat."""
    config = load_config(str(path))
    settings = resolve(config, **flags)
    tokenizer = load_reward_tokenizer(str(path), config, settings.tokenizer_backend)
    settings.sep_token_id = tokenizer.sep_token_id
    loading = {"seed": seed, "with_lm_head": with_lm_head, "attention": attention, "lora": lora}
    model = load_reward_model(str(path), config, tokenizer, settings, **loading)
    return model.eval(), tokenizer


def forward(model: RewardModel, batch: dict, **inputs: torch.Tensor) -> RewardModelOutput:
    """Runs the model on what the collator made."""
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask", "tree") if name in batch}, **inputs)


@torch.no_grad()
def rewards_of(
    model: RewardModel, sequences: Iterable[list[int]], pad_token_id: int, padding_side: str = "right"
) -> torch.Tensor:
    """Rewards (N,) of token sequences that are scored as one batch."""
    sequences = list(sequences)
    item = {"input_ids": sequences, "scores": [0.5] * len(sequences), "is_apo": False}
    batch = RewardDataCollator(pad_token_id, padding_side)([item])
    return forward(model, batch).rewards


@pytest.fixture(scope="session")
def one_server() -> Iterator[CompletionServer]:
    with running() as server:
        yield server


@pytest.fixture
def server(one_server: CompletionServer, monkeypatch: pytest.MonkeyPatch) -> CompletionServer:
    """A server that has answered nothing yet, and its key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    return one_server.reset()


# ------------------------------------------------------------------------------------------------ running


def command_line(*parts: object, **flags: object) -> list[str]:
    """`command_line("--a", 1, b=[2, 3])` is `--a 1 --b 2 3`; a flag that is None is left out."""
    words = [str(part) for part in parts]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def run_main(*parts: object, main: Callable[[], None] = train.main, **flags: object) -> None:
    """Runs a `main()` in this process, much quicker than a new one, and puts the environment back afterwards."""
    environment, argv = dict(os.environ), sys.argv
    sys.argv = ["train.py", *command_line(*parts, **flags)]
    try:
        main()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


ON_CPU = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs the command; it must end with status 2 and one line before any weight is loaded. Returns that line."""

    def fail(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    def run(**flags) -> str:
        monkeypatch.setattr("models.load_reward_model", fail)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_main(**ON_CPU, **flags)
        return check_refusal(exit_.value.code, capsys.readouterr().err)

    return run


def check_refusal(exit_status: int, stderr: str) -> str:
    assert exit_status == 2
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, stderr
    assert stderr.rstrip().endswith(errors[0])  # nothing after it, so that the message is the one line
    return errors[0]


def training(tmp_path: Path, **flags) -> dict:
    run = {"model_name_or_path": CHECKPOINT, "do_train": True, "train_data_path": E2E / "train.json"}
    return run | {"output_dir": tmp_path / "out", "save_strategy": "no"} | flags


def log_history(output_dir: Path) -> list[dict]:
    return read_json(output_dir / "trainer_state.json")["log_history"]


def run_tool(name: str, *words: object, exit_status: int = 0) -> subprocess.CompletedProcess:
    """Runs a tool as a user does, and checks its exit status."""
    command = [sys.executable, str(REPO_ROOT / "tools" / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == exit_status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_train(
    *parts: object,
    script: str = "train.py",
    num_processes: int | None = None,
    exit_status: int = 0,
    timeout: float = 600,
    env: dict[str, str] | None = None,
    **flags: object,
) -> subprocess.CompletedProcess:
    """Runs `python train.py`, or torchrun with `num_processes`, as a user does, and checks its exit status."""
    launcher = [sys.executable]
    if num_processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
        launcher += [f"--master_port={free_port()}"]
    command = [*launcher, str(REPO_ROOT / script), *command_line(*parts, **flags)]
    process = subprocess.Popen(
        command,
        cwd=REPO_ROOT,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == exit_status, f"exit status {process.returncode}\n{stdout[-3000:]}\n{stderr[-8000:]}"
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
