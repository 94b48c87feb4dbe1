"""The hh-split layout from dialogues: the pairs that are dropped, the partition, and the files."""

import gzip
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
from conftest import read_json, run_tool, write_records
from hypothesis import given, settings
from hypothesis import strategies as st

from apo.cli import InputError
from apo.prompts import normalize_space
from apo.records import load_preference_data
from tools import build_hh_split
from tools.build_hh_split import (
    FILES,
    MANIFEST,
    download,
    group_by_prompt,
    partition,
    remove_prompts,
    split_dialogue,
)

RM, LLM, BOTH, VALID, TEST = FILES


def prompt(text: str) -> str:
    return f"\n\nHuman: {text}\n\nAssistant:"


def dialogues(text: str, chosen: str = " Yes.", rejected: str = " No.") -> dict[str, str]:
    """A record of hh-rlhf."""
    return {"chosen": prompt(text) + chosen, "rejected": prompt(text) + rejected}


def group(*records: dict[str, str]) -> tuple[dict[str, list], Counter]:
    dropped: Counter[str] = Counter()
    return group_by_prompt([(r["chosen"], r["rejected"]) for r in records], dropped), dropped


def run_main(*arguments: object) -> int | None:
    """Runs the tool in this process; returns its exit status, None for success."""
    argv, sys.argv = sys.argv, ["build_hh_split.py", *map(str, arguments)]
    try:
        build_hh_split.main()
    except SystemExit as error:
        return error.code
    finally:
        sys.argv = argv


def prompts_of(records: list[dict]) -> list[str]:
    return [record["text"][0].split("<sep>")[0] for record in records]


# ------------------------------------------------------------------------------------------------ cleaning


def test_dialogue_is_split_after_its_last_assistant_turn():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    assert split_dialogue(start + " So.\n\nWell.") == (start, " So.\n\nWell.")
    assert split_dialogue("\n\nHuman: Hi") == ("", "\n\nHuman: Hi")


def test_record_is_the_pair_with_the_separator_and_its_hash():
    groups, _ = group(dialogues("Why?"))
    content = "Human: Why? Assistant:\nYes.\nNo."
    assert groups["Human: Why? Assistant:"] == [
        {
            "text": [prompt("Why?") + "<sep> Yes.", prompt("Why?") + "<sep> No."],
            "scores": [1.0, 0.0],
            "query_id": "hh_" + hashlib.sha256(content.encode()).hexdigest()[:16],
        }
    ]


def test_dialogues_that_make_no_pair_are_dropped_and_counted_by_reason():
    """Three pairs are left: the first, its labels swapped, and one whose dialogues differ in a space of the prompt."""
    groups, dropped = group(
        dialogues("Why?"),
        dialogues("Why?", " No.", " Yes."),
        dialogues(" Why?", "  Yes.", " No.\n"),
        {"chosen": prompt("How?") + " So.", "rejected": prompt("How? ") + " No."},
        {"chosen": prompt("How?") + " So.", "rejected": prompt("What?") + " No."},
        dialogues("How?", "", " No."),
        dialogues("How?", " So.", " \n"),
        dialogues("How?", " So.", " So. "),
        dialogues("How?", " So.", " No.\n\nHuman: Thanks"),
        {"chosen": "\n\nHuman: How?", "rejected": prompt("How?") + " No."},
        {"chosen": "So.", "rejected": "No."},
        dialogues("How?", " So.", " <sep>No."),
        dialogues("How <sep>?"),
        dialogues(" "),
        dialogues("How?\n\nAssistant: So."),
        {"chosen": "\n\nAssistant: So.", "rejected": "\n\nAssistant: No."},
    )
    assert [[[text.split("<sep>")[1] for text in pair["text"]] for pair in pairs] for pairs in groups.values()] == [
        [[" Yes.", " No."], [" No.", " Yes."]],
        [[" So.", " No."]],
    ]
    assert dropped == {
        "duplicate": 1,
        "prompts differ": 1,
        "empty response": 2,
        "identical responses": 1,
        "no response at the end": 3,
        "<sep> in the text": 2,
        "no question at the end": 3,
    }


def test_training_prompts_that_are_in_test_are_removed_and_their_pairs_counted():
    train, dropped = group(dialogues("a"), dialogues("b"), dialogues("b", " So."), dialogues("c"))
    test, _ = group(dialogues("b\n"), dialogues("d"))
    remove_prompts(train, test, dropped)
    assert list(train) == [normalize_space(prompt("a")), normalize_space(prompt("c"))]
    assert dropped == {"prompt also in test": 2}


# ------------------------------------------------------------------------------------------------ partitioning


