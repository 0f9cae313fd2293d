"""Slips in a recipe are refused by name, in a dry run as in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elasticore.train import Recipe
from elasticore.train.preview import preview
from elasticore.train.recipe import parts_of

TINY = """backbone: tiny
targets: {code: 1.0}
data: {kind: offline, tasks: {code: 1}, length: 256}
report_to: []
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('signed="false"', "signed must be true or false, got 'false'"),
        ("signed=flase", "signed must be true or false, got 'flase'"),
        ("checkpointing=7", "checkpointing must be true or false, got 7"),
        ("keep_best='no'", "keep_best must be true or false, got 'no'"),
        ("reduction=token", "reduction must be one of tokens, samples, got 'token'"),
        ("sharding=ful", "sharding must be one of none, full, hybrid, got 'ful'"),
        ("dtype=fp16", "dtype must be one of bfloat16, float32, got 'fp16'"),
        ("policy=elastik", "policy must be one of elastic, duo, prulong, got 'elastik'"),
        ("targets=[0.7]", r"targets must be a mapping, got \[0.7\]"),
        ("targets={1: 0.7}", r"targets must be a mapping, got \{1: 0.7\}"),
        ("targets.code=true", r"targets\['code'\] must be a number or a pair"),
        ('targets.code="0.7"', r"targets\['code'\] must be a number or a pair"),
        ("data=[1]", r"data must be a mapping, got \[1\]"),
        ("data=", "data is empty; give a mapping"),
        ("elastic=null", "elastic is empty; give a mapping or text, or leave it out"),
        ("validation=null", "validation is empty; give a mapping, or leave it out"),
        ("validation=x", "validation must be a mapping, got 'x'"),
        ("temperature=cosine", "temperature must be a mapping, got 'cosine'"),
        ("backbone=4", "backbone must be text, got 4"),
        ("seed=1.5", "seed must be an int, got 1.5"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("max_steps=true", "max_steps must be an int, got True"),
        ("max_steps=", "max_steps is empty; give an int, or leave it out"),
        ('router_lr="5e-4"', "router_lr must be a number, got '5e-4'"),
        ("multiplier_init=0.5", "multiplier_init must be a list of 2 numbers, got 0.5"),
        ("report_to=[tensorbord]", "report_to must name some of .*, got 'tensorbord'"),
        ("report_to=[1]", "report_to must be text or a list of texts"),
        ("data.length=4k", "data does not take these settings: length must be an int, got '4k'.$"),
        ("data.length=5000", "data holds samples of up to 5000 tokens, but .* 4096 positions"),
        ("backbone=runs/model #2", "set backbone=runs/model #2: what follows # is left out"),
    ],
)
def test_a_slip_is_refused_by_name(change: str, says: str, recipe: Path) -> None:
    with pytest.raises(ValueError, match=says):
        preview(Recipe.load(recipe, [change]))


def test_settings_of_the_right_types_are_taken(recipe: Path) -> None:
    changes: list[str] = ["signed=true", "router_lr=1", "multiplier_init=[0, 1]", "report_to=none"]
    loaded = Recipe.load(recipe, [*changes, "elastic=fa-xa", "backbone='a #2'"])
    assert (loaded.signed, loaded.router_lr, loaded.multiplier_init) == (True, 1, [0, 1])
    assert loaded.backbone == "a #2"
    assert parts_of(loaded).report_to == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TINY + "targets: {code: 0.2}\n", "targets is there twice, in line 1"),
        (TINY.replace("length: 256", "length: 256, length: 512"), "length is there twice"),
        ("backbone: tiny\n\ttargets: {}\n", r"cannot start any token, in line 2, column 1\.$"),
        (TINY + "elastic:\n  # sparse: {name: xattention}\n", "elastic is empty"),
        (b"\xff\xfe", "recipe.yaml is no YAML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_is_refused_in_one_line(text: Any, says: str, recipe: Path) -> None:
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=says) as error:
        Recipe.load(recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_files_from_windows_are_read(mark: bytes, recipe: Path) -> None:
    recipe.write_bytes(mark + TINY.replace("\n", "\r\n").encode())
    assert Recipe.load(recipe).targets == {"code": 1.0}
