"""Routers on disk and on the hub: exact, for the model they belong to, and never code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import elasticore
from elasticore import (
    AllRetrieval,
    AllSparse,
    Elastic,
    HeadTable,
    Policy,
    Router,
    RouterMismatch,
    UnsupportedModel,
    XAttention,
)

from .tiny import FAMILIES, HALF, SETTINGS, elastic, routings, small, spread, tiny, tokens

WEIGHTS, JSON, CARD = "router.safetensors", "router.json", "README.md"
PROMPT = tokens(2, 60)


def trained(family: str = "llama", way: Elastic = SETTINGS, **settings: Any) -> Any:
    return spread(elasticore.elasticize(tiny(family, **settings), way))


def logits_of(model: Any) -> Tensor:
    """What the routers of all layers say, ``[layers, sequences, kv_heads, 2]``."""
    return torch.stack([routing.logits for routing in routings(model, PROMPT)])


def saved(model: Any, path: Path) -> Path:
    return elasticore.way_of(model).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(trained(), tmp_path / "router")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: str, tmp_path: Path) -> None:
    way = small("fa-xa", HALF, policy=Router(boundary=7), decode="full", turn="keep")
    model = trained(family, way)
    expected = logits_of(model)
    path = saved(model, tmp_path / "deep" / "router")
    assert sorted(file.name for file in path.iterdir()) == [CARD, JSON, WEIGHTS]
    loaded = elasticore.elasticize(tiny(family), path)
    assert torch.equal(logits_of(loaded), expected)
    again = elasticore.elasticize(tiny(family), Elastic.load(str(path)))
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    saved(loaded, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (path / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / JSON).read_text() == (path / JSON).read_text()


def test_saving_again_replaces_the_files(folder: Path) -> None:
    other = spread(elasticore.elasticize(tiny(), SETTINGS), seed=5)
    saved(other, folder)
    assert torch.equal(logits_of(elasticore.elasticize(tiny(), folder)), logits_of(other))
    assert sorted(file.name for file in folder.iterdir()) == [CARD, JSON, WEIGHTS]


@pytest.mark.parametrize(
    "policy", [AllSparse(), AllRetrieval(), HeadTable([[1, 0], [0, 0], [1, 1]]), Router(boundary=9)]
)
@pytest.mark.parametrize("mode", ["fa-ssa", "fa-xa", "xa-ssa"])
def test_every_way_survives_a_file(policy: Policy, mode: str, tmp_path: Path) -> None:
    way = small(mode, HALF, policy=policy)
    loaded = Elastic.load(way.save(tmp_path))
    assert loaded.to_dict() == way.to_dict() and loaded.base is None
    expected = routings(elasticore.elasticize(tiny(), way), PROMPT)
    if isinstance(policy, Router):  # not trained: new weights at every start
        return
    for one, two in zip(
        expected, routings(elasticore.elasticize(tiny(), loaded), PROMPT), strict=True
    ):
        assert torch.equal(one.decisions, two.decisions)


def test_modules_of_ones_own_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modules of its own.*ByContent"):
        saved(elastic(tiny()), tmp_path / "router")
    with pytest.raises(ValueError, match="not elastic"):
        saved(tiny(), tmp_path / "router")
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize("mode", ["fa-ssa", "fa-xa", "xa-ssa"])
def test_files_of_format_1_are_read(mode: str, tmp_path: Path) -> None:
    way = small(mode, HALF, policy=Router(boundary=9), decode="full")
    model = trained(way=way)
    path = saved(model, tmp_path)
    config: dict[str, Any] = {
        "mode": mode,
        "sink": 16,
        "local": 32,
        "block_size": 16,
        "selector": None if mode == "fa-ssa" else {"name": "xattention", "threshold": 0.5},
        "boundary": 9,
        "hidden_multiplier": 4,
        "sampler": "gumbel-softmax",
        "decode": "full",
    }
    old = {"format": 1, "elasticore": "0.1.0", "config": config}
    old["base_model"] = json.loads((path / JSON).read_text())["base_model"]
    (path / JSON).write_text(json.dumps(old))
    loaded = Elastic.load(path)
    assert loaded.to_dict() == way.to_dict()
    assert torch.equal(logits_of(elasticore.elasticize(tiny(), loaded)), logits_of(model))


def test_head_tables_of_format_1_are_read(tmp_path: Path) -> None:
    table = HeadTable([[1, 0], [0, 0], [1, 1]])
    path = small(policy=table).save(tmp_path)
    old = {"format": 1, "config": {"sink": 16, "local": 32, "block_size": 16}}
    old["base_model"] = elasticore.fingerprint(tiny())
    (path / JSON).write_text(json.dumps(old))
    policy = Elastic.load(path).policy
    assert isinstance(policy, HeadTable) and torch.equal(policy.sparse, table.sparse)


def test_the_ways_that_have_names() -> None:
    assert Elastic.load("fa-ssa").to_dict() == Elastic().to_dict()
    assert isinstance(Elastic.load("xa-ssa").retrieval, XAttention)
    shipped = Elastic.load("tiny")
    assert shipped.base is not None and shipped.base["family"] == "qwen3"


# The model that routers belong to.

OTHER_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "family": (lambda: tiny("qwen3"), RouterMismatch, r"family llama \(model: qwen3\)"),
    "layers": (
        lambda: tiny(num_hidden_layers=2),
        RouterMismatch,
        r"another model: layers 3 \(model: 2\)",
    ),
    "heads": (
        lambda: tiny(num_key_value_heads=4),
        RouterMismatch,
        r"another model: kv_heads 2 \(model: 4\)",
    ),
    "head_dim": (
        lambda: tiny(head_dim=32),
        RouterMismatch,
        r"another model: head_dim 16 \(model: 32\)",
    ),
    "weights": (lambda: tiny(seed=1), RouterMismatch, r"other weights.*check_base=False"),
    "unsupported": (
        lambda: tiny("mistral", sliding_window=16),
        RouterMismatch,
        r"family llama \(model: mistral\)",
    ),
}


@pytest.mark.parametrize("difference", OTHER_MODELS)
def test_routers_of_another_model_are_refused(folder: Path, difference: str) -> None:
    make, error, message = OTHER_MODELS[difference]
    model = make()
    with pytest.raises(error, match=message):
        elasticore.elasticize(model, folder)
    assert not elasticore.is_elastic(model)


def test_what_cannot_be_elastic_cannot_load(folder: Path) -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        elasticore.elasticize(torch.nn.Linear(2, 2), folder)
    local = tiny("mistral", sliding_window=16)
    settings = json.loads((folder / JSON).read_text())
    settings["base_model"]["family"] = "mistral"
    (folder / JSON).write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match="sliding window"):
        elasticore.elasticize(local, folder, check_base=False)


def test_check_base_can_be_waived_for_weights_but_not_for_sizes(folder: Path) -> None:
    model = elasticore.elasticize(tiny(seed=1), folder, check_base=False)
    expected = load_file(folder / WEIGHTS)["layers.0.task_mlp.0.weight"]
    assert torch.equal(elasticore.routers(model)[0].task_mlp[0].weight, expected)
    with pytest.raises(RouterMismatch, match="kv_heads"):
        elasticore.elasticize(tiny(num_key_value_heads=4), folder, check_base=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_in_bfloat16_are_the_same_model(family: str, tmp_path: Path) -> None:
    saved(trained(family), tmp_path)
    model = elasticore.elasticize(tiny(family).bfloat16(), tmp_path)
    assert elasticore.routers(model)[0].task_mlp[0].weight.dtype == torch.float32
    assert elasticore.fingerprint(model) == elasticore.fingerprint(tiny(family))


# Files that are damaged, foreign or from the future.


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        settings = json.loads((folder / JSON).read_text())
        change(settings)
        (folder / JSON).write_text(json.dumps(settings))

    return apply


def retensor(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


WEIGHT = "layers.0.task_mlp.0.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, "neither a directory nor a hub id"),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        FileNotFoundError,
        "has no router.safetensors",
    ),
    "no settings": (
        lambda folder: (folder / JSON).unlink(),
        FileNotFoundError,
        "has no router.json",
    ),
    "no files": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        FileNotFoundError,
        "has no router.safetensors and no router.json",
    ),
    "weights: truncated": (truncate, ValueError, "router.safetensors is damaged"),
    "weights: empty": (write(WEIGHTS, b""), ValueError, "router.safetensors is damaged"),
    "weights: noise": (
        write(WEIGHTS, bytes(range(256)) * 9),
        ValueError,
        "router.safetensors is damaged",
    ),
    "weights: pickle": (
        lambda folder: torch.save({"a": torch.ones(1)}, folder / WEIGHTS),
        ValueError,
        "router.safetensors is damaged",
    ),
    "weights: one missing": (
        retensor(lambda tensors: tensors.pop(WEIGHT)),
        ValueError,
        r"do not fit its own settings.*task_mlp.0.weight",
    ),
    "weights: a layer missing": (
        retensor(lambda t: [t.pop(name) for name in list(t) if name.startswith("layers.2.")]),
        RouterMismatch,
        "routers for 2 layers; model has 3",
    ),
    "weights: one too many": (
        retensor(lambda tensors: tensors.update({"lm_head.weight": torch.ones(1)})),
        ValueError,
        "unexpected tensor 'lm_head.weight'",
    ),
    "weights: one too many in a layer": (
        retensor(lambda tensors: tensors.update({"layers.0.extra": torch.ones(1)})),
        ValueError,
        "do not fit its own settings.*extra",
    ),
    "weights: another shape": (
        retensor(lambda tensors: tensors.update({WEIGHT: torch.ones(3, 3)})),
        ValueError,
        "do not fit its own settings.*size mismatch",
    ),
    "settings: no JSON": (write(JSON, b"{"), ValueError, "router.json is no router file"),
    "settings: no text": (write(JSON, b"\xff\xfe"), ValueError, "router.json is no router file"),
    "settings: a list": (write(JSON, b"[]"), ValueError, "router.json is no router file"),
    "settings: no way": (
        edit(lambda settings: settings.pop("way")),
        ValueError,
        "'way' is missing",
    ),
    "settings: no base model": (
        edit(lambda settings: settings.update(base_model="llama")),
        ValueError,
        "router.json is no router file",
    ),
    "settings: newer": (
        # A newer format may know settings that this version does not: the format is the reason.
        edit(lambda s: (s.update(format=3), s["way"].update(wings=2))),
        ValueError,
        "format 3, but this elasticore reads 2; update",
    ),
    "settings: unknown": (
        edit(lambda settings: settings["way"].update(wings=2)),
        ValueError,
        "unknown settings wings",
    ),
    "settings: wrong value": (
        edit(lambda settings: settings["way"]["sparse"].update(sink=3)),
        ValueError,
        "sink=3 is no multiple",
    ),
    "settings: wrong type": (
        edit(lambda settings: settings["way"]["policy"].update(boundary="all")),
        ValueError,
        "boundary must be an int or None",
    ),
    "settings: unknown pattern": (
        edit(lambda settings: settings["way"].update(sparse={"name": "os.system"})),
        ValueError,
        "pattern 'os.system' is unknown",
    ),
    "settings: other sizes": (
        edit(lambda settings: settings["way"]["policy"].update(hidden_multiplier=2)),
        ValueError,
        "do not fit its own settings",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_leave_the_model_as_it_was(folder: Path, damage: str) -> None:
    model = tiny()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(PROMPT).logits
    harm, error, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(error, match=f"(?s){message}") as raised:
        elasticore.elasticize(model, folder)
    assert str(folder) in str(raised.value)
    assert not elasticore.is_elastic(model)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(PROMPT).logits, expected)


def test_other_files_in_the_folder_are_never_read(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "exploded",))

    torch.save(Bomb(), folder / "router.pt")
    torch.save(Bomb(), folder / "pytorch_model.bin")
    code = f"import pathlib; pathlib.Path({str(folder / 'exploded')!r}).touch()"
    for name in ("router.py", "modeling_elasticore.py", "__init__.py"):
        (folder / name).write_text(code)
    elasticore.elasticize(tiny(), folder)
    assert not (folder / "exploded").exists()
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no router\.safetensors"):
        elasticore.elasticize(tiny(), folder)
    assert not (folder / "exploded").exists()


# The hub.


def test_a_hub_id_downloads_the_two_files_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []

    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = elasticore.elasticize(tiny(), Elastic.load("someone/router", revision="v1"))
    assert elasticore.is_elastic(model)
    elasticore.elasticize(tiny(), "someone/router")
    wanted = {"allow_patterns": [WEIGHTS, JSON]}
    assert calls == [
        (("someone/router",), {"revision": "v1", **wanted}),
        (("someone/router",), {"revision": None, **wanted}),
    ]


def test_a_hub_repository_without_routers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"someone/else has no router\.safetensors"):
        elasticore.elasticize(tiny(), "someone/else")


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"a/b is no directory.*hub.*no network"):
        elasticore.elasticize(tiny(), "a/b")


@pytest.mark.parametrize("there", [False, True])
def test_pushing_uploads_the_two_files_and_a_card_where_there_is_none(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls.append(("create", name, private, exist_ok))

        def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
            calls.append(("upload", Path(path_or_fileobj).name, path_in_repo, repo_id))

        def file_exists(self, repo_id: str, filename: str) -> bool:
            assert (repo_id, filename) == ("me/router", CARD)
            return there

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (tmp_path / "secret.txt").write_text("mine")
    elasticore.way_of(trained()).save(tmp_path, push_to_hub="me/router")
    files = [WEIGHTS, JSON, *([] if there else [CARD])]
    uploads = [("upload", name, name, "me/router") for name in files]
    assert calls == [("create", "me/router", True, True), *uploads]
    assert 'elasticore.elasticize(model, "me/router")' in (tmp_path / CARD).read_text()
    calls.clear()
    (tmp_path / CARD).write_text("# Notes of mine\n\n---\n\n---\n")  # no card: not for the hub
    elasticore.way_of(trained()).save(tmp_path, push_to_hub="me/router")
    assert [call[1] for call in calls] == ["me/router", WEIGHTS, JSON]


def test_no_code_of_others_is_ever_trusted() -> None:
    sources = Path(elasticore.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "trust_remote_code=True" in path.read_text()]


def test_settings_and_fingerprint_are_readable_json(folder: Path) -> None:
    settings = json.loads((folder / JSON).read_text())
    assert settings["format"] == 2 and settings["elasticore"] == elasticore.__version__
    assert Elastic.from_dict(settings["way"]).to_dict() == SETTINGS.to_dict()
    weights = settings["base_model"].pop("weights")
    assert len(weights) == 32 and int(weights, 16) >= 0
    assert settings["base_model"] == {
        "family": "llama",
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 16,
        "name": "",
    }
