"""Sampling end to end: the same file after any interruption, on any number of processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPO_ROOT, command_line, free_port, pair, read_json, write_records

from apo.generation import DECODING, LLAMA_2_CHAT_SAMPLING, Decoding
from tools import inference_llm

NAME = "llm_sampling_p"
QUERIES = [
    "Why?",
    "How do bees find their way home in the rain?",
    "What is it?",
    "Tell me more about the sea, please.",
    "And then?",
    "Who was the first to climb that hill, and when?",
    "Is it late?",
]
PROMPTS = [f"\n\nHuman: {query}\n\nAssistant:" for query in QUERIES]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("apo.server.RETRY_DELAY", 0.01)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_records(tmp_path / "p.json", [pair(q, query_id=f"id {i}") for i, q in enumerate(PROMPTS)])


def flags(model: object, data: Path, folder: Path, **changes: object) -> dict[str, object]:
    return {
        "model_name_or_path": model,
        "model_prefix": "llm",
        "data_path": data,
        "output_dir": folder,
        "task_type": "sampling",
        "num_samples": 2,
        "max_new_tokens": 6,
        "per_device_eval_batch_size": 2,
        **changes,
    }


@pytest.fixture
def sample(monkeypatch, base_llama, data, tmp_path):
    """Runs the tool in this process and returns the path of its result; torchrun sets `rank` and `world`."""

    def run(folder: str = "out", rank: int = 0, world: int = 1, **changes: object) -> Path:
        options = flags(base_llama, data, tmp_path / folder, **changes)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr(sys, "argv", ["inference_llm.py", *command_line(**options)])
        monkeypatch.setattr("apo.cli.exit_worker", sys.exit)  # of several processes it would end this one
        inference_llm.main()
        return tmp_path / folder / f"{NAME}_results.json"

    return run


def start_tool(options: dict[str, object], num_processes: int = 0) -> subprocess.Popen:
    launcher = [sys.executable]
    if num_processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
        launcher += [f"--master_port={free_port()}"]
    command = [*launcher, str(REPO_ROOT / "tools" / "inference_llm.py"), *command_line(**options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def num_finished(folder: Path) -> int:
    """Items that were kept; each starts with a line break."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.partial.jsonl"))


# ------------------------------------------------------------------------------------------------ the result


def test_result_has_all_prompts_in_order_and_responses_in_the_form_of_the_data(sample, capsys):
    path = sample()
    records = read_json(path)
    assert [(r["query_id"], r["query"]) for r in records] == [(f"id {i}", q) for i, q in enumerate(PROMPTS)]
    assert all(list(r) == ["query_id", "query", "sample_0", "sample_1"] for r in records)
    responses = [r[f"sample_{i}"] for r in records for i in range(2)]
    assert len(set(responses)) > 10
    assert all(r == f" {r.strip()}" and "\nHuman" not in r for r in responses if r)
    assert capsys.readouterr().out == f"{path}: 7 prompts x 2 responses, {responses.count('')} of them empty\n"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"{NAME}_results.json",
        f"{NAME}_results.settings.json",
    ]
    assert read_json(path.with_suffix(".settings.json"))["temperature"] == 1.2


