"""The recipes in the repository say what the paper says, and every documented change fits them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig
from typer.testing import CliRunner

import elasticore as ec
from elasticore.assets import tiny
from elasticore.cli import app
from elasticore.train.preview import preview
from elasticore.train.recipe import Recipe, parts_of
from elasticore.train.settings import changed, read_settings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PAPER = [path for path in RECIPES if path.stem in ("qwen3-4b", "qwen3-8b", "llama-3.1-8b")]
runner = CliRunner()

pytestmark = pytest.mark.skipif(not RECIPES, reason="the recipes are not here")


def documented() -> list[list[str]]:
    """The changes in every row of the table of ablations."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("### Ablations")[1].split("\n#")[0]
    rows = re.findall(r"`(--set [^`]+)`", section)
    return [re.findall(r"--set (\S+)", row) for row in rows]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_makes_its_parts(path: Path) -> None:
    recipe = Recipe.load(path)
    parts = parts_of(recipe)
    assert parts.objective.tasks == tuple(recipe.targets)
    for step in (0, recipe.max_steps - 1):
        assert parts.temperature(step, recipe.max_steps) > 0


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings(path: Path) -> None:
    recipe = Recipe.load(path)
    parts = parts_of(recipe)
    assert len(PAPER) == 3
    # Table 6, on the paper's eight GPUs.
    assert recipe.batch_size * recipe.accumulation * 8 == 48
    assert (recipe.max_steps, recipe.warmup_ratio, recipe.weight_decay) == (300, 0.2, 0.1)
    assert (recipe.router_lr, recipe.multiplier_lr) == (5e-4, 1e-3)
    way = parts.way
    assert (way.retrieval, way.sparse) == (ec.Full(), ec.Streaming(sink=128, local=2048))
    assert isinstance(way.policy, ec.Router)
    assert (way.policy.boundary, way.policy.hidden_multiplier) == (100, 4)
    robust, sensitive = {1.0}, {0.7}
    assert {recipe.targets[task] for task in ("single_qa", "multihop_qa")} == sensitive
    assert {
        recipe.targets[task] for task in ("code", "summarization", "in_context_learning")
    } == robust
    assert parts.objective.signed
    assert recipe.dtype == "bfloat16"
    assert recipe.checkpointing


def test_the_papers_recipes_differ_in_the_backbone_only() -> None:
    ours = [vars(Recipe.load(path)) for path in PAPER]
    for one in ours:
        differing = {key for key in one if one[key] != ours[0][key]}
        assert differing <= {"backbone", "data"}


@pytest.mark.parametrize("change", documented(), ids=" ".join)
def test_every_documented_ablation_fits_every_recipe_of_the_paper(change: list[str]) -> None:
    for path in PAPER:
        recipe = Recipe.load(path, change)
        parts_of(recipe)
        for one in change:
            key, _, value = one.partition("=")
            first, *rest = key.split(".")
            found = getattr(recipe, first)
            for step in rest:
                found = found[step]
            assert found == yaml.safe_load(value)


def test_the_ablations_are_all_there() -> None:
    rows = documented()
    values: dict[str, set[str]] = {}
    for row in rows:
        for one in row:
            key, _, value = one.partition("=")
            values.setdefault(key, set()).add(value)
    assert values == {
        "elastic.policy.boundary": {"50", "100", "200", "400", "800", "null"},
        "elastic.policy.hidden_multiplier": {"2", "4", "6", "8"},
        "targets.single_qa": {"0.7", "0.6", "0.5", "0.4"},
        "targets.multihop_qa": {"0.7", "0.6", "0.5", "0.4"},
        "elastic": {"fa-ssa", "fa-xa", "xa-ssa"},
    }


def written(folder: Path, **settings: Any) -> Path:
    path = folder / "recipe.yaml"
    base = {
        "backbone": "tiny",
        "targets": {"needle": 0.5},
        "data": {"kind": "offline", "tasks": {"needle": 1}, "length": 256},
    }
    path.write_text(yaml.safe_dump(base | settings))
    return path


def test_changes_start_from_what_the_recipe_leaves_out(tmp_path: Path) -> None:
    recipe = Recipe.load(written(tmp_path), ["temperature.end=0.5", "elastic.block_size=64"])
    assert recipe.temperature == {"name": "cosine", "end": 0.5}
    assert recipe.elastic == {"block_size": 64}
    assert Recipe.load(written(tmp_path)).temperature == {"name": "cosine"}


def test_a_later_change_wins_and_an_option_over_both(tmp_path: Path) -> None:
    path = written(tmp_path, max_steps=3)
    assert Recipe.load(path, ["max_steps=4", "max_steps=5"]).max_steps == 5
    assert Recipe.load(path, ["max_steps=4"], max_steps=6).max_steps == 6


