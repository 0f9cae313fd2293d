"""A run that is killed and resumed ends with the same bits as one that is left alone."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticore.train import RouterTrainer
from elasticore.train.checkpoints import MANIFEST, PARTIAL, damage, find_checkpoint, newest

from .cut_runs import Tokens, train, trainer_in, what_is_in


def same(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same, and say what does not."""
    first, second = what_is_in(one), what_is_in(other)
    assert set(first) == set(second)
    assert {"optimizer.pt", "scheduler.pt", "router.safetensors", "multipliers.safetensors"} <= set(
        first
    )
    for name in first:
        assert first[name] == second[name], name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that is left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder) == [0]
    return folder / "checkpoint-7"


# An epoch of 22 samples is four optimizer steps, the last one shorter; step 5 is in the second.
@pytest.mark.parametrize(("kind", "workers", "step"), [("tokens", 2, 5), ("jsonl", 0, 3)])
def test_killed_and_resumed_is_the_same_bit_for_bit(
    tmp_path: Path, whole: Path, kind: str, workers: int, step: int
) -> None:
    settings = {"kind": kind, "dataloader_num_workers": workers}
    assert train(tmp_path / "cut", cut=(step, 0, signal.SIGKILL), **settings) == [-signal.SIGKILL]
    assert not (tmp_path / "cut" / "checkpoint-7").exists()
    assert train(tmp_path / "cut", resume=True, **settings) == [0]
    same(whole, tmp_path / "cut" / "checkpoint-7")


def test_packed_rows_killed_and_resumed_are_the_same(tmp_path: Path) -> None:
    assert train(tmp_path / "whole", kind="packed") == [0]
    codes = train(tmp_path / "cut", cut=(5, 0, signal.SIGKILL), kind="packed")
    assert codes == [-signal.SIGKILL]
    assert train(tmp_path / "cut", resume=True, kind="packed") == [0]
    same(tmp_path / "whole" / "checkpoint-7", tmp_path / "cut" / "checkpoint-7")


def test_two_processes_killed_and_resumed_are_the_same(tmp_path: Path) -> None:
    settings = {"processes": 2, "gradient_accumulation_steps": 2}
    assert train(tmp_path / "whole", **settings) == [0, 0]
    codes = train(tmp_path / "cut", cut=(5, 1, signal.SIGKILL), **settings)
    assert codes[0] != 0
    assert codes[1] == -signal.SIGKILL
    assert train(tmp_path / "cut", resume=True, **settings) == [0, 0]
    same(tmp_path / "whole" / "checkpoint-7", tmp_path / "cut" / "checkpoint-7")


def weights(trainer: RouterTrainer) -> list[Any]:
    model: Any = trainer.model
    named = [*model.named_parameters(), *trainer.objective.named_parameters()]
    return [parameter.detach().clone() for _, parameter in named if parameter.requires_grad]


def test_the_order_of_the_data_does_not_depend_on_the_global_generator(tmp_path: Path) -> None:
    # Samples of an offline set are made when they are asked for.
    whole = trainer_in(tmp_path / "run", "offline", max_steps=4)
    whole.train()
    other = trainer_in(tmp_path / "run", "offline", max_steps=4)
    torch.manual_seed(99)
    other.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(other), strict=True))


def test_resuming_loads_no_sample_of_the_steps_before(tmp_path: Path) -> None:
    trainer_in(tmp_path / "run", max_steps=4).train()
    data = Tokens()
    trainer_in(tmp_path / "run", data=data, max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    assert len(data.asked) == 22 - 2 * 6  # the rest of the first epoch
    assert len(set(data.asked)) == len(data.asked)


def test_a_run_killed_while_it_saves_leaves_the_checkpoint_before(
    tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    assert train(run, cut=(3, 0, 0)) == [-signal.SIGKILL]
    assert sorted(path.name for path in run.iterdir()) == [PARTIAL, "checkpoint-2"]
    assert (run / PARTIAL / "checkpoint-4" / "optimizer.pt").exists()
    assert newest(run) == run / "checkpoint-2"
    assert train(run, resume=True) == [0]
    assert not (run / PARTIAL).exists()
    same(whole, run / "checkpoint-7")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 2 and 4."""
    run = tmp_path_factory.mktemp("finished") / "run"
    trainer_in(run, max_steps=4).train()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_folder_of_a_run_stands_for_its_newest_checkpoint(run: Path) -> None:
    assert find_checkpoint(run) == run / "checkpoint-4"
    assert find_checkpoint(run / "checkpoint-2") == run / "checkpoint-2"


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", MANIFEST])
def test_a_checkpoint_with_a_file_missing_is_refused_and_another_named(
    run: Path, name: str
) -> None:
    (run / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}.*Resume from .*checkpoint-2, the newest whole"):
        find_checkpoint(run / "checkpoint-4")
    with pytest.warns(UserWarning, match=r"checkpoint-4 is passed over"):
        assert find_checkpoint(run) == run / "checkpoint-2"


def test_damage_is_found(run: Path) -> None:
    folder = run / "checkpoint-4"
    file = folder / "router.safetensors"
    whole = file.read_bytes()
    assert damage(folder) is None
    file.write_bytes(whole[:-1])
    assert damage(folder) == f"router.safetensors has {len(whole) - 1} bytes, not {len(whole)}"
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert damage(folder) == "router.safetensors has changed since it was written"
    (folder / MANIFEST).write_text("[]")
    assert "cannot be read" in str(damage(folder))


def test_without_a_whole_checkpoint_the_message_says_so(run: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        (run / name / MANIFEST).unlink()
    with pytest.raises(ValueError, match="no whole checkpoint beside it; start a new run"):
        find_checkpoint(run / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate 0.005 \(now 0.001\)"),
        ({"gradient_accumulation_steps": 6}, r"gradient_accumulation_steps 3 \(now 6\)"),
        ({"data": Tokens(20)}, r"samples 22 \(now 20\)"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(
    run: Path, change: dict[str, Any], message: str
) -> None:
    trainer = trainer_in(run, **{"max_steps": 4, **change})
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(run))


def test_old_checkpoints_go_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elasticore.train import resuming

    seen: list[list[str]] = []

    def noted(*arguments: Any, **named: Any) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))
        rotate(*arguments, **named)

    rotate = resuming.rotate_checkpoints
    monkeypatch.setattr(resuming, "rotate_checkpoints", noted)
    trainer_in(tmp_path / "run", max_steps=4, save_steps=1, save_total_limit=2).train()
    assert seen[2:] == [
        ["checkpoint-1", "checkpoint-2", "checkpoint-3"],
        ["checkpoint-2", "checkpoint-3", "checkpoint-4"],
    ]
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-3", "checkpoint-4"]


def test_saving_a_step_again_replaces_its_checkpoint(run: Path) -> None:
    (run / "checkpoint-4" / "router.safetensors").write_bytes(b"")
    trainer_in(run, max_steps=4).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert damage(run / "checkpoint-4") is None
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_resuming_a_run_that_is_finished_takes_no_step(tmp_path: Path) -> None:
    trainer_in(tmp_path, max_steps=3).train()  # in the middle of an epoch
    trainer = trainer_in(tmp_path, max_steps=3)
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert trainer.state.global_step == 3
    trainer._save(str(tmp_path / "again"))
    for name in ("router.safetensors", "multipliers.safetensors"):
        again, whole = (tmp_path / folder / name for folder in ("again", "checkpoint-3"))
        assert again.read_bytes() == whole.read_bytes()
