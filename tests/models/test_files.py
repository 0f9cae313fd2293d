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
from elasticore import AllSparse, ElasticConfig, RouterMismatch, UnsupportedModel

from .tiny import FAMILIES, HALF, SETTINGS, elastic, spread, tiny, tokens

WEIGHTS, JSON = "router.safetensors", "router.json"
PROMPT = tokens(2, 60)


def trained(family: str = "llama", config: ElasticConfig = SETTINGS, **settings: Any) -> Any:
    return spread(elasticore.elasticize(tiny(family, **settings), config))


def logits_of(model: Any) -> Tensor:
    """What the routers of all layers say, ``[layers, sequences, kv_heads, 2]``."""
    model(PROMPT)
    return torch.stack([routing.logits for routing in elasticore.routings(model)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return elasticore.save_router(trained(), tmp_path / "router")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: str, tmp_path: Path) -> None:
    config = ElasticConfig(
        mode="fa-xa", sink=16, local=32, block_size=16, selector=HALF, boundary=7, decode="full"
    )
    model = trained(family, config)
    expected = logits_of(model)
    path = elasticore.save_router(model, tmp_path / "deep" / "router")
    assert sorted(file.name for file in path.iterdir()) == [JSON, WEIGHTS]
    loaded = elasticore.load_router(tiny(family), path)
    assert torch.equal(logits_of(loaded), expected)
    again = elasticore.elasticize(tiny(family), str(path))  # the other way to say the same
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    elasticore.save_router(loaded, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (path / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / JSON).read_text() == (path / JSON).read_text()


def test_saving_again_replaces_the_files(folder: Path) -> None:
    other = spread(elasticore.elasticize(tiny(), SETTINGS), seed=5)
    elasticore.save_router(other, folder)
    assert torch.equal(logits_of(elasticore.load_router(tiny(), folder)), logits_of(other))
    assert sorted(file.name for file in folder.iterdir()) == [JSON, WEIGHTS]


def test_loading_into_an_elastic_model_replaces_its_routers(folder: Path) -> None:
    model = elastic(tiny(), AllSparse)
    elasticore.load_router(model, folder)
    assert torch.equal(logits_of(model), logits_of(elasticore.load_router(tiny(), folder)))
    assert elasticore.restore(model)(PROMPT).logits.equal(tiny()(PROMPT).logits)


def test_policies_have_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policy AllSparse; only AttentionRouters"):
        elasticore.save_router(elastic(tiny(), AllSparse), tmp_path / "router")
    with pytest.raises(ValueError, match="not elastic"):
        elasticore.save_router(tiny(), tmp_path / "router")
    assert not (tmp_path / "router").exists()


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
        elasticore.load_router(model, folder)
    assert not elasticore.is_elastic(model)


def test_what_cannot_be_elastic_cannot_load(folder: Path) -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        elasticore.load_router(torch.nn.Linear(2, 2), folder)
    local = tiny("mistral", sliding_window=16)
    settings = json.loads((folder / JSON).read_text())
    settings["base_model"]["family"] = "mistral"
    (folder / JSON).write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match="sliding window"):
        elasticore.load_router(local, folder, check_base=False)


def test_check_base_can_be_waived_for_weights_but_not_for_sizes(folder: Path) -> None:
    model = elasticore.load_router(tiny(seed=1), folder, check_base=False)
    expected = load_file(folder / WEIGHTS)["layers.0.task_mlp.0.weight"]
    assert torch.equal(elasticore.routers(model)[0].task_mlp[0].weight, expected)
    with pytest.raises(RouterMismatch, match="kv_heads"):
        elasticore.load_router(tiny(num_key_value_heads=4), folder, check_base=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_in_bfloat16_are_the_same_model(family: str, tmp_path: Path) -> None:
    elasticore.save_router(trained(family), tmp_path)
    model = elasticore.load_router(tiny(family).bfloat16(), tmp_path)
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
        r"does not fit its own settings.*task_mlp.0.weight",
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
        "does not fit its own settings.*extra",
    ),
    "weights: another shape": (
        retensor(lambda tensors: tensors.update({WEIGHT: torch.ones(3, 3)})),
        ValueError,
        "does not fit its own settings.*size mismatch",
    ),
    "settings: no JSON": (write(JSON, b"{"), ValueError, "router.json is no router file"),
    "settings: no text": (write(JSON, b"\xff\xfe"), ValueError, "router.json is no router file"),
    "settings: a list": (write(JSON, b"[]"), ValueError, "router.json is no router file"),
    "settings: no config": (
        edit(lambda settings: settings.pop("config")),
        ValueError,
        "'config' is missing",
    ),
    "settings: no base model": (
        edit(lambda settings: settings.update(base_model="llama")),
        ValueError,
        "router.json is no router file",
    ),
    "settings: newer": (
        # A newer format may know settings that this version does not: the format is the reason.
        edit(lambda s: (s.update(format=2), s["config"].update(wings=2))),
        ValueError,
        "format 2, but this elasticore reads 1; update",
    ),
    "settings: unknown": (
        edit(lambda settings: settings["config"].update(wings=2)),
        ValueError,
        "unknown settings wings",
    ),
    "settings: wrong value": (
        edit(lambda settings: settings["config"].update(sink=3)),
        ValueError,
        "sink=3 is no multiple",
    ),
    "settings: wrong type": (
        edit(lambda settings: settings["config"].update(boundary="all")),
        ValueError,
        "boundary must be an int or None",
    ),
    "settings: unknown selector": (
        edit(lambda settings: settings["config"].update(selector={"name": "os.system"})),
        ValueError,
        "selector 'os.system' is unknown",
    ),
    "settings: other sizes": (
        edit(lambda settings: settings["config"].update(hidden_multiplier=2)),
        ValueError,
        "does not fit its own settings",
    ),
}


