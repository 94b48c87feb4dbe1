"""Golden responses from a server: complete, counted, paid for once."""

import sys
from pathlib import Path

import pytest
from conftest import command_line, pair, read_json, write_records

from tools import annotate_golden
from tools.annotate_golden import estimate_prompt_tokens
from tools.apo_data_converter import convert, load_responses

PROMPTS = [f"\n\nHuman: What is {i}?\n\nAssistant:" for i in range(5)]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("apo.server.RETRY_DELAY", 0.01)


@pytest.fixture
def annotate(monkeypatch, tmp_path, server):
    """Runs the tool in this process and returns the path of its result."""
    data = write_records(tmp_path / "p.json", [pair(q, query_id=str(i)) for i, q in enumerate(PROMPTS)])

    def run(name: str = "g.json", **changes: object) -> Path:
        options = {"model": "m", "data_path": data, "output_path": tmp_path / name, "base_url": server.base_url}
        options |= {"concurrency": 2, "max_new_tokens": 4, "seed": 1, **changes}
        monkeypatch.setattr(sys, "argv", ["annotate_golden.py", *command_line(**options)])
        annotate_golden.main()
        return tmp_path / name

    return run


def test_the_converter_reads_the_result(annotate, server, tmp_path, capsys):
    path = annotate()
    golden = read_json(path)
    assert [list(record) for record in golden] == [["query_id", "query", "golden"]] * 5
    assert [record["query"] for record in golden] == PROMPTS
    assert all(record["golden"] == f" {record['golden'].strip()}" for record in golden)
    assert f"{path}: 5 golden responses\n" == capsys.readouterr().out
    samples = [{"query_id": str(i), "query": q, "sample_0": " No idea at all."} for i, q in enumerate(PROMPTS)]
    sampled = load_responses(write_records(tmp_path / "s.json", samples), "sampled")
    pairs = convert(load_responses(path, "golden"), sampled)
    assert len(pairs.items) == 5
    assert sorted(file.name for file in tmp_path.glob("g.*")) == ["g.json", "g.settings.json"]


def test_requests_hold_the_flags_that_are_set(annotate, server):
    annotate(system_prompt="Be kind.", seed=None)
    assert set(server.requests[0]["body"]) == {"model", "messages", "max_completion_tokens"}
    roles = [message["role"] for message in server.requests[0]["body"]["messages"]]
    assert roles == ["system", "user"]
    server.requests = []
    annotate("h.json", temperature=0.5)
    assert set(server.requests[0]["body"]) == {"model", "messages", "max_completion_tokens", "temperature", "seed"}


def test_failures_change_nothing_and_cut_responses_are_counted(annotate, server, caplog):
    expected = annotate("undisturbed.json").read_bytes()
    server.requests, server.failures = [], ["429", "500", "cut", ""]
    assert annotate("disturbed.json").read_bytes() == expected
    assert len(server.completed()) == 5
    assert "5 responses break off (finish_reason length)" in caplog.text


def test_an_interrupted_run_pays_for_no_response_twice(annotate, server, capsys):
    expected = annotate("undisturbed.json").read_bytes()
    server.requests, server.failures = [], ["", "", ""] + ["401"] * 9
    with pytest.raises(SystemExit) as ended:
        annotate()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error and "expected OPENAI_API_KEY to hold a key" in error and "very-secret" not in error
    paid = [body["messages"] for body in server.completed()]
    server.requests, server.failures = [], []
    assert annotate().read_bytes() == expected
    again = [body["messages"] for body in server.completed()]
    assert len(paid) == 3 and len(again) == 2 and not [messages for messages in again if messages in paid]
    server.requests = []
    assert annotate().read_bytes() == expected and server.requests == []


def test_a_changed_system_prompt_requests_all_again(annotate, server):
    annotate()
    server.requests = []
    annotate(system_prompt="Be kind.")
    assert len(server.requests) == 5


def test_the_estimate_is_logged_before_the_first_request(annotate, server, caplog, tmp_path):
    """Each prompt "What is 0?" is 10 bytes: 4 tokens, and 4 for the message; 5 x 8 = 40 in, 5 x 4 = 20 out; at
    0.02 and 0.1 a token: 0.8 + 2.0."""
    caplog.set_level("INFO")
    annotate(dry_run=[], price_per_million=[20_000, 100_000])
    expected = "5 prompts: at most about 40 prompt tokens and 20 completion tokens, 2.80 at the given prices"
    assert expected in caplog.text
    assert server.requests == [] and list(tmp_path.glob("g*")) == []


