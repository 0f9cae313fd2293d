"""The reproduction from training to page, with next to no training."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("recipes.tiny", reason="the recipes are not here")
pytest.importorskip("matplotlib")

from recipes.study import runs, scores
from recipes.study.runs import Run, Trainings, gate_scores
from recipes.tiny import analyses, baselines, reproduce
from recipes.tiny.plan import QUICK, QUICK_RECIPE, elastic
from recipes.tiny.sections import SECTIONS

pytestmark = pytest.mark.slow
CONFIG = Path("recipes/tiny/routers.yaml")
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which everything was done once."""
    path = tmp_path_factory.mktemp("tiny")
    result = again(path)
    assert result.exit_code == 0, result.output
    return path


def again(folder: Path) -> Result:
    arguments = ["--quick", "--runs", str(folder), "--output", str(folder / "page")]
    return runner.invoke(reproduce.app, arguments)


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "page" / "reproduction.json").read_text(encoding="utf-8"))


def trainings(folder: Path) -> Trainings:
    return Trainings.of(folder / "quick", CONFIG, QUICK_RECIPE, parallel=1)


def test_the_figures_hold_every_method_and_analysis(folder: Path) -> None:
    found = figures(folder)
    assert found["failed"] == []
    assert list(found["trainings"]) == ["elastic-t0.75-s0", "duo-s0"]
    assert {"full", "streaming", "elastic-t0.75", "duo", "duo@0.5", "moba"} <= set(found["results"])
    assert set(found["results"]["full"]) == {"256", "512"}
    assert set(found["analyses"]) == {"sparsification", "similarity", "curves", "examples"}
    assert list(found["seconds"]) == ["train", "score", "analyse", "report"]
    own = found["results"]["elastic-t0.75"]["256"]["all"]["msr"]["mean"]
    # The static method was trained for, and cut at, the routers' own share, to the nearest head.
    share = found["results"]["duo"]["256"]["all"]["msr"]["mean"]
    assert abs(share - own) <= 0.5 / 32 + 1e-4
    assert f"policy_settings.sparsity={own:.4f}" in found["trainings"]["duo-s0"]["changes"]


def test_the_page_holds_every_section_and_needs_nothing_else(folder: Path) -> None:
    page = (folder / "page" / "report.html").read_text(encoding="utf-8")
    for section in SECTIONS:
        assert f'id="{section.name}"' in page
    for name in ("front", "tasks", "examples", "limits", "made"):
        assert f'id="{name}"' in page
    assert page.count('src="data:image/png;base64,') >= 8
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "elastic attention answers" in page


def test_the_page_is_made_from_the_figures_alone(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "figures.json"
    source.write_text((folder / "page" / "reproduction.json").read_text())
    result = runner.invoke(
        reproduce.app, ["report", "--results", str(source), "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    first = (folder / "page" / "report.html").read_text(encoding="utf-8")
    assert page.split('id="made"')[0] == first.split('id="made"')[0]  # the rest has its own time


def test_what_is_done_is_not_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done twice")

    monkeypatch.setattr(subprocess, "Popen", twice)
    monkeypatch.setattr(scores, "score", twice)
    monkeypatch.setattr(analyses, "sparsification", twice)
    before = figures(folder)
    # But an analysis of other trainings is none of these.
    curves = folder / "quick" / "analyses" / "curves.json"
    curves.write_text(json.dumps({"about": "others", "result": "theirs"}), encoding="utf-8")
    result = again(folder)
    assert result.exit_code == 0, result.output
    after = figures(folder)
    assert after["results"] == before["results"]
    assert after["analyses"] == before["analyses"]


def test_the_table_of_baselines_takes_what_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "score", None)
    output = tmp_path / "baselines.json"
    arguments = ["--quick", "--runs", str(folder), "--output", str(output)]
    import typer

    app = typer.Typer()
    app.command()(baselines.main)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert list(found["results"]) == ["elastic", "duo"]
    accuracy = found["results"]["elastic"]["needle"]["accuracy"]
    assert set(accuracy) == {"mean", "spread", "seeds"}
    assert (
        accuracy["mean"]
        == figures(folder)["results"]["elastic-t0.75"]["256"]["needle"]["accuracy"]["mean"]
    )


def test_trained_gates_can_be_cut_at_any_share(folder: Path) -> None:
    assert gate_scores(folder / "quick" / "duo-s0").shape == (8, 4)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        gate_scores(folder)


def test_a_failed_training_is_shown_and_the_others_go_on(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.console, "width", 200)
    work = trainings(folder)
    good = elastic(0.75, QUICK.seeds)
    finished = work.train([Run("broken", 0, ("backbone=/no/such/model",)), *good])
    assert finished == good
    (failure,) = work.failures
    assert failure.name == "broken-s0"
    assert failure.code != 0
    assert "/no/such/model" in failure.log
    said = capfd.readouterr().err
    assert "broken-s0: ended with code" in said
    assert "/no/such/model" in said


def test_other_settings_in_the_same_folder_are_refused(folder: Path) -> None:
    work = Trainings.of(folder / "quick", CONFIG, (*QUICK_RECIPE, "router_lr=0.5"), parallel=1)
    with pytest.raises(ValueError, match=r"other router_lr; delete it"):
        work.train(elastic(0.75, 1))
    # How many processes make the samples changes nothing.
    work = Trainings.of(folder / "quick", CONFIG, (*QUICK_RECIPE, "workers=3"), parallel=1)
    assert work.done(elastic(0.75, 1)[0])


def test_a_wrong_setting_is_said_before_anything_starts(tmp_path: Path) -> None:
    work = trainings(tmp_path)
    with pytest.raises(ValueError, match="hidden_multiplier"):
        work.train([*elastic(0.75, 1), Run("wrong", 0, ("elastic.policy.hidden_multiplier=0",))])
    assert not (tmp_path / "quick").exists()


def test_a_run_that_is_given_twice_trains_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    work = trainings(folder)
    assert work.train([*elastic(0.75, 1), *elastic(0.75, 1)]) == elastic(0.75, 1)


def test_a_backbone_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    text = CONFIG.read_text(encoding="utf-8")
    config.write_text(text.replace("backbone: tiny", f"backbone: {tmp_path / 'none'}"))
    arguments = ["--quick", "--config", str(config), "--runs", str(tmp_path / "runs")]
    result = runner.invoke(reproduce.app, arguments)
    assert result.exit_code == 2
    assert "is no directory with a model" in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_ends_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = subprocess.Popen

    def remember(*args: Any, **kwargs: Any) -> Any:
        started.append(start(*args, **kwargs))
        return started[-1]

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    monkeypatch.setattr(runs._Process, "look", interrupt)
    work = trainings(tmp_path)
    (run,) = elastic(0.75, 1)
    with pytest.raises(KeyboardInterrupt):
        work.train([run])
    (process,) = started
    assert process.poll() is not None
