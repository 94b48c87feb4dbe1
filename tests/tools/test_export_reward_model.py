"""tools/export_reward_model.py: an exported model gives this project's rewards in every library that we can run.

`exact` is below 1e-6, relative above 1; `NOTICEABLE` is what a wrong text, pad token or length costs at least.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY_SIZES,
    check_refusal,
    command_line,
    load_model,
    make_bpe_tokenizer,
    read_json,
    run_main,
    run_tool,
    training,
)
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    pipeline,
)

from apo.cli import InputError
from models import RewardModel
from reward_datasets import build_sequence
from tools.dev import make_tiny_llama
from tools.export_reward_model import complete_folder, main, make_conversations, split_conversations

MAX_LENGTH = 64
NOTICEABLE = 0.01
KINDS = ("sentencepiece", "bpe")
POOLING_TYPES = ("last", "eos")
BPE_SIZES = {**TINY_SIZES, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15}
CONVERSATIONS = make_conversations(MAX_LENGTH)
SHORT = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    for prompt in ("Dry herbs?", " two  spaces ", "猫 🙂")
    for response in ("In bunches.", "No", "Why?\n\nBecause.", "a" * 9)
]


# ------------------------------------------------------------------------------------------------ models


def run_export(source: Path, output_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        command = command_line(model_name_or_path=source, output_dir=output_dir)
        patch.setattr(sys, "argv", ["export_reward_model.py", *command])
        main.__wrapped__()


def make_base(folder: Path, kind: str, config: PreTrainedConfig | None = None) -> Path:
    """A decoder with random weights, large enough that its rewards depend on every token."""
    if kind == "sentencepiece":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["make_tiny_llama.py", *command_line(output_dir=folder, hidden_size=32)])
            make_tiny_llama.main.__wrapped__()
        model = AutoModelForCausalLM.from_pretrained(folder)
        for weight in model.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.15, generator=torch.Generator().manual_seed(weight.shape[0]))
    else:
        make_bpe_tokenizer(["<|bos|>", "<|eos|>"]).save_pretrained(folder)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config or LlamaConfig(**BPE_SIZES))
    model.save_pretrained(folder)
    return folder


def make_reward_model(folder: Path, base: Path, **flags: object) -> Path:
    """A reward model as `train.py` saves it."""
    flags = {"pooling_type": "last", "max_length": MAX_LENGTH, "add_sep_token": True} | flags
    model, tokenizer = load_model(base, **flags)
    torch.nn.init.normal_(model.reward_head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return {kind: make_base(tmp_path_factory.mktemp(f"base_{kind}"), kind) for kind in KINDS}


class Exported:
    """A reward model and its export, loaded as any program loads it."""

    def __init__(self, source: Path, folder: Path) -> None:
        run_export(source, folder)
        self.source, self.folder = source, folder
        self.own = RewardModel.from_pretrained(source)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def expected(self, conversations: list) -> torch.Tensor:
        return torch.tensor(self.own.score(*split_conversations(conversations)))

    def texts(self, conversations: list) -> list[str]:
        return self.tokenizer.apply_chat_template(conversations, tokenize=False)

    @torch.no_grad()
    def rewards(self, batch) -> torch.Tensor:
        return self.model(**batch).logits[:, 0]

    def rewards_of_texts(self, texts: list[str], **options: object) -> torch.Tensor:
        options = {"truncation": True, "padding": True, "return_tensors": "pt"} | options
        return self.rewards(self.tokenizer(texts, **options))

    def sequences(self, conversations: list) -> list[list[int]]:
        """The ids of training."""
        prompts, responses = (self.own.tokenizer.encode(texts) for texts in split_conversations(conversations))
        settings = self.own.settings.sequence_settings
        ids = zip(prompts, responses, strict=True)
        return [build_sequence(*pair, self.own.tokenizer, **settings) for pair in ids]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, base):
    """{(kind, pooling type): `Exported`}."""
    made = {}
    for kind in KINDS:
        for pooling_type in POOLING_TYPES:
            folder = tmp_path_factory.mktemp(f"{kind}_{pooling_type}")
            source = make_reward_model(folder / "rm", base[kind], pooling_type=pooling_type)
            made[kind, pooling_type] = Exported(source, folder / "exported")
    return made


@pytest.fixture(params=[(kind, pooling_type) for kind in KINDS for pooling_type in POOLING_TYPES], ids="-".join)
def exported(request, exports):
    return exports[request.param]


def assert_exact(rewards: torch.Tensor, expected: torch.Tensor) -> None:
    assert (rewards - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


def assert_inexact(rewards: torch.Tensor, expected: torch.Tensor) -> None:
    assert (rewards - expected).abs().max() > NOTICEABLE


# ------------------------------------------------------------------------------------------------ transformers


def test_rewards_from_ids_of_training_are_exact(exported):
    """Also with the eos that `last` pooling does not need: the pad token is eos there."""
    batch = exported.tokenizer.pad({"input_ids": exported.sequences(CONVERSATIONS)}, return_tensors="pt")
    assert_exact(exported.rewards(batch), exported.expected(CONVERSATIONS))


def test_rewards_from_text_are_exact_beyond_max_length_too(exported):
    expected = exported.expected(CONVERSATIONS)
    assert_exact(exported.rewards_of_texts(exported.texts(CONVERSATIONS)), expected)
    assert_exact(exported.rewards_of_texts(exported.texts(CONVERSATIONS), add_special_tokens=False), expected)
    assert_exact(exported.rewards_of_texts(exported.texts(CONVERSATIONS), padding_side="left"), expected)


def test_rewards_of_the_pipeline_are_exact(exported):
    scorer = pipeline("text-classification", model=str(exported.folder), dtype="float32")
    found = scorer(exported.texts(CONVERSATIONS), truncation=True, batch_size=4)
    assert {result["label"] for result in found} == {"reward"}
    assert_exact(torch.tensor([result["score"] for result in found]), exported.expected(CONVERSATIONS))


@pytest.mark.parametrize("pooling_type", POOLING_TYPES)
def test_rewards_are_exact_after_a_cut_on_the_right(tmp_path, base, pooling_type):
    """`last` reads the token before the end of the sequence, whatever the cut has left there."""
    flags = {"pooling_type": pooling_type, "truncation_side": "right"}
    exported = Exported(make_reward_model(tmp_path / "rm", base["bpe"], **flags), tmp_path / "exported")
    assert_exact(exported.rewards_of_texts(exported.texts(CONVERSATIONS)), exported.expected(CONVERSATIONS))


def test_conversations_without_a_separator_are_exact_in_byte_level_tokenizers(tmp_path, base):
    exported = Exported(make_reward_model(tmp_path / "rm", base["bpe"], add_sep_token=False), tmp_path / "exported")
    assert_exact(exported.rewards_of_texts(exported.texts(CONVERSATIONS)), exported.expected(CONVERSATIONS))


@pytest.mark.parametrize("kind", KINDS)
def test_own_pad_token_is_read_as_the_last_token(exports, kind):
    """Why `last` pooling pads with eos."""
    exported = exports[kind, "last"]
    short = exported.own.tokenizer.pad_token_id
    rows = [torch.tensor(sequence) for sequence in exported.sequences(SHORT)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=short)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    assert_inexact(exported.rewards({"input_ids": ids, "attention_mask": mask}), exported.expected(SHORT))


def test_a_text_without_its_special_tokens_gets_another_reward(exported):
    """As the model card says: bos, separator, and eos where pooling reads it."""
    expected, texts = exported.expected(SHORT), exported.texts(SHORT)
    names = ["bos_token", "sep_token"] + ["eos_token"] * (exported.own.settings.pooling_type == "eos")
    for name in names:
        token = getattr(exported.tokenizer, name)
        assert all(token in text for text in texts)
        assert_inexact(exported.rewards_of_texts([text.replace(token, "") for text in texts]), expected)


def test_a_special_token_inside_a_message_is_read_as_one(exported):
    """As the model card says; in training it was text."""
    literal = [{"role": "user", "content": f"A {exported.tokenizer.eos_token} b?"}, SHORT[0][1]]
    assert_inexact(exported.rewards_of_texts(exported.texts([literal])), exported.expected([literal]))


def test_a_long_text_that_is_not_cut_gets_another_reward(exported):
    """As the model card says."""
    long = CONVERSATIONS[-8:]
    assert_inexact(exported.rewards_of_texts(exported.texts(long), truncation=False), exported.expected(long))


# ------------------------------------------------------------------------------------------------ RewardBench


def test_rewards_on_the_path_of_rewardbench_are_exact(exported):
    """Its steps of version 0.1.4: template, special tokens added, padded and cut on the left, a second bos masked."""
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    options = {"truncation": True, "max_length": tokenizer.model_max_length, "padding": True, "return_tensors": "pt"}
    batch = tokenizer(exported.texts(CONVERSATIONS), **options)
    first = batch["attention_mask"].argmax(1, keepdim=True)
    pairs = [batch["input_ids"].gather(1, (first + i).clamp(max=MAX_LENGTH - 2)) for i in (0, 1)]
    assert not ((pairs[0] == tokenizer.bos_token_id) & (pairs[1] == tokenizer.bos_token_id)).any()
    assert_exact(exported.rewards(batch), exported.expected(CONVERSATIONS))


# ------------------------------------------------------------------------------------------------ TRL


@pytest.fixture
def policy(tmp_path, base, exports):
    """A tiny LLM with a chat template, for GRPO."""
    folder = tmp_path / "policy"
    shutil.copytree(base["bpe"], folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(exports["bpe", "eos"].folder / name, folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
    model.save_pretrained(folder)
    return folder


ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


@pytest.fixture
def trl(monkeypatch, tmp_path):
    """TRL has no release for Python 3.10."""
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip("trl")


def grpo_rewards(trl, exported, policy, prompts: list, completions: list) -> torch.Tensor:
    """Rewards (N,) of TRL's own code, model and tokenizer loaded by it."""
    config = trl.GRPOConfig(output_dir="grpo", num_generations=2, per_device_train_batch_size=2, **ON_CPU)
    dataset = Dataset.from_list([{"prompt": prompts[0]}])
    trainer = trl.GRPOTrainer(str(policy), reward_funcs=str(exported.folder), args=config, train_dataset=dataset)
    inputs = [{"prompt": prompt} for prompt in prompts]
    return trainer._calculate_rewards(inputs, prompts, completions, [[0]] * len(prompts))[:, 0]


