"""Points of finished evaluations: which tasks they are of, and what x and y can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elasticore.assets import tiny
from elasticore.eval.analysis import Point, read_decisions, read_points, routing_frequency
from elasticore.eval.analysis.runs_plot import runs_picture
from elasticore.eval.costs import COSTS
from elasticore.eval.report import read_report


def write(folder: Path, method: str, kind: str, scores: dict[str, float], **costs: float) -> None:
    """A method's folder, where every task and group costs the same."""
    (folder / method).mkdir(parents=True)
    (folder / "evaluation.json").write_text("{}")
    own = dict.fromkeys(COSTS) | {"samples": 1} | costs
    tasks = [name for name in scores if name.endswith(("-lcc", "-trec", "-v2"))]
    found = {
        "method": {"name": method, "kind": kind, "settings": {}},
        "scores": {name: {"score": value} for name, value in scores.items()},
        "costs": {name: {"score": own} for name in scores},
        "tasks": tasks,
        "in_groups": [name for name in scores if name.startswith("longbench-e-")],
    }
    (folder / method / "metrics.json").write_text(json.dumps(found))


LONGBENCH = {
    "longbench-e": 40.0,
    "longbench-e-code": 50.0,
    "longbench-e-lcc": 50.0,
    "longbench-e-few-shot": 30.0,
    "longbench-e-trec": 30.0,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write(folder, "full", "full", LONGBENCH, esr=0.0, first_token_seconds=3.0)
    write(folder, "ours", "router", LONGBENCH, esr=0.6, first_token_seconds=2.0)
    return folder


def test_a_point_is_of_the_outermost_group_or_of_each_task(run: Path) -> None:
    points = {point.method: point for point in read_points([run])}
    assert points == {
        "full": Point("full", "longbench-e", 0.0, 40.0),
        "ours": Point("ours", "longbench-e", 0.6, 40.0),
    }
    assert {(p.method, p.task) for p in read_points([run], per_task=True)} == {
        (method, f"longbench-e-{task}") for method in ("full", "ours") for task in ("lcc", "trec")
    }
    chosen = read_points([run], tasks=["*-code", "*-trec"])
    assert {point.task for point in chosen} == {"longbench-e-code", "longbench-e-trec"}


def test_tasks_stand_for_themselves_where_there_is_no_group(tmp_path: Path) -> None:
    write(tmp_path / "run", "full", "full", {"longbench-v2": 30.0}, esr=0.0)
    assert read_points([tmp_path / "run"]) == [Point("full", "longbench-v2", 0.0, 30.0)]


def test_a_task_without_a_group_stands_beside_groups(tmp_path: Path) -> None:
    write(tmp_path / "run", "full", "full", {**LONGBENCH, "longbench-v2": 25.0}, esr=0.0)
    points = read_points([tmp_path / "run"])
    assert [point.task for point in points] == ["longbench-e", "longbench-v2"]
    report = read_report([tmp_path / "run"], groups_only=True)
    shown = {"longbench-e", "longbench-e-code", "longbench-e-few-shot", "longbench-v2"}
    assert shown < set(report.columns)
    assert not {"longbench-e-lcc", "longbench-e-trec"} & set(report.columns)


def test_speedup_is_over_full_of_the_same_run(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", "alone", "streaming", LONGBENCH, first_token_seconds=1.0)
    found = {p.method: p.x for p in read_points([run, tmp_path / "other"], x="speedup")}
    assert found == {"run/full": 1.0, "run/ours": 1.5}
    methods = [p.x for p in read_points([run], x="method", y="esr")]
    assert sorted(methods) == ["full", "ours"]  # type: ignore[type-var]


def test_what_cannot_be_drawn_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task with both x='peak_gb' and y='score'"):
        read_points([run], x="peak_gb")
    with pytest.raises(ValueError, match="x and y must differ"):
        read_points([run], x="score")
    with pytest.raises(FileNotFoundError, match="is no folder of `elasticore eval`"):
        read_points([tmp_path])
    with pytest.raises(FileNotFoundError, match="name RUN/METHOD"):
        read_decisions(run)


@pytest.mark.parametrize("x", ["esr", "prompt_tokens", "method"])
def test_rows_and_pictures(x: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        Point(method, task, method if x == "method" else place + 1.0, 2.0)
        for method in ("full", "ours")
        for place, task in enumerate(("a-4096", "a-8192"))
    ]
    row: dict[str, Any] = dict(points[0].row(x, "score"))
    assert row == {"method": "full", "task": "a-4096", "score": 2.0} | (
        {} if x == "method" else {x: 1.0}
    )
    path = runs_picture(points, tmp_path / "runs.svg", x=x, y="score", title="Runs")
    assert path.read_text("utf-8").count('id="axes_') == 1


def test_a_real_evaluation_gives_points_and_decisions(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")
    from elasticore.eval.evaluate import Evaluation, evaluate

    methods = ("full", f"ours=router:path={tiny() / 'router'}")
    tasks = ("basic:needle", "basic:code")
    evaluation = Evaluation("tiny", tasks, methods, (300,), samples=1, dtype="float32")
    run = evaluate(evaluation, tmp_path / "run")
    points = read_points([run], per_task=True)
    assert sorted((p.method, p.task) for p in points) == [
        (method, f"basic-300-{task}") for method in ("full", "ours") for task in ("code", "needle")
    ]
    assert all((p.x == 0) == (p.method == "full") for p in points)  # type: ignore[comparison-overlap]
    assert all(p.y > 0 for p in read_points([run], x="prompt_tokens", y="speedup"))  # type: ignore[operator]
    shares = routing_frequency(read_decisions(run / "ours"))
    assert shares["basic-300-needle"].shape == (8, 4)
    with pytest.raises(ValueError, match="decides nothing"):
        read_decisions(run / "full")


@pytest.mark.parametrize("text", ["", '{"scores"', "[]", "{}"])
def test_numbers_that_are_damaged_are_named(run: Path, text: str) -> None:
    (run / "ours" / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"ours/metrics.json is damaged: .*start the same"):
        read_report([run])


def test_answers_may_hold_any_mark_of_a_lines_end(run: Path) -> None:
    row = {"task": "vt", "decisions": ["01", "11"], "answer": "one\u2028two\x85three\x0cfour"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (run / "ours" / "samples.jsonl").write_text(text * 2, encoding="utf-8")
    assert read_decisions(run / "ours") == [("vt", ["01", "11"])] * 2
    (run / "ours" / "samples.jsonl").write_text(text[:30], encoding="utf-8")
    with pytest.raises(ValueError, match=r"ours/samples.jsonl is damaged"):
        read_decisions(run / "ours")
