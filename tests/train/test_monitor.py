"""What a run logs is what happened in it, and a log survives the run's end."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from elasticore.router import Routing
from elasticore.train import Recipe, RouterTrainer, TrainingSample, monitor, train
from elasticore.train.curves import read_curves
from elasticore.train.monitor import HistoryFile, Meter, decision_entropy, reporters

from .test_recipe import backbone, settings, write  # noqa: F401 - backbone is a fixture
from .test_trainer import Noise, trainer_in

CPU = torch.device("cpu")


def routing(margins: Tensor) -> Routing:
    """Logits whose difference is ``margins``, on different levels."""
    retrieval = torch.linspace(-3, 3, margins.numel()).view(margins.shape)
    return Routing((margins > 0).to(torch.int8), torch.stack([retrieval, retrieval + margins], -1))


def alone(tensor: Tensor, reduction: str) -> Tensor:
    return tensor


def test_entropy_is_that_of_the_probability_without_noise() -> None:
    margins = torch.tensor([[0.0, 1.0, -4.0], [9.0, -0.5, 2.0]])
    p = torch.sigmoid(margins.double())
    wanted = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    (entropy,) = decision_entropy([routing(margins)]).tolist()  # type: ignore[union-attr]
    assert entropy == pytest.approx(float(wanted), rel=1e-5)


def test_entropy_is_ln_2_undecided_and_vanishes_decided() -> None:
    layers = [torch.full((2, 4), margin) for margin in (0.0, 40.0, -40.0, 500.0)]
    entropy = decision_entropy([routing(margins) for margins in layers])
    assert entropy is not None
    assert not entropy.requires_grad
    assert entropy[0] == torch.tensor(math.log(2))
    assert 0 < float(entropy[1]) < 1e-15 and 0 < float(entropy[2]) < 1e-15
    assert entropy[3] == 0


def test_policies_without_logits_have_no_entropy() -> None:
    assert decision_entropy([Routing(torch.zeros(1, 2, dtype=torch.int8))]) is None


def test_a_meter_gives_weighted_means_and_starts_anew() -> None:
    meter = Meter()
    assert not meter
    meter.add("loss", torch.tensor(1.0), 0.5)
    meter.add("loss", torch.tensor(2.0), 0.5)
    meter.add("msr", torch.tensor([1.0, 0.0]), torch.tensor([2, 0]))
    means, _ = meter.read(CPU, alone)
    assert float(means["loss"]) == 3.0
    assert float(means["msr"][0]) == 0.5 and means["msr"][1].isnan()
    assert not meter


def test_tokens_are_those_of_all_processes_without_padding() -> None:
    meter = Meter()
    meter.steps = 2
    ids = torch.zeros(2, 8, dtype=torch.int64)
    meter.count({"input_ids": ids}, 3)
    meter.count({"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [1] * 3 + [0] * 5])}, 4)
    seen: list[Tensor] = []

    def three_alike(tensor: Tensor, reduction: str) -> Tensor:
        seen.append(tensor)
        return tensor * 3 if reduction == "sum" else tensor

    _, costs = meter.read(CPU, three_alike)
    assert seen[-1].tolist() == [16 + 11, 7]
    assert costs["learnt_tokens"] == 3 * 7 / 2
    assert costs["tokens_per_second"] > 0
    assert "peak_memory_gb" not in costs


@pytest.mark.gpu
def test_nothing_waits_for_the_device_before_it_is_read() -> None:
    meter, device = Meter(), torch.device("cuda")
    logits = torch.randn(2, 4, 2, device=device)
    decided = [Routing(torch.zeros(2, 4, dtype=torch.int8, device=device), logits)]
    inputs = {"input_ids": logits, "attention_mask": torch.ones(2, 8, device=device).long()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        entropy = decision_entropy(decided)
        assert entropy is not None
        for _ in range(2):
            meter.add("entropy", entropy * 2, 2)
            meter.add("msr", entropy, torch.ones_like(entropy).long())
            meter.count(inputs, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    means, costs = meter.read(device, alone)
    torch.testing.assert_close(means["entropy"], entropy)
    assert costs["peak_memory_gb"] > 0


def test_a_trainer_logs_them(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=2)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "penalty" in entry)
    assert {"tokens_per_second", "learnt_tokens", "entropy", "entropy/layer0"} <= set(second)
    # Two micro-batches of three samples, of which the last eight tokens are learnt.
    assert first["learnt_tokens"] == 48
    assert first["entropy"] == pytest.approx(
        (first["entropy/layer0"] + first["entropy/layer1"]) / 2
    )
    # Fresh routers are close to undecided.
    assert 0.6 < first["entropy"] <= math.log(2)


class Even(Noise):
    """Samples of 80 tokens."""

    def __getitem__(self, index: int) -> TrainingSample:
        return super().__getitem__(index - index % 3 + 1)


def test_speed_is_the_tokens_of_all_micro_batches_over_the_time_between_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=2.0)
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = trainer_in(tmp_path, steps=4, logging_steps=2)
    trainer.train_dataset = Even()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "penalty" in entry]
    # Two steps of two micro-batches of three samples; the clock goes on by 2 when it is read.
    assert [entry["tokens_per_second"] for entry in logs] == [2 * 2 * 3 * 80 / 2] * 2


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=1)
    trainer.train()
    trainer.evaluate(Noise())  # type: ignore[arg-type]
    assert not trainer.meter


class Cut(Exception):
    """Stands for whatever ends a run."""


def test_a_run_that_is_cut_leaves_its_log(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(HistoryFile())
    (tmp_path / "history.json").write_text('[{"step": 99, "penalty": 0}]')  # of an older run
    before = trainer.before_step

    def cut(step: int, max_steps: int) -> None:
        if step == 3:
            raise Cut
        before(step, max_steps)

    trainer.before_step = cut  # type: ignore[method-assign]
    with pytest.raises(Cut):
        trainer.train()
    assert read_curves(tmp_path)[0].last_step == 3
    resumed = trainer_in(tmp_path, steps=4, save_strategy="steps", save_steps=2)
    resumed.add_callback(HistoryFile())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [entry["step"] for entry in json.loads((tmp_path / "history.json").read_text())]
    assert steps == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def test_reporters_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ["tensorboard", "wandb"]
    monkeypatch.setattr(monitor, "get_available_reporting_integrations", lambda: here)
    assert reporters(None) == ["tensorboard"]
    assert reporters("wandb") == ["wandb"]
    assert reporters([]) == reporters("none") == []
    assert reporters("all") == here
    with pytest.raises(ValueError, match=r"report_to must name some of .*wandb, got 'paper'"):
        reporters(["tensorboard", "paper"])
    with pytest.raises(ValueError, match="mlflow, which is not installed"):
        reporters("mlflow")
    monkeypatch.setattr(monitor, "get_available_reporting_integrations", list)
    with pytest.warns(UserWarning, match="TensorBoard is not installed"):
        assert reporters(None) == []


def test_a_recipe_reports_where_it_is_told_and_leaves_standard_output_alone(
    backbone: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(Recipe.load(write(tmp_path, settings(backbone, report_to=[]))), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("events.out.tfevents*"))
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2"]
    assert all("Ω qa 0." in line and "tokens/s" in line for line in lines)


def test_a_reporter_that_is_not_there_ends_before_anything_is_written(
    backbone: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone, report_to="paper")))
    with pytest.raises(ValueError, match="report_to must name"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def shown(run: Path) -> list[int]:
    """The steps that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in run.rglob("events.out.tfevents*")}
    found = EventAccumulator(str(folder)).Reload()
    return [event.step for event in found.Scalars("train/lm_loss")]


