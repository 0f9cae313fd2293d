"""A run's log is read wherever it is, and curves say what was logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elasticore.train.curves import (
    Curves,
    ending,
    mean_and_spread,
    read_curves,
    smooth,
    to_json,
    write_csv,
)
from elasticore.train.plots import training_picture


def entries(steps: int = 12, **changes: Any) -> list[dict[str, Any]]:
    """What a run logs: the task qa is missing in every third log."""
    found = []
    for step in range(1, steps + 1):
        entry = {
            "step": step,
            "loss": 3.0 / step,
            "lm_loss": 2.0 / step,
            "penalty": 1.0 / step,
            "temperature": 1.5,
            "entropy": 0.5,
            "entropy/layer0": 0.6,
            "entropy/layer1": 0.4 / step,
            "msr/code": step / steps,
            "lambda1/code": 0.1 * step,
            "lambda2/code": 0.2 * step,
            "tokens_per_second": 1000.0,
        }
        if step % 3:
            entry |= {"msr/qa": 0.7, "lambda1/qa": 0.3, "lambda2/qa": 0.4}
        found.append(entry | changes)
    return found


def run_in(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "history.json").write_text(json.dumps(entries(**changes)))
    recipe = {"targets": {"qa": [0.6, 0.8], "code": 1.0}, "max_steps": 20}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = {"log_history": [*entries(step), {"step": step, "train_runtime": 1.0}], "max_steps": 50}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "objective.json").write_text(json.dumps({"targets": {"code": 1.0, "qa": 0.7}}))
    return folder


def test_a_run_is_read_with_its_targets(tmp_path: Path) -> None:
    (run,) = read_curves(run_in(tmp_path / "run"))
    assert run.tasks == ("qa", "code"), "in the order of the targets"
    assert run.targets == {"qa": (0.6, 0.8), "code": (1.0, 1.0)}
    assert (run.last_step, run.max_steps) == (12, 20)
    steps, values = run.series("msr/qa")
    assert steps.tolist() == [1, 2, 4, 5, 7, 8, 10, 11]
    assert set(values) == {0.7}


def test_an_interrupted_run_without_a_history_is_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (3, 10, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # cut short
    (run,) = read_curves(tmp_path)
    assert (run.last_step, run.max_steps, run.targets["qa"]) == (10, 50, (0.7, 0.7))
    (one,) = read_curves(tmp_path / "checkpoint-3")
    assert one.last_step == 3
    (same,) = read_curves(tmp_path / "checkpoint-3" / "trainer_state.json")
    assert same.entries == one.entries


def test_a_history_wins_over_checkpoints_that_an_older_run_has_left(tmp_path: Path) -> None:
    checkpoint(run_in(tmp_path / "run"), 40)
    assert read_curves(tmp_path / "run")[0].last_step == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"a": 1}', "is no log of a training run"),
        ("[1, 2]", "is no log of a training run"),
        ('{"runs": [{"history": 3}]}', "is no log of a training run"),
        ("[]", "no figures of routers yet"),
        ('[{"step": 1, "eval_loss": 2.0}]', "no figures of routers yet"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_curves(tmp_path)


def test_a_run_that_is_not_there_or_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_curves(tmp_path / "none")
    with pytest.raises(ValueError, match="wait for its first log"):
        read_curves(tmp_path)


def test_json_of_several_runs_is_read_back(tmp_path: Path) -> None:
    runs = [*read_curves(run_in(tmp_path / "a")), *read_curves(run_in(tmp_path / "b", steps=5))]
    (tmp_path / "both.json").write_text(json.dumps(to_json(runs)))
    back = read_curves(tmp_path / "both.json")
    assert [run.name for run in back] == [run.name for run in runs]
    for ours, theirs in zip(runs, back, strict=True):
        assert (ours.targets, ours.max_steps) == (theirs.targets, theirs.max_steps)
        for figure in ours.names:
            assert np.allclose(ours.series(figure), theirs.series(figure), rtol=5e-6)


def test_figures_that_are_not_finite_are_null_and_not_drawn(tmp_path: Path) -> None:
    (run,) = read_curves(run_in(tmp_path / "run", grad_norm=float("nan")))
    assert run.last("grad_norm") is None
    assert '"grad_norm": null' in json.dumps(to_json([run]), allow_nan=False)


@pytest.mark.parametrize(("n", "steps"), [(1, list(range(1, 13))), (5, [2, 7, 12]), (99, [12])])
def test_thinning_keeps_the_last_log(tmp_path: Path, n: int, steps: list[int]) -> None:
    (run,) = read_curves(run_in(tmp_path / "run"))
    assert [entry["step"] for entry in run.every(n).entries] == steps


def test_a_table_has_a_line_per_run_and_log(tmp_path: Path) -> None:
    runs = [*read_curves(run_in(tmp_path / "a")), *read_curves(run_in(tmp_path / "b"))]
    write_csv(runs, tmp_path / "deep" / "figures.csv")
    lines = (tmp_path / "deep" / "figures.csv").read_text().splitlines()
    assert len(lines) == 1 + 24
    assert lines[0].startswith("run,step,loss,")
    third = dict(zip(lines[0].split(","), lines[3].split(","), strict=True))
    assert (third["step"], third["msr/qa"], third["msr/code"]) == ("3", "", "0.25")


def test_smoothing_keeps_level_and_does_not_lag() -> None:
    assert smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    line = np.arange(100.0)
    inner = slice(8, -8)  # wider than the kernel, 3 · 100 / 40
    assert smooth(line)[inner] == pytest.approx(line[inner])
    assert smooth(np.array([1.0])) == pytest.approx([1.0])
    noisy = np.random.default_rng(0).normal(size=400)
    assert smooth(noisy).std() < 0.5 * noisy.std()


def test_mean_and_spread_cover_what_all_runs_have_reached() -> None:
    every = np.arange(1.0, 9.0), np.arange(1.0, 9.0)
    second = np.array([2.0, 4.0, 6.0]), np.array([4.0, 6.0, 8.0])  # two above, every other step
    steps, mean, spread = mean_and_spread([every, second])
    assert steps.tolist() == [2, 3, 4, 5, 6]
    assert mean.tolist() == [3, 4, 5, 6, 7]
    assert spread == pytest.approx(np.full(5, 2**0.5))
    assert mean_and_spread([every])[2].tolist() == [0] * 8


def test_the_ending_is_the_latest_value_of_each_figure() -> None:
    first = Curves("a", ({"step": 1, "penalty": 1.0, "msr/qa": 0.5}, {"step": 2, "penalty": 2.0}))
    second = Curves("b", ({"step": 2, "penalty": 4.0},))
    assert ending([first, second])["penalty"] == (3.0, 2**0.5)
    assert ending([first, second])["msr/qa"] == (0.5, 0.0)


def picture_of(runs: list[Curves], folder: Path) -> str:
    return training_picture(runs, folder / "deep" / "training.svg").read_text("utf-8")


def test_a_picture_has_a_panel_per_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = picture_of(read_curves(run_in(tmp_path / "run")), tmp_path)
    assert text.count('id="axes_') == 7 + 1  # and the legend's
    for word in ("LM loss", "Regularisation loss", "Entropy", "qa", "code", "target"):
        assert word in text


def test_panels_of_what_was_not_logged_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    duo = [{"step": n, "penalty": 0.1, "distillation": 1.0 / n, "msr/all": 0.3} for n in (1, 2, 3)]
    text = picture_of([Curves("duo", tuple(duo))], tmp_path)
    assert text.count('id="axes_') == 3 + 1
    assert "Distillation loss" in text
    assert "LM loss" not in text
    assert "target" not in text


def test_a_single_log_and_many_tasks_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = {"step": 1, "penalty": 0.1, "lm_loss": 1.0, **{f"msr/task{i}": 0.5 for i in range(9)}}
    text = picture_of([Curves("one", (one,), {"task3": (0.2, 0.4)})], tmp_path)
    assert all(f"task{i}" in text for i in range(9))


def test_several_runs_become_a_mean(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [read_curves(run_in(tmp_path / str(n), steps=9 + n))[0] for n in range(3)]
    text = picture_of(runs, tmp_path)
    assert "deviation of 3 runs" in text
    assert "as logged" not in text


def test_runs_with_other_targets_are_not_averaged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (first,) = read_curves(run_in(tmp_path / "a"))
    other = Curves("b", first.entries, {"qa": (0.5, 0.5)})
    with pytest.raises(ValueError, match="different targets for qa"):
        picture_of([first, other], tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        picture_of([], tmp_path)


def test_a_recipe_beside_the_log_that_is_damaged_is_named(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    (run / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"run/recipe.json is damaged: Expecting"):
        read_curves(run)