def test_estimate_by_hand():
    """5 bytes are 2 tokens, and so are two characters of 3 bytes; 4 for each message: 2 + 4 + 2 + 4 = 12."""
    dialogue = [{"role": "system", "content": "12345"}, {"role": "user", "content": "什么"}]
    assert estimate_prompt_tokens([dialogue]) == 12


def test_refused_prompts_are_left_out_and_requested_by_the_next_run(annotate, server, tmp_path, caplog):
    """Refused twice, then accepted: only the refused prompt is requested again, each time."""
    server.refused_text = "What is 3"
    annotate(skip_refused=[])
    assert "1 prompts without a response (1 refused), the same command asks again; left out: 3" in caplog.text
    for refused_text, ids in (("What is 3", "0124"), ("", "01234")):
        server.requests, server.refused_text = [], refused_text
        assert [record["query_id"] for record in read_json(annotate(skip_refused=[]))] == list(ids)
        assert len(server.requests) == 1
    assert sorted(file.name for file in tmp_path.glob("g.*")) == ["g.json", "g.settings.json"]
    server.requests = []
    annotate()
    assert server.requests == []


def test_a_changed_prompt_loses_no_other_response(annotate, server, tmp_path):
    """The run ends at the refusal of prompt 3, which is then changed; no finished prompt is requested again."""
    server.refused_text = "What is 3"
    with pytest.raises(SystemExit):
        annotate(concurrency=1)
    finished = [body["messages"] for body in server.completed()]
    assert 3 <= len(finished) <= 4
    changed = [*PROMPTS[:3], "\n\nHuman: What is three?\n\nAssistant:", PROMPTS[4]]
    write_records(tmp_path / "p.json", [pair(q, query_id=str(i)) for i, q in enumerate(changed)])
    server.requests = []
    assert [record["query"] for record in read_json(annotate(concurrency=1))] == changed
    again = [request["body"]["messages"] for request in server.requests]
    assert len(again) == 5 - len(finished) and not [messages for messages in again if messages in finished]


def test_a_finished_result_is_reused_when_prompts_change(annotate, server, tmp_path):
    before = {record["query"]: record["golden"] for record in read_json(annotate())}
    queries = [PROMPTS[4], "\n\nHuman: New?\n\nAssistant:", PROMPTS[1]]
    write_records(tmp_path / "p.json", [pair(q, query_id=id_) for q, id_ in zip(queries, "4n1", strict=True)])
    server.requests = []
    records = read_json(annotate())
    assert [record["query"] for record in records] == queries and len(server.requests) == 1
    assert [records[i]["golden"] for i in (0, 2)] == [before[PROMPTS[4]], before[PROMPTS[1]]]


def test_another_address_is_a_warning_only(annotate, server, tmp_path, caplog):
    annotate()
    assert read_json(tmp_path / "g.settings.json")["base_url"] == server.base_url
    server.requests = []
    annotate(base_url=server.base_url.replace("127.0.0.1", "localhost"))
    assert server.requests == [] and f"base_url was {server.base_url} for what is kept" in caplog.text


def test_lines_about_humans_are_kept_and_cut_responses_are_counted(annotate, server, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(server, "complete", lambda body: "Yes:\nHumans need water.\n\nHuman: And?")
    assert {record["golden"] for record in read_json(annotate())} == {" Yes:\nHumans need water."}
    assert "5 responses cut where they continue as the user" in caplog.text


def test_the_prompts_are_not_replaced(annotate, server, tmp_path, capsys):
    before = (tmp_path / "p.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        annotate("p.json")
    assert ended.value.code == 2 and "found the data to read where the result goes" in capsys.readouterr().err
    assert (tmp_path / "p.json").read_bytes() == before and server.requests == []


def test_a_bad_folder_is_an_error_before_the_first_request(annotate, server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        annotate("file/g.json")
    error = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and "cannot be written" in error
        and "give another place" in error
        and "Traceback" not in error
    )
    assert server.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price_per_million": 1}, "--price_per_million: expected 2 arguments"),
        ({"name": "g.jsonl"}, "expected a name that ends in .json"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(annotate, changes, message, capsys):
    with pytest.raises(SystemExit) as ended:
        annotate(**changes)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