def test_rewards_of_grpo_are_exact_for_conversations(trl, exported, policy):
    prompts, completions = [c[:-1] for c in SHORT], [c[-1:] for c in SHORT]
    assert_exact(grpo_rewards(trl, exported, policy, prompts, completions), exported.expected(SHORT))


def test_plain_text_in_grpo_gets_another_reward_unless_it_is_what_the_template_writes(trl, exports, policy):
    exported = exports["sentencepiece", "last"]
    prompts, responses = split_conversations(SHORT)
    expected = exported.expected(SHORT)
    assert_inexact(grpo_rewards(trl, exported, policy, prompts, responses), expected)
    whole = [f"<s>{prompt}<sep>" for prompt in prompts]
    assert_exact(grpo_rewards(trl, exported, policy, whole, responses), expected)


@pytest.mark.parametrize("form", ["conversations", "plain text"])
def test_trl_trains_on_with_the_same_head_and_the_same_accuracy(trl, exported, form):
    """8 pairs in batches of 4; TRL takes the mean over batches, and puts eos behind a plain text that has none."""
    sides = {"chosen": SHORT[:8], "rejected": SHORT[4:12]}
    rewards = {side: exported.expected(conversations) for side, conversations in sides.items()}
    config = trl.RewardConfig(
        output_dir="trl", max_length=None, max_steps=1, learning_rate=1e-2, per_device_eval_batch_size=4, **ON_CPU
    )
    if form == "plain text":
        sides = {side: exported.texts(conversations) for side, conversations in sides.items()}
    pairs = Dataset.from_dict(sides)
    trainer = trl.RewardTrainer(model=str(exported.folder), args=config, train_dataset=pairs, eval_dataset=pairs)
    head = trainer.model.score.weight
    assert torch.equal(head, exported.own.reward_head.weight)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == (rewards["chosen"] > rewards["rejected"]).float().mean().item()
    assert metrics["eval_margin"] == pytest.approx((rewards["chosen"] - rewards["rejected"]).mean().item(), abs=1e-6)
    trainer.train()
    assert not torch.equal(head, exported.own.reward_head.weight)
    trainer.save_model("trl/final")
    trained = RewardModel.from_pretrained("trl/final")
    assert trained.settings == exported.own.settings
    assert torch.equal(trained.reward_head.weight, head)


