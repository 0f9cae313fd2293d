"""A run goes on only as the run that it was, and its result appears whole."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from elasticore.models.elastic import Elastic
from elasticore.places import held
from elasticore.train import Recipe, train

from .test_recipe import backbone as backbone  # a fixture
from .test_recipe import packed, settings, write


def saving(backbone: Path, **changes: Any) -> Recipe:
    """Three steps, each with a checkpoint."""
    made = {**settings(backbone, max_steps=3, save_steps=1, report_to=[]), **changes}
    return Recipe.load(write(backbone.parent, made))


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def run(backbone: Path) -> Path:
    """A finished run."""
    train(saving(backbone), backbone.parent / "run")
    return backbone.parent / "run"


def way(**changes: Any) -> dict[str, Any]:
    elastic = {
        "policy": {"name": "router", "boundary": 20},
        "sparse": {"name": "streaming", "sink": 16, "local": 16},
    }
    return {"elastic": {**elastic, **changes}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (way(sparse={"name": "streaming", "sink": 32, "local": 16}), r"way\.sparse .*sink=32"),
        (way(sparse={"name": "xattention"}), r"way\.sparse .*now 'XAttention"),
        (way(policy={"name": "router", "boundary": 10}), r"policy .*'boundary': 10"),
        (way(decode="full"), r"way\.decode 'routed' \(now 'full'\)"),
        ({"temperature": {"name": "cosine", "end": 0.5}}, r"temperature .*end=0.5"),
        ({"reduction": "samples"}, r"collator\.reduction 'tokens' \(now 'samples'\)"),
        ({"packed": True}, r"collator\.packed False \(now True\)"),
        ({"dtype": "bfloat16"}, r"dtype 'torch.float32' \(now 'torch.bfloat16'\)"),
        ({"targets": {"qa": 0.5}}, r"objective\.targets\.qa \[0\.4, 0\.8\] \(now 0\.5\)"),
        ({"signed": True}, r"objective\.signed False \(now True\)"),
        ({"policy": "duo"}, "policy .*now .*DuoAttention"),
    ],
)
def test_another_recipe_is_refused_before_anything_is_written(
    run: Path, backbone: Path, changes: dict[str, Any], says: str
) -> None:
    before = contents(run)
    with pytest.raises(ValueError, match=rf"other settings: .*{says}"):
        train(saving(backbone, **changes), run, resume="auto")
    assert contents(run) == before


def test_what_does_not_decide_a_run_may_change(run: Path, backbone: Path) -> None:
    before = (run / "router" / "router.safetensors").read_bytes()
    changed = saving(backbone, keep=1, save_steps=2, logging_steps=3, workers=1)
    train(changed, run, resume=run / "checkpoint-1")
    assert (run / "router" / "router.safetensors").read_bytes() == before


@pytest.mark.parametrize("part", ["embed_tokens", "o_proj"])
def test_a_backbone_that_was_changed_in_its_place_is_another(
    run: Path, backbone: Path, part: str
) -> None:
    file = backbone / "model.safetensors"
    weights = load_file(file)
    save_file({n: w * 1.5 if part in n else w for n, w in weights.items()}, file, {"format": "pt"})
    before = contents(run)
    with pytest.raises(ValueError, match=r"other settings: backbone '\w+' \(now '\w+'\)"):
        train(saving(backbone), run, resume="auto")
    assert contents(run) == before


def test_one_row_that_was_changed_makes_other_data(run: Path, backbone: Path) -> None:
    recipe = saving(backbone)
    file = Path(recipe.data["path"])
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    rows[7]["answer"] = "w6"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"other settings: data '\w+"):
        train(recipe, run, resume="auto")


def test_packed_data_read_otherwise_are_other_data(backbone: Path) -> None:
    data, run = packed(backbone), backbone.parent / "run"
    train(saving(backbone, data=data), run)
    other = saving(backbone, data={**data, "loss": "answer"})
    with pytest.raises(ValueError, match=r"other settings: data '\w+"):
        train(other, run, resume="auto")


def test_a_finished_run_without_checkpoints_is_not_trained_over(backbone: Path) -> None:
    recipe, run = saving(backbone, save_steps=0), backbone.parent / "run"
    train(recipe, run)
    before = contents(run)
    for resume in (None, "auto"):
        with pytest.raises(FileExistsError, match="holds the router of an earlier run, and no"):
            train(recipe, run, resume=resume)
    assert contents(run) == before


def test_a_folder_takes_one_run_at_a_time(backbone: Path) -> None:
    run = backbone.parent / "run"
    with held(run), pytest.raises(BlockingIOError, match="run is being written by process"):
        train(saving(backbone), run)
    assert not run.exists()


@pytest.mark.parametrize("saves", [0, 1])
def test_a_disk_that_is_full_at_the_end_leaves_no_result_and_says_what_it_takes(
    backbone: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    recipe, run = saving(backbone, save_steps=saves), backbone.parent / "run"
    save = Elastic.save

    def full(self: Elastic, path: Path, **settings: Any) -> Path:
        if "checkpoint" in str(path):
            return save(self, path, **settings)
        (path / "router.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Elastic, "save", full)
    then = "with --resume auto goes on from checkpoint-3" if saves else "trains anew"
    with pytest.raises(OSError, match=rf"run: .*No space.* takes about 0\.\d MB.*{then}"):
        train(recipe, run)
    assert not [path for path in run.iterdir() if "router" in path.name]
    monkeypatch.setattr(Elastic, "save", save)
    assert train(recipe, run, resume="auto").is_dir()