def test_tensorboard_shows_every_step_of_a_run_that_was_killed_once(
    backbone: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    changes = {"max_steps": 4, "save_steps": 2, "report_to": "tensorboard"}
    recipe = Recipe.load(write(tmp_path, settings(backbone, **changes)))
    before = RouterTrainer.before_step

    def cut(self: RouterTrainer, step: int, max_steps: int) -> None:
        if step == 3:
            raise Cut
        before(self, step, max_steps)

    monkeypatch.setattr(RouterTrainer, "before_step", cut)
    with pytest.raises(Cut):
        train(recipe, tmp_path / "run")
    assert shown(tmp_path / "run") == [1, 2, 3]
    monkeypatch.setattr(RouterTrainer, "before_step", before)
    train(recipe, tmp_path / "run", resume="auto")
    assert shown(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize(("steps", "logged"), [(4, [4]), (10, [10]), (12, [10, 12])])
def test_a_run_of_any_length_leaves_its_last_step(
    backbone: Path,  # noqa: F811
    tmp_path: Path,
    steps: int,
    logged: list[int],
) -> None:
    changes = {"max_steps": steps, "logging_steps": 10, "report_to": []}
    train(Recipe.load(write(tmp_path, settings(backbone, **changes))), tmp_path / "run")
    (curves,) = read_curves(tmp_path / "run")
    assert [entry["step"] for entry in curves.entries] == logged