@pytest.mark.parametrize("pad_token", ["<|eos|>", "<|pad|>"])
def test_a_model_that_trl_made_has_the_same_accuracy_here_and_is_trained_on(trl, base, tmp_path, pad_token):
    """The class of transformers reads the last token that is no padding: eos, or the one before where it pads too."""
    tokenizer = make_bpe_tokenizer(["<|bos|>", "<|eos|>", "<|pad|>"], pad_token=pad_token)
    records = [{"prompt": f"Dry {i} herbs?", "chosen": f" Hang {i}.", "rejected": f" No, {i}"} for i in range(24)]

    def encode(record: dict, side: str) -> list[int]:
        ids = [tokenizer(record[name], add_special_tokens=False).input_ids for name in ("prompt", side)]
        return [tokenizer.bos_token_id, *ids[0], *ids[1], tokenizer.eos_token_id]

    columns = {f"{side}_ids": [encode(record, side) for record in records] for side in ("chosen", "rejected")}
    config = trl.RewardConfig(
        output_dir="trl", max_length=None, max_steps=1, learning_rate=1e-4, per_device_eval_batch_size=8, **ON_CPU
    )
    pairs = Dataset.from_dict(columns)
    model = AutoModelForSequenceClassification.from_pretrained(base["bpe"], num_labels=1)
    data = {"train_dataset": pairs, "eval_dataset": pairs, "processing_class": tokenizer}
    trainer = trl.RewardTrainer(model=model, args=config, **data)
    trainer.train()
    expected = trainer.evaluate()
    trainer.save_model("trl/final")

    Path("pairs.json").write_text(json.dumps(records))
    flags = {"model_name_or_path": "trl/final", "eval_data_path": "pairs.json", "use_cpu": True, "report_to": "none"}
    run_main(output_dir="evaluated", **flags)
    found = read_json(Path("evaluated/final_eval_results.json"))["pairs.json"]
    assert found["eval_pairs.json_accuracy"] == pytest.approx(expected["eval_accuracy"])
    assert found["eval_pairs.json_margin"] == pytest.approx(expected["eval_margin"], abs=1e-6)
    assert 0 < found["eval_pairs.json_accuracy"] < 1

    flags |= {"do_train": True, "train_data_path": "pairs.json", "output_dir": "continued", "learning_rate": 0.0}
    run_main(**flags, eval_at_start=True)
    head = load_file("continued/model.safetensors")["reward_head.weight"]
    assert torch.equal(head, trainer.model.score.weight)
    log = read_json(Path("continued/trainer_state.json"))["log_history"]
    assert log[0]["eval_pairs.json_accuracy"] == found["eval_pairs.json_accuracy"]


