"""Golden answers from a server: complete, counted, paid for once."""

import sys
from pathlib import Path

import pytest
from conftest import command_line, pair, read_json, write_records

from tools import annotate_golden
from tools.annotate_golden import describe_cost, estimate_prompt_tokens
from tools.apo_data_converter import convert, load_responses

PROMPTS = [f"\n\nHuman: What is {i}?\n\nAssistant:" for i in range(5)]


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
    assert f"{path}: 5 golden answers, 0 of them empty\n" == capsys.readouterr().out
    samples = [{"query_id": str(i), "query": q, "sample_0": " No idea at all."} for i, q in enumerate(PROMPTS)]
    sampled = load_responses(write_records(tmp_path / "s.json", samples), "sampled")
    pairs = convert(load_responses(path, "golden"), sampled)
    assert pairs.num_pairs == 5
    assert sorted(file.name for file in tmp_path.glob("g.*")) == ["g.json", "g.settings.json"]


def test_requests_hold_what_was_asked_for(annotate, server):
    annotate(system_prompt="Be kind.", seed=None)
    assert set(server.requests[0]["body"]) == {"model", "messages", "max_completion_tokens"}
    roles = [message["role"] for message in server.requests[0]["body"]["messages"]]
    assert roles == ["system", "user"]
    server.requests = []
    annotate("h.json", temperature=0.5)
    assert set(server.requests[0]["body"]) == {"model", "messages", "max_completion_tokens", "temperature", "seed"}


def test_failures_change_nothing_and_are_counted(annotate, server, caplog):
    caplog.set_level("INFO")
    expected = annotate("calm.json").read_bytes()
    server.requests, server.failures = [], ["429 1", "500", "cut", "", "half"]
    assert annotate("stormy.json").read_bytes() == expected
    assert len(server.answered()) == 5
    assert "5 answers, 4 requests repeated, 35 prompt tokens and 15 completion tokens" in caplog.text
    assert "5 answers break off at --max_new_tokens 4" in caplog.text


def test_a_broken_run_pays_for_no_answer_twice(annotate, server, capsys):
    expected = annotate("calm.json").read_bytes()
    server.requests, server.failures = [], ["", "", ""] + ["401"] * 9
    with pytest.raises(SystemExit) as ended:
        annotate()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error and "expected OPENAI_API_KEY to hold a key" in error and "very-secret" not in error
    paid = [body["messages"] for body in server.answered()]
    server.requests, server.failures = [], []
    assert annotate().read_bytes() == expected
    again = [body["messages"] for body in server.answered()]
    assert len(paid) == 3 and len(again) == 2 and not [messages for messages in again if messages in paid]
    server.requests = []
    assert annotate().read_bytes() == expected and server.requests == []


def test_a_changed_question_is_asked_anew(annotate, server):
    annotate()
    server.requests = []
    annotate(system_prompt="Be kind.")
    assert len(server.requests) == 5


def test_the_estimate_comes_before_the_first_request(annotate, server, caplog, tmp_path):
    """Each prompt "What is 0?" is 10 bytes: 4 tokens, and 4 for the message; 5 x 8 = 40 in, 5 x 4 = 20 out; at
    0.02 and 0.1 a token: 0.8 + 2.0."""
    caplog.set_level("INFO")
    annotate(dry_run=[], price_per_million_input=20_000, price_per_million_output=100_000)
    expected = "5 prompts to ask, at most about 40 prompt tokens and 20 completion tokens: 2.80 at the given prices"
    assert expected in caplog.text
    assert server.requests == [] and list(tmp_path.glob("g*")) == []


def test_estimate_and_cost_by_hand():
    """5 bytes are 2 tokens, two characters of 3 bytes as well; with 4 for each of two messages: 2 + 4 + 2 + 4 = 12."""
    dialogue = [{"role": "system", "content": "12345"}, {"role": "user", "content": "什么"}]
    assert estimate_prompt_tokens([dialogue]) == 12
    cost = describe_cost(2_000_000, 1_000, (2.5, 10.0))
    assert cost == "2,000,000 prompt tokens and 1,000 completion tokens: 5.01 at the given prices"
    assert describe_cost(1, 2, None) == "1 prompt tokens and 2 completion tokens"


def test_refused_prompts_can_be_left_out(annotate, server, caplog):
    server.refused_text = "What is 3"
    golden = read_json(annotate(skip_refused=[]))
    assert [record["query_id"] for record in golden] == ["0", "1", "2", "4"]
    assert "1 prompts refused by the server, left out: 3" in caplog.text


