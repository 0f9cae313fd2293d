"""``elasticore plot training`` draws a run and says where the picture is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elasticore.cli import app

pytest.importorskip("matplotlib")
runner = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    history = [
        {
            "step": step,
            "lm_loss": 2.0 / step,
            "penalty": 0.5,
            "entropy": 0.5,
            "entropy/layer0": 0.9,
            "entropy/layer1": 0.1,
            "msr/qa": 0.1 * step,
            "lambda1/qa": 0.25,
            "lambda2/qa": 0.5,
        }
        for step in range(1, 8)
    ]
    (folder / "history.json").write_text(json.dumps(history))
    recipe = {"targets": {"qa": [0.6, 0.8]}, "max_steps": 10}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_picture_and_the_end_values(run: Path, tmp_path: Path, kind: str) -> None:
    picture = tmp_path / f"new/training.{kind}"
    result = runner.invoke(app, ["plot", "training", str(run), "--output", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 1000
    text = " ".join(result.stdout.split())
    for part in ("qa", "0.700", "0.6 to 0.8", "0.250", "step 7 of 10", "layer1", "0.286"):
        assert part in text, part


def test_json_holds_the_curves_and_can_be_drawn_again(run: Path, tmp_path: Path) -> None:
    picture, table = str(tmp_path / "a.png"), tmp_path / "a.csv"
    arguments = ["plot", "training", str(run), "--output", picture, "--csv", str(table), "--json"]
    result = runner.invoke(app, [*arguments, "--every", "3"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["picture"] == picture
    assert report["end"]["msr/qa"] == {"mean": pytest.approx(0.7), "spread": 0.0}
    assert [entry["step"] for entry in report["runs"][0]["history"]] == [1, 4, 7]
    assert len(table.read_text().splitlines()) == 4
    (tmp_path / "curves.json").write_text(result.stdout)
    again = [str(tmp_path / "curves.json"), str(run), "--output", str(tmp_path / "b.png")]
    result = runner.invoke(app, ["plot", "training", *again])
    assert result.exit_code == 0, result.output
    assert "± 0.000" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run nowhere does not exist"),
        ([".", "--output", "a.gif"], "output must end in .png, .svg, .pdf, got a.gif"),
        (["{tmp}"], "wait for its first log"),
        (["{run}/recipe.json"], "is no log of a training run"),
    ],
)
def test_bad_input_ends_in_one_line(
    run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [a.format(tmp=tmp_path, run=run) for a in arguments]
    result = runner.invoke(app, ["plot", "training", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_help_shows_an_example() -> None:
    result = runner.invoke(app, ["plot", "training", "--help"])
    assert "elasticore plot training runs/tiny" in " ".join(result.stdout.split())
