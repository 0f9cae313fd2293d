"""A model, a tokenizer or routers whose files are damaged are refused by name, never half used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from elasticore import Elastic
from elasticore.assets import tiny
from elasticore.cli import app
from elasticore.models.loading import load_backbone, load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 13\n"


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny() / "backbone", tmp_path / "backbone"))


@pytest.fixture
def router(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny() / "router", tmp_path / "router"))


@pytest.mark.parametrize(
    ("content", "says"),
    [(POINTER, "header too large"), (None, "incomplete metadata"), (b"", "header too small")],
)
def test_weights_that_are_damaged_are_named(
    backbone: Path, content: bytes | None, says: str
) -> None:
    file = backbone / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5_000_000] if content is None else content)
    with pytest.raises(ValueError, match=rf"model .*backbone cannot be read .*{says}.*; copy or"):
        load_backbone(str(backbone))


def test_weights_that_are_missing_are_not_made_up(backbone: Path) -> None:
    file = backbone / "model.safetensors"
    weights = {n: w for n, w in load_file(file).items() if "layers.3.self_attn" not in n}
    save_file(weights, file, {"format": "pt"})
    says = r"files lack \d weights, such as model.layers.3.self_attn.k_norm.weight; copy or"
    with pytest.raises(ValueError, match=says):
        load_backbone(str(backbone))


@pytest.mark.parametrize("content", [b'{"a":', POINTER, b"{}"])
@pytest.mark.parametrize("load", [load_tokenizer, load_backbone])
def test_a_tokenizer_that_is_damaged_is_named(backbone: Path, content: bytes, load: object) -> None:
    (backbone / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer .*backbone cannot be read \((JSON|Key)"):
        load(str(backbone))  # type: ignore[operator]


def test_a_tokenizer_that_is_missing_is_not_made_up(backbone: Path) -> None:
    for file in backbone.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="backbone has no tokens: there is no tokenizer"):
        load_tokenizer(str(backbone))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_routers_that_are_not_finite_are_refused(router: Path, value: float) -> None:
    file = router / "router.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("layers.3.") and "weight" in name)
    weights[name].view(-1)[5] = value
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"router.safetensors is damaged: {name} is not finite"):
        Elastic.load(router)


def test_a_router_of_another_dtype_is_taken(router: Path) -> None:
    file = router / "router.safetensors"
    save_file({name: one.to(torch.float16) for name, one in load_file(file).items()}, file)
    assert Elastic.load(router) is not None


def test_a_command_ends_in_one_line_that_names_the_model(backbone: Path, tmp_path: Path) -> None:
    (backbone / "model.safetensors").write_bytes(POINTER)
    (tmp_path / "prompt.txt").write_text("def")
    options = ["--model", str(backbone), "--router", "tiny"]
    result = CliRunner().invoke(
        app, ["run", *options, "--prompt-file", str(tmp_path / "prompt.txt")]
    )
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: model {backbone} cannot be read")
