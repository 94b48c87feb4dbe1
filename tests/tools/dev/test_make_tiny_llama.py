"""The tiny LLaMA loads like a real one, has a tokenizer like LLaMA's, and is the same for the same seed."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import command_line, write_records
from transformers import AutoTokenizer, LlamaForCausalLM

from tools.dev.make_tiny_llama import main, read_corpus

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 320, "max_position_embeddings": 64}


def make_tiny_llama(output_dir: Path, **flags: object) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny_llama.py", *command_line(output_dir=output_dir, **flags)])
        main()
    return output_dir


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    records = [{"query": f"the cat sat on mat {i} and then  it slept"} for i in range(200)]
    return write_records(tmp_path_factory.mktemp("corpus") / "corpus.json", records)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, corpus) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), corpus=corpus, **SIZES)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_model_and_tokenizer_load_and_run(tiny):
    model = LlamaForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    logits = model(**tokenizer("the cat", return_tensors="pt")).logits
    assert logits.shape[-1] == model.config.vocab_size == SIZES["vocab_size"]
    assert torch.isfinite(logits).all()
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 1)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    assert model.config.pad_token_id is None


def test_pieces_are_laid_out_as_in_llama(tiny):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert pieces.id_to_piece(258) == "<0xFF>"
    assert pieces.vocab_size() <= SIZES["vocab_size"]
    assert pieces.pad_id() == -1


@pytest.mark.parametrize("text", ["the cat", " the  cat ", "a\n\nHuman: 30 € 猫 🙂\ttab"])
def test_any_text_survives_encoding(tiny, text):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert pieces.unk_id() not in ids


def test_a_leading_space_keeps_the_dummy_prefix_and_digits_stay_single(tiny):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny / "tokenizer.model"))
    assert "".join(pieces.encode(" cat", out_type=str)).startswith("▁▁")
    assert [piece for piece in pieces.encode("mat 123", out_type=str) if piece[-1].isdigit()] == ["1", "2", "3"]


def test_same_seed_same_files_other_seed_other_weights(tiny, corpus, tmp_path):
    again = make_tiny_llama(tmp_path / "again", corpus=corpus, **SIZES)
    other = make_tiny_llama(tmp_path / "other", corpus=corpus, seed=43, **SIZES)
    assert hashes(again) == hashes(tiny)
    changed = {name for name, digest in hashes(other).items() if digest != hashes(tiny)[name]}
    assert changed == {"model.safetensors"}


def test_default_corpus_is_the_sample_data(tmp_path):
    folder = make_tiny_llama(tmp_path, hidden_size=16, num_layers=1, num_heads=2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert pieces.vocab_size() == 1024
    assert len(pieces.encode(" Happy to help. Tell me how it goes.")) < 16


def test_corpus_has_the_texts_of_records_without_ids(tmp_path):
    path = tmp_path / "corpus.json"
    record = {"text": ["a\n\nb<sep> c", "d"], "scores": [1.0, 0.0], "query_id": "made_1", "type": "apo"}
    path.write_text(json.dumps([record]), encoding="utf-8")
    assert read_corpus([path]) == ["a", "b", " c", "d"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "--hidden_size 30 --num_heads 4: expected a hidden size"),
        ({"vocab_size": 259}, "argument --vocab_size: found 259, expected a whole number of at least 260"),
        ({"corpus": "blank.json"}, "blank.json: no text found"),
    ],
)
def test_wrong_input_is_refused_before_a_file_is_written(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_records("blank.json", [{"query_id": "1"}])
    with pytest.raises(SystemExit):
        make_tiny_llama(tmp_path / "out", **flags)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