# ------------------------------------------------------------------------------------------------ model card


def code_blocks(exported, policy: Path) -> list[str]:
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return [
        b.replace("path/to/this/folder", str(exported.folder)).replace("path/to/the/policy", str(policy))
        for b in blocks
    ]


@pytest.mark.parametrize("kind, pooling_type", zip(KINDS, POOLING_TYPES, strict=True))
def test_code_of_the_model_card_runs_and_gives_the_reward_of_this_project(trl, exports, policy, kind, pooling_type):
    exported, results = exports[kind, pooling_type], []
    for block in code_blocks(exported, policy):
        namespace = {}
        exec(block, namespace)
        results.append(namespace)
    assert len(results) == 4
    expected = exported.expected(SHORT[:1])
    for namespace in results[:2]:
        assert namespace["messages"] == SHORT[0]
        assert_exact(torch.tensor([namespace["reward"]]), expected)
    assert [namespace["trainer"].state.global_step for namespace in results[2:]] == [3, 3]


def test_model_card_names_the_text_and_its_limits(exports):
    card = (exports["sentencepiece", "eos"].folder / "README.md").read_text(encoding="utf-8")
    assert r"`<s>\n\nHuman: Why?\n\nAssistant:<sep> Because.</s>`" in card
    assert "cut to 64 tokens at the left" in card
    assert "$" not in card


# ------------------------------------------------------------------------------------------------ the folder


def test_this_project_reads_an_exported_folder_back(exported):
    back = RewardModel.from_pretrained(exported.folder)
    assert back.settings == exported.own.settings
    assert back.score(*split_conversations(CONVERSATIONS)) == exported.expected(CONVERSATIONS).tolist()