def test_refused_prompts_are_asked_again_by_the_next_run(annotate, server, tmp_path):
    """Refused twice, then by a mended server no more: only the refused one is asked, each time."""
    server.refused_text = "What is 3"
    annotate(skip_refused=[])
    for refused_text, ids in (("What is 3", "0124"), ("", "01234")):
        server.requests, server.refused_text = [], refused_text
        assert [record["query_id"] for record in read_json(annotate(skip_refused=[]))] == list(ids)
        assert len(server.requests) == 1
    assert sorted(file.name for file in tmp_path.glob("g.*")) == ["g.json", "g.settings.json"]
    server.requests = []
    annotate()
    assert server.requests == []


def test_a_mended_prompt_loses_no_other_answer(annotate, server, tmp_path):
    """The run ends at the refusal of prompt 3, which is then made another; no answered one is asked again."""
    server.refused_text = "What is 3"
    with pytest.raises(SystemExit):
        annotate(concurrency=1)
    answered = [body["messages"] for body in server.answered()]
    assert 3 <= len(answered) <= 4
    mended = [*PROMPTS[:3], "\n\nHuman: What is three?\n\nAssistant:", PROMPTS[4]]
    write_records(tmp_path / "p.json", [pair(q, query_id=str(i)) for i, q in enumerate(mended)])
    server.requests = []
    assert [record["query"] for record in read_json(annotate(concurrency=1))] == mended
    asked = [request["body"]["messages"] for request in server.requests]
    assert len(asked) == 5 - len(answered) and not [messages for messages in asked if messages in answered]


def test_a_finished_result_is_gone_on_with_when_prompts_come_and_go(annotate, server, tmp_path):
    before = {record["query"]: record["golden"] for record in read_json(annotate())}
    queries = [PROMPTS[4], "\n\nHuman: New?\n\nAssistant:", PROMPTS[1]]
    write_records(tmp_path / "p.json", [pair(q, query_id=id_) for q, id_ in zip(queries, "4n1", strict=True)])
    server.requests = []
    records = read_json(annotate())
    assert [record["query"] for record in records] == queries and len(server.requests) == 1
    assert [records[i]["golden"] for i in (0, 2)] == [before[PROMPTS[4]], before[PROMPTS[1]]]


def test_another_address_is_recorded_and_named_and_loses_nothing(annotate, server, tmp_path, caplog):
    annotate()
    assert read_json(tmp_path / "g.settings.json")["base_url"] == server.base_url
    server.requests = []
    annotate(base_url=server.base_url.replace("127.0.0.1", "localhost"))
    assert server.requests == [] and f"base_url was {server.base_url} for what is kept" in caplog.text


def test_lines_about_humans_stay_and_cut_answers_are_counted(annotate, server, monkeypatch, caplog):
    monkeypatch.setattr(server, "complete", lambda body: "Yes:\nHumans need water.\n\nHuman: And?")
    assert {record["golden"] for record in read_json(annotate())} == {" Yes:\nHumans need water."}
    assert "5 answers cut where they go on to play the user" in caplog.text


def test_the_prompts_are_not_overwritten(annotate, server, tmp_path, capsys):
    before = (tmp_path / "p.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        annotate("p.json")
    assert ended.value.code == 2 and "found the data to read where the result goes" in capsys.readouterr().err
    assert (tmp_path / "p.json").read_bytes() == before and server.requests == []


def test_a_folder_that_cannot_be_written_is_found_before_the_first_request(annotate, server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        annotate("file/g.json")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "file/g.json: cannot be written" in error and "Traceback" not in error
    assert server.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price_per_million_input": 1}, "--price_per_million_output together, found one"),
        ({"price_per_million_input": 1, "price_per_million_output": -1}, "_output -1.0: expected 0 or more"),
        ({"price_per_million_input": "nan", "price_per_million_output": 1}, "_input nan: expected 0 or more"),
        ({"temperature": "inf"}, "--temperature inf: expected 0 or more, and finite"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: expected at least 1"),
        ({"name": "g.jsonl"}, "expected a name that ends in .json"),
        ({"data_path": "absent.json"}, "absent.json: no such file"),
        ({"concurrency": 0}, "--concurrency 0"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(annotate, changes, message, capsys):
    with pytest.raises(SystemExit) as ended:
        annotate(**changes)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