def test_pairs_of_a_prompt_stay_together_and_sizes_are_met():
    """Six prompts with one pair, one with two, one with three, 11 pairs: the single ones fill any gap, so rm has 4 and
    valid 2 in every order. Every prompt is in one part, with all of its pairs.
    """
    num_pairs = [1] * 6 + [2, 3]
    groups, _ = group(*(dialogues(str(n), f" {i}.") for n, size in enumerate(num_pairs) for i in range(size)))
    for seed in range(20):
        parts = partition(groups, {"rm": 4, "valid": 2}, seed)
        assert {name: len(pairs) for name, pairs in parts.items()} == {"rm": 4, "valid": 2, "llm": 5}
        counts = [Counter(prompts_of(pairs)) for pairs in parts.values()]
        assert sum(map(len, counts)) == len(num_pairs)
        assert sum(counts, Counter()) == {prompt(str(n)): size for n, size in enumerate(num_pairs)}


def test_seed_determines_the_partition():
    groups, _ = group(*(dialogues(str(n)) for n in range(50)))
    first, again, other = (partition(groups, {"rm": 20, "valid": 10}, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {name: len(pairs) for name, pairs in first.items()} == {"rm": 20, "valid": 10, "llm": 20}


def test_sizes_that_do_not_fit_are_refused():
    groups, _ = group(*(dialogues(str(n)) for n in range(5)))
    with pytest.raises(InputError, match=r"found 5 training pairs .* left for llm .*--rm_size 3 --valid_size 2"):
        partition(groups, {"rm": 3, "valid": 2}, 0)
    groups, _ = group(*(dialogues("one", f" {n}.") for n in range(5)))
    with pytest.raises(InputError, match=r"left for rm, valid or fits there \(--rm_size 2 --valid_size 1\)"):
        partition(groups, {"rm": 2, "valid": 1}, 0)


WORDS = st.sampled_from(["a", "b", " b", "a\nb", "é", "🙂", "", " ", "<sep>", "\n\nHuman:", "\n\nAssistant: x"])
RECORDS = st.fixed_dictionaries({"chosen": WORDS, "rejected": WORDS, "text": st.integers(0, 12).map(str) | WORDS})


@settings(deadline=None, max_examples=60)
@given(
    st.lists(RECORDS, min_size=20, max_size=60), st.lists(RECORDS, max_size=8), st.integers(1, 9), st.integers(1, 4)
)
def test_no_prompt_is_in_two_parts(train_records, test_records, rm_size, valid_size):
    """For any data: no prompt in two parts, no pair lost or doubled, no part too large, and less than its size only
    where no prompt that fits is left.
    """
    test, _ = group(*(dialogues(**record) for record in test_records))
    train, dropped = group(*(dialogues(**record) for record in train_records))
    num_grouped = sum(map(len, train.values()))
    assert num_grouped + dropped.total() == len(train_records)
    remove_prompts(train, test, dropped)
    sizes = {"rm": rm_size, "valid": valid_size}
    try:
        parts = partition(train, sizes, seed=0)
    except InputError:
        return
    sides = [set(map(normalize_space, prompts_of(pairs))) for pairs in parts.values()] + [set(test)]
    assert sum(map(len, sides)) == len(set().union(*sides)) == len(train) + len(test)
    ids = [pair["query_id"] for pairs in parts.values() for pair in pairs]
    assert len(ids) == len(set(ids)) == sum(map(len, train.values()))
    assert all(len(parts[name]) <= size for name, size in sizes.items())
    smallest_left = min(len(train[normalize_space(prompt)]) for prompt in prompts_of(parts["llm"]))
    assert all(len(parts[name]) + smallest_left > size for name, size in sizes.items())


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def sources(tmp_path):
    """Files of every kind, as flags: 40 + 20 training pairs, of which 2 are in test, and 8 test pairs."""
    train = [dialogues(f"Question {n} …🙂") for n in range(60)]
    test = [dialogues(f"Question {n} …🙂") for n in range(58, 66)]
    paths = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl", "c.json")]
    paths[0].write_bytes(gzip.compress("\n".join(map(json.dumps, train[:40])).encode(), mtime=0))
    paths[1].write_text("\n".join(map(json.dumps, train[40:])) + "\n", encoding="utf-8")
    write_records(paths[2], test)
    return ["--train_data_path", *paths[:2], "--test_data_path", paths[2], "--rm_size", 20, "--valid_size", 10]


def test_command_line_writes_the_layout_and_a_manifest_that_fits(sources, tmp_path):
    out = tmp_path / "new" / "hh-split"
    done = run_tool("build_hh_split.py", *sources, "--output_dir", out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {*FILES, MANIFEST}
    assert {name: len(read_json(out / name)) for name in FILES} == {RM: 20, LLM: 28, BOTH: 48, VALID: 10, TEST: 8}
    assert read_json(out / BOTH) == read_json(out / RM) + read_json(out / LLM)
    parts = [prompts_of(read_json(out / name)) for name in (RM, LLM, VALID, TEST)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 66
    for name in FILES:
        assert all(record.scores == [1, 0] for record in load_preference_data(out / name, "comparison_pair", True))

    manifest = read_json(out / MANIFEST)
    assert {path: source["pairs"] for path, source in manifest["inputs"]["train"].items()} == {
        str(sources[1]): 40,
        str(sources[2]): 20,
    }
    digests = {**manifest["inputs"]["train"], **manifest["inputs"]["test"]}
    digests |= {out / name: output for name, output in manifest["outputs"].items()}
    assert len(digests) == 3 + len(FILES)
    for path, entry in digests.items():
        assert entry["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert [manifest["outputs"][name]["prompts"] for name in (RM, TEST)] == [20, 8]
    assert manifest["dropped"] == {"train": {"prompt also in test": 2}, "test": {}}
    assert (manifest["sizes"], manifest["seed"]) == ({"rm": 20, "valid": 10}, 42)
    assert done.stdout.splitlines()[:3] == [
        "train: 60 pairs read, 2 pairs (2 prompt also in test) dropped",
        "test: 8 pairs read, 0 pairs dropped",
        f"{out / RM}: 20 pairs, 20 prompts",
    ]

    before = {name: (out / name).read_bytes() for name in (*FILES, MANIFEST)}
    assert run_main(*sources, "--output_dir", out) is None
    assert {name: (out / name).read_bytes() for name in before} == before


def test_query_ids_do_not_depend_on_sizes_or_seed(sources, tmp_path):
    ids = []
    for out, extra in (("x", []), ("y", ["--rm_size", 5, "--seed", 7])):
        assert run_main(*sources, *extra, "--output_dir", tmp_path / out) is None
        records = [record for name in (BOTH, VALID, TEST) for record in read_json(tmp_path / out / name)]
        ids.append({record["text"][0]: record["query_id"] for record in records})
    assert ids[0] == ids[1] and len(set(ids[0].values())) == 66


def test_failed_write_keeps_the_earlier_files(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run_main(*sources, "--output_dir", out) is None
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(path: Path) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(build_hh_split, "sha256_of_file", lambda path: fail(path) if out in path.parents else "")
    assert run_main(*sources, "--seed", 7, "--output_dir", out) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_without_files_the_base_subsets_are_downloaded(sources, tmp_path, monkeypatch):
    downloaded = []

    def fetch(repo: str, name: str, repo_type: str) -> str:
        downloaded.append((repo, name, repo_type))
        return str(sources[4] if "test" in name else sources[1] if "helpful" in name else sources[2])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert run_main("--rm_size", 20, "--valid_size", 10, "--output_dir", tmp_path / "out") is None
    names = [
        f"{subset}/{split}.jsonl.gz" for split in ("train", "test") for subset in ("helpful-base", "harmless-base")
    ]
    assert downloaded == [("Anthropic/hh-rlhf", name, "dataset") for name in names]
    assert len(read_json(tmp_path / "out" / BOTH)) == 48


def test_failed_download_is_one_line(monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached,\nand offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        InputError, match=r"cannot be downloaded \(not cached, and offline\); give its files by --train"
    ):
        download("test")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train_data_path", "a.jsonl.gz"], "found one of --train_data_path and --test_data_path, expected both"),
        (["--test_data_path", "a.jsonl.gz"], "found one of --train_data_path and --test_data_path, expected both"),
        (["--rm_size", 0], "--rm_size: found 0, expected a whole number of at least 1"),
        (
            ["--train_data_path", "messages.json", "--test_data_path", "a.jsonl.gz"],
            'record 1: field "chosen": found a list of 1, expect',
        ),
        (["--train_data_path", "a.jsonl.gz", "--test_data_path", "empty.json"], "no test pair is left after cleaning"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(sources, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    write_records("messages.json", [{"chosen": [{"role": "user", "content": "Hi"}], "rejected": "No."}])
    write_records("empty.json", [dialogues("Why?", " ")])
    assert run_main("--output_dir", "out", *extra) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_output_folder_that_cannot_be_made_is_one_line(sources, capsys):
    assert run_main(*sources, "--output_dir", sources[1] / "out") == 2
    assert "cannot be written ([Errno 20] Not a directory" in capsys.readouterr().err
