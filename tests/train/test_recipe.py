"""A YAML recipe runs from end to end, and says what is wrong with it before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import elasticore as ec
from elasticore.data import TokenSequence
from elasticore.data.encoding import fingerprint
from elasticore.data.layouts import Header
from elasticore.data.writer import PackedWriter
from elasticore.train import LagrangianObjective, Recipe, train
from elasticore.train.validation import Measured


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    folder = tmp_path / "backbone"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    return folder


def settings(backbone: Path, **changes: Any) -> dict[str, Any]:
    data = backbone.parent / "data.jsonl"
    rows = [
        {
            "task": "qa",
            "prompt": " ".join(f"w{(i * j) % 63 + 1}" for j in range(60)),
            "answer": "w5",
        }
        for i in range(1, 13)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "backbone": str(backbone),
        "targets": {"qa": [0.4, 0.8]},
        "data": {"kind": "jsonl", "path": str(data), "max_length": 100},
        "elastic": {
            "policy": {"name": "router", "boundary": 20},
            "sparse": {"name": "streaming", "sink": 16, "local": 16},
        },
        "max_steps": 2,
        "batch_size": 2,
        "accumulation": 1,
        "logging_steps": 1,
        "save_steps": 0,
        "dtype": "float32",
        **changes,
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recipe_runs_and_leaves_routers_logs_and_history(
    backbone: Path, tmp_path: Path, checkpointing: bool
) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone, checkpointing=checkpointing)))
    folder = train(recipe, tmp_path / "run")
    model = ec.elasticize(LlamaForCausalLM.from_pretrained(backbone), folder)
    assert len(ec.routers(model)) == 2
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2]
    assert {"lm_loss", "penalty", "msr/qa", "lambda1/qa"} <= set(history[0])
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_recipe_is_reproducible(backbone: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone)))
    first, second = (train(recipe, tmp_path / name) for name in ("a", "b"))
    assert (first / "router.safetensors").read_bytes() == (
        second / "router.safetensors"
    ).read_bytes()


def test_overrides_win_over_the_file(backbone: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(backbone))
    assert Recipe.load(path, max_steps=7, backend=None).max_steps == 7


def packed(backbone: Path, tasks: tuple[str, ...] = ("qa",)) -> dict[str, Any]:
    """Packed data of the backbone's tokenizer: rows of sequences of 40 and 20 tokens."""
    folder = backbone.parent / "packed"
    folder.mkdir()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone)
    writer = PackedWriter(folder, Header(64, tasks, ("mine",), fingerprint(tokenizer)))
    for row in range(4):
        sequences = []
        for length in (40, 20):
            ids = np.array([(row + 7 * at) % 63 + 1 for at in range(length)], np.int32)
            labels = np.where(np.arange(length) < length - 3, np.int32(-100), ids)
            sequences.append(TokenSequence(ids, labels, tasks[row % len(tasks)], "mine"))
        writer.add(sequences)
    writer.close()
    return {"kind": "packed", "path": str(folder)}


def test_a_recipe_trains_on_packed_data(backbone: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone, data=packed(backbone), batch_size=1)))
    train(recipe, tmp_path / "run")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2]
    assert all(0 <= entry["msr/qa"] <= 1 for entry in history)