@pytest.mark.parametrize("pooling_type", POOLING_TYPES)
def test_a_model_without_bos_is_exported(tmp_path, pooling_type):
    base = make_base(tmp_path / "base", "bpe", Qwen2Config(**BPE_SIZES, num_key_value_heads=2))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(base)
    exported = Exported(make_reward_model(tmp_path / "rm", base, pooling_type=pooling_type), tmp_path / "exported")
    assert type(exported.model).__name__ == "Qwen2ForSequenceClassification"
    assert exported.texts(SHORT)[0].startswith("\n\nHuman: Dry herbs?\n\nAssistant:<sep>")
    assert_exact(exported.rewards_of_texts(exported.texts(SHORT)), exported.expected(SHORT))


def test_config_has_the_names_of_transformers_4_for_rotations(tmp_path):
    """Release 4.51, which RewardBench 0.1.4 asks for, takes a base of 10,000 without them."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 128
    config = LlamaConfig(**BPE_SIZES, rope_parameters={**scaling, "rope_theta": 500000.0})
    base = make_base(tmp_path / "base", "bpe", config)
    exported = Exported(make_reward_model(tmp_path / "rm", base), tmp_path / "exported")
    written = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    assert written["rope_theta"] == 500000 and written["rope_scaling"] == scaling
    assert exported.model.config.rope_parameters == exported.own.config.rope_parameters


def test_weights_keep_their_type(tmp_path, base):
    source = make_reward_model(tmp_path / "rm", base["bpe"])
    RewardModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    exported = Exported(source, tmp_path / "exported")
    weights = load_file(exported.folder / "model.safetensors")
    assert weights.pop("score.weight").dtype == torch.float32
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert_exact(exported.rewards_of_texts(exported.texts(SHORT)), exported.expected(SHORT))


def test_adapter_on_a_bfloat16_base_is_merged_in_float32(tmp_path):
    """As `RewardModel.from_pretrained` merges it; in bfloat16 the rewards would be others."""
    lora = {"use_peft": True, "lora_target_modules": "all-linear", "dtype": "bfloat16", "learning_rate": 1e-2}
    settings = {"pooling_type": "last", "add_sep_token": True, "max_length": MAX_LENGTH, "max_steps": 2}
    run_main(**ON_CPU, **training(tmp_path, **lora, **settings))
    exported = Exported(tmp_path / "out", tmp_path / "exported")
    weights = load_file(exported.folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert_exact(exported.rewards_of_texts(exported.texts(SHORT)), exported.expected(SHORT))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("bpe", {"pooling_type": "average"}, "found pooling_type average, expected last or eos: a sequence class"),
        ("bpe", {"pooling_type": "max"}, "found pooling_type max, expected last or eos"),
        ("sentencepiece", {"add_sep_token": False}, "found no separator, expected one: sentencepiece puts a space"),
        (
            "sentencepiece",
            {"tokenizer_backend": "transformers"},
            "other token ids than in training for .* of 32 texts",
        ),
    ],
)
def test_what_others_cannot_repeat_is_refused_before_the_weights_load(
    tmp_path, base, monkeypatch, kind, flags, message
):
    source = make_reward_model(tmp_path / "rm", base[kind], **flags)
    monkeypatch.setattr("models.load_reward_model", None)
    with pytest.raises(InputError, match=message):
        run_export(source, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_architecture_without_a_class_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "bpe", GraniteConfig(**BPE_SIZES))
    with pytest.raises(InputError, match="found the architecture granite, which has no sequence classification class"):
        run_export(make_reward_model(tmp_path / "rm", base), tmp_path / "exported")


def test_folder_with_other_rewards_is_not_left(tmp_path, base):
    """A config that names another type than that of the weights: written as bfloat16, they are rounded."""
    source = make_reward_model(tmp_path / "rm", base["bpe"])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"found rewards from ids that differ by 0\.\d+, expected at most 1e-05"):
        run_export(source, tmp_path / "out" / "exported")
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="found files, expected a new folder"), complete_folder(path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with complete_folder(tmp_path / "empty") as folder:
        (folder / "config.json").touch()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["config.json"]


def test_model_without_a_head_ends_in_one_line(tmp_path, base):
    source = shutil.copytree(base["bpe"], tmp_path / "base")
    settings = {"pooling_type": "last", "max_length": MAX_LENGTH, "add_sep_token": True}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "reward_settings": settings}), encoding="utf-8")
    flags = command_line(model_name_or_path=source, output_dir=tmp_path / "out" / "exported")
    done = run_tool("export_reward_model.py", *flags, exit_status=2)
    assert "found no reward head" in check_refusal(done.returncode, done.stderr)
    assert list((tmp_path / "out").iterdir()) == []