@pytest.mark.parametrize("was_elastic", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_leave_the_model_as_it_was(
    folder: Path, damage: str, was_elastic: bool
) -> None:
    model = tiny()
    if was_elastic:
        spread(elasticore.elasticize(model, SETTINGS), seed=3)
    routers = elasticore.routers(model) if was_elastic else []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(PROMPT).logits
    harm, error, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(error, match=f"(?s){message}") as raised:
        elasticore.load_router(model, folder)
    assert str(folder) in str(raised.value)
    assert elasticore.is_elastic(model) == was_elastic
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(PROMPT).logits, expected)
    if was_elastic:
        assert elasticore.routers(model) == routers


def test_other_files_in_the_folder_are_never_read(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "exploded",))

    torch.save(Bomb(), folder / "router.pt")
    torch.save(Bomb(), folder / "pytorch_model.bin")
    code = f"import pathlib; pathlib.Path({str(folder / 'exploded')!r}).touch()"
    for name in ("router.py", "modeling_elasticore.py", "__init__.py"):
        (folder / name).write_text(code)
    elasticore.load_router(tiny(), folder)
    assert not (folder / "exploded").exists()
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no router\.safetensors"):
        elasticore.load_router(tiny(), folder)
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
    model = elasticore.load_router(tiny(), "someone/router", revision="v1")
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
        elasticore.load_router(tiny(), "someone/else")


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"a/b is no directory.*hub.*no network"):
        elasticore.load_router(tiny(), "a/b")


def test_pushing_uploads_the_two_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Hub:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls.append(("create", name, private, exist_ok))

        def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
            calls.append(("upload", Path(path_or_fileobj).name, path_in_repo, repo_id))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (tmp_path / "secret.txt").write_text("mine")
    elasticore.save_router(trained(), tmp_path, push_to_hub="me/router")
    assert calls == [
        ("create", "me/router", True, True),
        ("upload", WEIGHTS, WEIGHTS, "me/router"),
        ("upload", JSON, JSON, "me/router"),
    ]


def test_no_code_of_others_is_ever_trusted() -> None:
    sources = Path(elasticore.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "trust_remote_code=True" in path.read_text()]


def test_settings_and_fingerprint_are_readable_json(folder: Path) -> None:
    settings = json.loads((folder / JSON).read_text())
    assert settings["format"] == 1 and settings["elasticore"] == elasticore.__version__
    assert ElasticConfig.from_dict(settings["config"]) == SETTINGS
    weights = settings["base_model"].pop("weights")
    assert len(weights) == 32 and int(weights, 16) >= 0
    assert settings["base_model"] == {
        "family": "llama",
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 16,
        "name": "",
    }