def test_numbers_are_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text("a: 5e-4\nb: 1E3\nc: -2.5e+1\nd: 1e5x\ne: '1e5'\nf: 12\n")
    assert read_settings(file) == {
        "a": 5e-4, "b": 1000.0, "c": -25.0, "d": "1e5x", "e": "1e5", "f": 12
    }  # fmt: skip
    assert changed({}, ["lr=5e-4"], defaults={"lr": 1.0}) == {"lr": 5e-4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_steps", "set takes KEY=VALUE.*got 'max_steps'"),
        ("=3", "set takes KEY=VALUE"),
        ("elastic.=3", "set takes KEY=VALUE"),
        ("elastc.sink=3", "there is no setting elastc; there are: accumulation, backbone"),
        ("max_steps.x=3", "max_steps is 300 and has no settings"),
        ("elastic.block_size.x=3", "elastic.block_size is 128 and has no settings"),
        ("targets.qa=0.5", "targets has no qa; there are: needle"),
        ("elastic={", "the value is no YAML"),
        ("elastic.skin=3", "elastic: .*unknown settings skin; there are: policy, retrieval"),
        ("elastic.policy={name: router, boundary: all}", "boundary must be an int or None"),
        ("elastic.policy={name: all-sparse}", "elastic.policy must be {name: router, ...}"),
        ("elastic.boundary=50", "boundary of an older form.*policy: {name: router, boundary: 100"),
        ("elastic.mode=fa-xa", "mode of an older form.*sparse: {name: xattention}"),
        ("temperature.x=3", "temperature does not take these settings"),
        ("max_steps=0", "max_steps must be at least 1, got 0"),
        ("router_lr=fast", "router_lr must be a number, got 'fast'"),
    ],
)
def test_a_change_that_does_not_fit_says_where(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        parts_of(Recipe.load(written(tmp_path, elastic={"block_size": 128}), [change]))


def llama(folder: Path) -> Path:
    """The configuration of Llama-3.1-8B with the tiny model's tokenizer; no weights."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    ).save_pretrained(folder)
    for file in (tiny() / "backbone").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("sharding", "gigabytes"),
    [
        ("none", 16.060522496),
        # The 218,103,808 numbers in the matrices of each of 32 layers, over 8 and over 4.
        ("full", 16.060522496 - 32 * 218103808 * 2 * 7 / 8 / 1e9),
        ("hybrid", 16.060522496 - 32 * 218103808 * 2 * 3 / 4 / 1e9),
    ],
)
def test_a_dry_run_weighs_a_model_of_which_there_are_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str, gigabytes: float
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    path = written(tmp_path, backbone=str(llama(tmp_path)), sharding=sharding, accumulation=6)
    found = preview(Recipe.load(path))
    assert found.unchecked == []
    assert found.figures["rows per step"] == 48
    assert found.figures["tokens per step, at most"] == 48 * 256
    assert found.figures["parameters that train"] == 32 * 263_682
    assert found.figures["frozen parameters"] == 8_030_261_248
    assert found.figures["GB of weights per process"] == pytest.approx(gigabytes, rel=1e-12)


def test_a_dry_run_shows_a_table_and_writes_nothing(tmp_path: Path) -> None:
    config, output = written(tmp_path), tmp_path / "run"
    arguments = ["train", "--config", str(config), "--output", str(output), "--dry-run"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "134,160" in shown.stdout
    report = json.loads(
        runner.invoke(app, [*arguments, "--json", "--set", "accumulation=3"]).stdout
    )
    assert report["figures"]["rows per step"] == 3
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "/nowhere/at/all"}, "backbone /nowhere/at/all is no directory"),
        ({"data": {"kind": "packed", "path": "/nowhere/at/all"}}, "elasticore data build"),
    ],
)
def test_a_dry_run_names_what_is_not_here(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    result = runner.invoke(
        app, ["train", "--config", str(written(tmp_path, **settings)), "--dry-run"]
    )
    assert result.exit_code == 1
    assert "not checked" in result.stderr
    assert message in " ".join(result.stderr.split())
    assert "rows per step" in result.stdout


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    for change, message in (
        ("sharding=full", "there is one process"),
        ("elastic.mode=fa-ssa", "write, each with its own settings"),
        ("elastic.sparse={name: none}", "pattern 'none' is unknown"),
        ("dtype=int8", "dtype must be"),
        ("data.kind=magic", "data needs kind"),
    ):
        result = runner.invoke(
            app, ["train", "--config", str(written(tmp_path)), "--dry-run", "--set", change]
        )
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


def test_launchers_have_a_module_to_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elasticore.train", "--config", str(written(tmp_path))]
    result = subprocess.run(
        [*command, "--dry-run", "--json"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(result.stdout)["figures"]["processes"] == 1


def test_the_released_codes_steps_are_as_large() -> None:
    recipe = Recipe.load(ROOT / "recipes" / "official.yaml")
    micro_batches = 48 // (8 // recipe.sequence_parallel)  # on eight GPUs, a row at a time
    assert (recipe.batch_size, recipe.accumulation) == (1, micro_batches)
    assert recipe.max_grad_norm == pytest.approx(5 / micro_batches, rel=1e-3)
    assert not parts_of(recipe).objective.signed