def test_tasks_of_packed_data_without_a_target_are_named(backbone: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(backbone, data=packed(backbone, ("qa", "code", "chat"))))
    with pytest.raises(ValueError, match="holds the tasks chat, code, which have no target"):
        train(Recipe.load(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unheard": 1}, r"unknown settings \['unheard'\]"),
        ({"targets": {"qa": 1.5}}, "targets"),
        ({"targets": {}}, "targets"),
        ({"data": {"kind": "magic"}}, "data needs kind"),
        ({"data": {"kind": "packed", "path": "/nowhere/at/all"}}, "elasticore data build"),
        ({"data": {"kind": "packed", "max_length": 4}}, "data does not take"),
        ({"data": {"kind": "offline", "tasks": {"code": 1}, "wrong": 1}}, "data does not take"),
        ({"elastic": {"mode": "fa-ssa"}}, "mode of an older form"),
        ({"elastic": {"sparse": {"name": "streaming", "sink": 100}}}, "sink"),
        ({"temperature": {"name": "warm"}}, "warm"),
        ({"dtype": "int8"}, "dtype"),
        ({"backend": "magic"}, "backend"),
        ({"backbone": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"keep": -1}, "keep"),
        ({"keep_best": True}, "keep_best needs validation"),
        ({"validation": {"kind": "magic"}}, "validation needs kind"),
    ],
)
def test_bad_settings_end_before_anything_is_written(
    backbone: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, {**settings(backbone), **change})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(Recipe.load(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        Recipe.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no YAML"):
        Recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "short.yaml").write_text("backbone: x\n")
    with pytest.raises(ValueError, match=r"missing settings \['data', 'targets'\]"):
        Recipe.load(tmp_path / "short.yaml")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


def test_resume_takes_a_checkpoint_a_run_or_the_newest(backbone: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone, max_steps=3, save_steps=1, keep=2)))
    run = tmp_path / "run"
    whole = (train(recipe, run, resume="auto") / "router.safetensors").read_bytes()
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-3"]
    for resume in ("auto", run, run / "checkpoint-2"):
        shutil.rmtree(run / "checkpoint-3")
        shutil.rmtree(run / "router")
        assert (train(recipe, run, resume=resume) / "router.safetensors").read_bytes() == whole
        assert len(json.loads((run / "history.json").read_text())) == 3


def test_a_new_run_does_not_mix_with_an_earlier_one(backbone: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone, max_steps=1, save_steps=1)))
    train(recipe, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds checkpoint-1 of an earlier run; pass resume"):
        train(recipe, tmp_path / "run")


def validated(backbone: Path, **changes: Any) -> dict[str, Any]:
    made = settings(backbone, max_steps=4, eval_steps=1, keep=1, router_lr=0.5, **changes)
    return {**made, "validation": made["data"], "multiplier_init": [5.0, 5.0]}


def test_the_best_checkpoint_is_kept_and_becomes_the_result(backbone: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, validated(backbone, save_steps=4, keep_best=True)))
    router = train(recipe, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    best = tmp_path / "run" / f"checkpoint-{state['best_global_step']}"
    assert best.name != "checkpoint-4"  # its lm_loss is the lowest, but it misses the target
    assert checkpoints(tmp_path / "run") == sorted([best.name, "checkpoint-4"])
    assert (router / "router.safetensors").read_bytes() == (
        best / "router.safetensors"
    ).read_bytes()
    seen = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in seen] == [1, 2, 3, 4]
    for entry in seen:
        assert entry["eval_loss"] == entry["eval_lm_loss"] + entry["eval_penalty"]
        assert 0 <= entry["eval_msr/qa"] <= 1


def test_validating_does_not_change_what_is_learnt(backbone: Path, tmp_path: Path) -> None:
    with_it = validated(backbone)
    without = {k: v for k, v in with_it.items() if k != "validation"}
    results = []
    for name, content in (("with", with_it), ("without", without)):
        folder = train(Recipe.load(write(tmp_path, content)), tmp_path / name)
        results.append((folder / "router.safetensors").read_bytes())
    assert results[0] == results[1]


def test_two_moments_are_compared_under_the_same_multipliers() -> None:
    objective = LagrangianObjective({"qa": 0.5}, init=(1.0, 1.0), seed=0)
    ids = torch.zeros(2, dtype=torch.int64)
    far = Measured(1.0, torch.tensor([0.0, 0.0]), ids)
    near = Measured(1.5, torch.tensor([0.5, 0.5]), ids)
    assert far.score(objective) == pytest.approx(1.0 + 0.5 + 0.25)
    assert near.score(objective) == 1.5
    assert near.score(objective) < far.score(objective)
    objective.lambda1.data.fill_(0.1)
    objective.lambda2.data.fill_(0.1)
    assert far.score(objective) < near.score(objective)