def test_defaults_are_those_of_the_task(sample, tmp_path):
    sample("testing", task_type="testing", num_samples=None, max_new_tokens=2)
    settings = read_json(tmp_path / "testing" / "llm_testing_p_results.settings.json")
    names = ("num_samples", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    assert [settings[name] for name in names] == [1, 0.3, 5, 0.85, 1.05, 42]
    sample("chat", prompt_template="llama-2-chat", num_samples=None, max_new_tokens=2)
    settings = read_json(tmp_path / "chat" / f"{NAME}_results.settings.json")
    assert [settings[name] for name in names] == [4, 0.6, 50, 0.9, 1.0, 42]


def test_help_states_the_defaults(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference_llm.py", "--help"])
    with pytest.raises(SystemExit):
        inference_llm.main()
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Decoding):
        values = (getattr(decoding, field.name) for decoding in (*DECODING.values(), LLAMA_2_CHAT_SAMPLING))
        assert f"(default: {' / '.join(f'{value:g}' for value in values)})" in text


def test_responses_depend_on_the_seed_and_not_on_the_batch_size(sample):
    expected = sample("a").read_bytes()
    assert sample("b", per_device_eval_batch_size=7).read_bytes() == expected
    assert sample("c", seed=43).read_bytes() != expected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_share_the_work_and_the_last_one_writes(sample, order, caplog):
    """Each process in turn, none at the same time."""
    expected = sample("alone").read_bytes()
    caplog.set_level("INFO")
    for rank in order[:-1]:
        assert not sample("shared", rank=rank, world=3).exists()
    assert caplog.text.count("other processes have not finished their share") == 2
    caplog.clear()
    path = sample("shared", rank=order[-1], world=3)
    assert path.read_bytes() == expected and "other processes have not" not in caplog.text
    assert list(path.parent.glob("*.partial.jsonl")) == []


def test_more_processes_than_batches(sample, data):
    write_records(data, [pair(PROMPTS[0])])
    expected = sample("alone").read_bytes()
    assert sample("shared", rank=1, world=2).exists() is False
    assert sample("shared", rank=0, world=2).read_bytes() == expected
    assert sample("shared", rank=1, world=2).read_bytes() == expected


# ------------------------------------------------------------------------------------------------ resuming


def interrupt_after(monkeypatch, num_prompts: int) -> None:
    """The next run is interrupted when it has kept so many prompts."""
    keep = inference_llm.ResultStore.append
    kept = []

    def append(self, query_id: str, responses: list[str]) -> None:
        if len(kept) == num_prompts:
            raise KeyboardInterrupt
        kept.append(query_id)
        keep(self, query_id, responses)

    monkeypatch.setattr(inference_llm.ResultStore, "append", append)


@pytest.mark.parametrize("num_prompts", [0, 6])
def test_interrupted_run_resumes(sample, monkeypatch, num_prompts, caplog):
    """With an incomplete last line, on another number of processes, and with other batches."""
    caplog.set_level("INFO")
    expected = sample("whole").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt_after(patch, num_prompts)
        sample("broken")
    folder = sample("whole").parent.parent / "broken"
    assert num_finished(folder) == num_prompts
    for path in folder.glob("*.partial.jsonl"):
        path.write_bytes(path.read_bytes()[:-3])
    sample("broken", rank=0, world=2, per_device_eval_batch_size=3)
    assert sample("broken", rank=1, world=2, per_device_eval_batch_size=3).read_bytes() == expected
    assert (f"{num_prompts - 1} of 7 prompts were done before" in caplog.text) == (num_prompts > 1)


def test_a_finished_result_is_not_computed_again(sample, monkeypatch, caplog):
    caplog.set_level("INFO")
    expected = sample().read_bytes()
    monkeypatch.setattr("apo.sampling.load_llm", None)
    assert sample().read_bytes() == expected
    assert "7 of 7 prompts were done before" in caplog.text


def test_a_changed_setting_starts_again_and_replaces_the_result(sample, monkeypatch):
    changes = {"num_samples": 1}
    expected = sample("a", **changes).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        interrupt_after(patch, 3)
        sample("b")
    sample("b", **changes)
    assert sample("b", **changes).read_bytes() == expected
    sample("b")
    assert sample("b", **changes).read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [0, 9, 39])
def test_killed_run_resumes(base_llama, tmp_path, sample, data, num_prompts):
    """SIGKILL after so many of 40 prompts; 0: while the model loads."""
    write_records(data, [pair(f"{PROMPTS[i % 7]} {i}") for i in range(40)])
    options = flags(base_llama, data, tmp_path / "killed", max_new_tokens=24, per_device_eval_batch_size=1)
    process = start_tool(options)
    while num_finished(tmp_path / "killed") < num_prompts and process.poll() is None:
        time.sleep(0.001)
    if num_prompts == 0:
        time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert num_finished(tmp_path / "killed") < 40
    options = {"max_new_tokens": 24, "per_device_eval_batch_size": 1}
    assert sample("killed", **options).read_bytes() == sample("whole", **options).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_records", [1, 7])
def test_two_processes_under_torchrun(base_llama, tmp_path, sample, data, num_records):
    write_records(data, read_json(data)[:num_records])
    process = start_tool(flags(base_llama, data, tmp_path / "two"), num_processes=2)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"{num_records} prompts x 2 responses" in output
    assert (tmp_path / "two" / f"{NAME}_results.json").read_bytes() == sample("one").read_bytes()


# ------------------------------------------------------------------------------------------------ a server


def on(server, **changes: object) -> dict[str, object]:
    return {"engine": "openai", "base_url": server.base_url, "concurrency": 3, "model_name_or_path": "m", **changes}


def test_each_response_of_a_server_has_its_own_seed(sample, server):
    records = read_json(sample(**on(server)))
    assert [r["query"] for r in records] == PROMPTS and all(list(r)[2:] == ["sample_0", "sample_1"] for r in records)
    assert len({request["body"]["seed"] for request in server.requests}) == len(server.requests) == 14
    body = server.requests[0]["body"]
    assert {request["path"] for request in server.requests} == {"/v1/completions"}
    assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (1.2, 1.0, 50, 6)
    assert body["stop"] == ["\nHuman"] and "repetition_penalty" not in body and body["prompt"] in PROMPTS


def test_chat_sends_messages_and_only_fields_that_openai_knows(sample, server):
    sample(**on(server, prompt_template="chat", top_k=0))
    bodies = sorted((request["body"] for request in server.requests), key=lambda body: body["messages"][0]["content"])
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert bodies[-1]["messages"] == [{"role": "user", "content": QUERIES[0]}]
    assert set(bodies[0]) == {"model", "messages", "temperature", "top_p", "max_tokens", "stop", "seed"}


