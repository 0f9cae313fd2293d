"""``elasticore convert``, as a user and as a script would call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import elasticore
from elasticore.cli import app
from elasticore.models.loading import load_backbone
from elasticore.router import write_duo

from .models.test_official import official

runner = CliRunner()


@pytest.mark.parametrize("command", ["official", "pattern"])
def test_help_shows_an_example(command: str) -> None:
    result = runner.invoke(app, ["convert", command, "--help"])
    assert result.exit_code == 0
    assert f"elasticore convert {command}" in " ".join(result.stdout.split())


def test_an_official_checkpoint_is_told_and_written(tmp_path: Path) -> None:
    official(tmp_path / "official", retrieval_mode="xattn")
    arguments = ["convert", "official", str(tmp_path / "official"), str(tmp_path / "router")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert (
        "router_mlp.4.weight" in text
        and "retrieval=XAttention(" in text
        and "changed places" in text
    )
    report = json.loads(runner.invoke(app, [*arguments, "--threshold", "0.8", "--json"]).stdout)
    assert report["layers"] == 3
    assert report["way"]["retrieval"]["threshold"] == 0.8
    theirs = "mask_allocator.cls_router_head_agnostic.4.weight"
    assert {"theirs": theirs, "ours": "router_mlp.4.weight", "shape": [2, 16]} in report["mapped"]
    assert (tmp_path / "router" / "router.json").is_file()


def test_unknown_tensors_end_in_code_2(tmp_path: Path) -> None:
    official(tmp_path / "official", more={"model.surprise": torch.zeros(1)})
    arguments = ["convert", "official", str(tmp_path / "official"), str(tmp_path / "router")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "not understood: model.surprise" in " ".join(result.stderr.split())


def test_a_pattern_is_told_and_written(tmp_path: Path) -> None:
    scores = torch.linspace(0, 1, 32).view(8, 4)
    pattern = write_duo(tmp_path / "pattern", scores, 32, 128)
    arguments = ["convert", "pattern", str(pattern), str(tmp_path / "router"), "--model", "tiny"]
    result = runner.invoke(app, [*arguments, "--sparsity", "0.25", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["msr"] == 0.25
    assert report["sparse"][:3] == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert "× × × ×" in runner.invoke(app, arguments).stdout
    model = elasticore.elasticize(load_backbone("tiny")[0], tmp_path / "router")
    assert len(elasticore.routers(model)) == 8
