"""Routers beside fixed choices of heads: the same mean Ω_MSR, and paired differences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.study import compare
from recipes.study.compare import Size, Study
from recipes.study.records import Record, summary
from recipes.study.runs import Trainings, at_once
from recipes.study.scores import Scorer, mean_msr

QUICK = (
    *("max_steps=2", "batch_size=2", "logging_steps=1", "dtype=float32"),
    *("data.length=256", "workers=0"),
)


def figures(needle: list[float], code: list[float], msr: float = 0.5) -> dict[str, Any]:
    return {
        "needle": {"each": needle, "msr": msr, "esr": 0.1},
        "code": {"each": code, "msr": msr, "esr": 0.1},
    }


def test_differences_are_paired_over_samples_and_averaged_over_seeds() -> None:
    records = [
        Record("routers", 0, "routers", 64, figures([1, 1, 0, 1], [0.5, 0.5, 0.5, 0.5])),
        Record("routers", 1, "routers", 64, figures([1, 1, 1, 1], [0.7, 0.7, 0.7, 0.7])),
        Record("duo", 0, "routers", 64, figures([1, 0, 0, 1], [0.6, 0.6, 0.6, 0.6], 0.7)),
    ]
    routers, duo = summary(records, ["needle"])
    assert "ahead" not in routers and routers["seeds"] == 2
    assert (routers["sensitive"], routers["sensitive_spread"]) == (87.5, 12.5)
    assert (routers["robust"], duo["msr"]) == (60.0, 0.7)
    # Gaps of the needle's samples: 0, 1, 0.5, 0.
    assert duo["ahead"] == {"sensitive": 37.5, "robust": 0.0}
    assert duo["error"]["sensitive"] == pytest.approx(100 * (0.171875 / 3) ** 0.5, abs=0.01)
    assert duo["error"]["robust"] == 0


@pytest.mark.slow
def test_a_study_of_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ORACLE_SHARES", (1.0, 0.5))
    trainings = Trainings.of(tmp_path, Path("recipes/tiny/routers.yaml"), QUICK)
    scorer = Scorer(tmp_path / "scores", dtype="float32")
    free = ("chosen=xattention:threshold=0.9,block_size=32",)
    few = {"seeds": 1, "shares": (0.5,), "samples": 2, "length": 256, "lengths": (), "tables": 1}
    size = Size(**few, static=("duo",), long=0, methods=free)  # type: ignore[arg-type]
    study = Study(trainings, scorer, size)
    assert "code" not in study.sensitive
    trained = trainings.train(study.runs(), study.static)
    assert not trainings.failures
    assert set(study.trained()) == set(trained)
    assert list(study.parts(trained)) == ["fixed", "routers-s0", "random", "oracle"]
    records = list(study.records(trained))
    found = {(record.group, record.beside): record for record in records}
    heads = scorer.shape[0] * scorer.shape[1]
    for group in ("routers", "routers at 0.5"):
        share = mean_msr(found[group, group].figures)
        for name in ("duo", "frequency"):  # to the nearest head
            assert abs(mean_msr(found[name, group].figures) - share) <= 0.5 / heads + 1e-9
        layers = mean_msr(found["by-layer", group].figures)  # as near as samples of its own tell
        assert abs(layers - share) < abs(1 - share)
    main = found["routers", "routers"]
    for group in ("within tasks", "between tasks"):
        assert mean_msr(found[group, "routers"].figures) == pytest.approx(mean_msr(main.figures))
    for task, own in found["per task", "routers"].figures.items():
        assert abs(own["msr"] - main.figures[task]["msr"]) <= 0.5 / heads + 1e-9
    again = list(study.records(trained))  # from what was kept
    assert [r.figures for r in again] == [r.figures for r in records]
    rows = summary(records, study.sensitive)
    assert {
        "full",
        "streaming",
        "random",
        "oracle",
        "per task",
        "chosen",
        "routers, prompt in full",
    } <= {row["group"] for row in rows}


def test_commands_run_side_by_side_and_a_failure_keeps_none_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('here'); sys.exit(int(sys.argv[1]))"
    commands = {str(n): [sys.executable, "-c", code, str(n % 2)] for n in range(4)}
    at_once(commands, tmp_path, 2)
    assert [(tmp_path / f"{n}.log").read_text().strip() for n in range(4)] == ["here"] * 4
    said = capsys.readouterr().err
    assert "1: ended with code 1" in said and "3: ended" in said and "2: ended" not in said