def test_a_run_with_a_failing_server_resumes_and_requests_nothing_twice(sample, server, capsys, tmp_path):
    expected = sample("undisturbed", **on(server)).read_bytes()
    server.requests, server.failures = [], [""] * 6 + ["500"] * 99
    with pytest.raises(SystemExit) as ended:
        sample("lost", **on(server, max_retries=0))
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "found status 500" in lines[0] and "the same command resumes" in lines[0]
    num_kept = num_finished(tmp_path / "lost")
    server.requests, server.failures = [], []
    assert num_kept and sample("lost", **on(server, base_url=f"{server.base_url}/")).read_bytes() == expected
    assert len(server.requests) == 2 * (7 - num_kept)


def test_refused_prompts_are_left_out_with_the_flag(sample, server, capsys):
    server.refused_text = "bees"
    with pytest.raises(SystemExit):
        sample(**on(server))
    assert "error: record 2, id id 1: refused (status 400" in capsys.readouterr().err
    records = read_json(sample(**on(server, skip_refused=[])))
    assert [r["query_id"] for r in records] == ["id 0", "id 2", "id 3", "id 4", "id 5", "id 6"]
    server.requests, server.refused_text = [], ""
    assert [r["query_id"] for r in read_json(sample(**on(server)))] == [f"id {i}" for i in range(7)]
    assert len(server.requests) == 2


def test_only_a_changed_prompt_is_requested_again(sample, server, data):
    before = read_json(sample(**on(server)))
    write_records(data, [pair(q, query_id=f"id {i}") for i, q in enumerate([*PROMPTS[:6], "Another?"])])
    server.requests = []
    after = read_json(sample(**on(server)))
    assert after[:6] == before[:6] and after[6]["query"] == "Another?"
    assert {request["body"]["prompt"] for request in server.requests} == {"Another?"}


def test_responses_that_continue_as_the_user_are_cut_and_counted(sample, server, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(server, "complete", lambda body: f"{body['seed']}\nHumans")
    assert not any("Human" in r["sample_0"] for r in read_json(sample(**on(server))))
    assert "14 responses cut where they continue as the user" in caplog.text


def test_the_key_is_in_no_file(sample, server, tmp_path, capsys):
    server.failures = ["401"]
    with pytest.raises(SystemExit):
        sample(**on(server))
    sample(**on(server))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"very-secret" not in written and "very-secret" not in str(capsys.readouterr())


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 510}, "512 positions; lower --max_length or --max_new_tokens"),
        ({"num_samples": 0}, "--num_samples: found 0, expected a whole number of at least 1"),
        ({"temperature": "nan"}, "--temperature: found nan"),
        ({"temperature": 0}, "--temperature 0 --num_samples 2: expected 1"),
        ({"top_p": 0}, "--top_p 0: expected more than 0"),
        ({"top_p": 1.5}, "--top_p 1.5: expected more than 0"),
        ({"repetition_penalty": 0}, "--repetition_penalty: found 0"),
        ({"engine": "openai"}, "found neither --base_url nor OPENAI_API_KEY"),
        ({"engine": "openai", "base_url": "http://a/v1", "world": 2}, "--engine openai in 2 processes: expected one"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(sample, changes, message, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit) as ended:
        sample(**changes)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_a_result_does_not_replace_the_data(sample, data, tmp_path, capsys):
    path = tmp_path / "out" / f"{NAME}_results.json"
    write_records(path, read_json(data))
    with pytest.raises(SystemExit) as ended:
        sample(data_path=path, data_suffix="p")
    assert ended.value.code == 2 and "found the data to read where" in capsys.readouterr().err
    assert read_json(path) == read_json(data)


def test_a_bad_folder_is_an_error_before_the_model_loads(sample, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("apo.sampling.load_llm", None)
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit) as ended:
        sample()
    assert ended.value.code == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_script_runs_as_it_is(tmp_path):
    """The tiny LLaMA samples for three prompts, and the converter reads the file."""
    data = tmp_path / "rm_data"
    for name in ("hh_split_rm.train.json", "hh_split_rm.golden.json"):
        write_records(data / name, read_json(REPO_ROOT / "data" / "sample" / "rm_data" / name)[:3])
    samples = tmp_path / "out" / "llm_sampling_hh_split_rm_v0_results.json"
    environment = os.environ | {
        "DATA_DIR": str(tmp_path),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "SAMPLES": str(samples),
    }
    environment |= {"APO_DATA": str(tmp_path / "apo_text_scores.json")}
    for script in ("sample_llm.sh", "convert_apo_data.sh"):
        path = REPO_ROOT / "scripts" / script
        done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert len(read_json(samples)) == 3
    assert len(read_json(tmp_path / "apo_text_scores.json")) >= 10
