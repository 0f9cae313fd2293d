"""``elasticore analyze``: every command leaves a picture and the same numbers as CSV and JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from elasticore.cli import app

pytest.importorskip("matplotlib")
runner = CliRunner()
SMALL = ["--dtype", "float32", "--length", "512", "--samples", "1"]
STREAMING = "streaming:sink=32,local=64,block_size=32"


def analyze(output: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows, which the CSV file holds as well."""
    result = runner.invoke(app, ["analyze", *arguments, "--output", str(output), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["picture"], report["csv"]) == (str(output), str(output.with_suffix(".csv")))
    assert output.stat().st_size > 1000
    with output.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {key: "nan" if value is None else str(value) for key, value in row.items()}
        for row in report["rows"]
    ]
    return report["rows"]


def test_retrieval(tmp_path: Path) -> None:
    rows = analyze(tmp_path / "a.pdf", "retrieval", "--tasks", "needle,vt", *SMALL)
    assert len(rows) == 8 * 8
    assert all(0 <= row["score"] <= 1 for row in rows)


def test_sparsification(tmp_path: Path) -> None:
    tasks = ["--tasks", "needle,code", "--rank-tasks", "needle", "--ratios", "0.5,1"]
    rows = analyze(tmp_path / "a.png", "sparsification", *SMALL, *tasks, "--method", STREAMING)
    assert [(row["msr"], row["task"], row["sparse_heads"]) for row in rows] == [
        (msr, task, 32 * msr) for msr in (0, 0.5, 1) for task in ("needle", "code")
    ]
    assert rows[0]["retention"] == 100 > rows[4]["retention"]


def test_frequency(tmp_path: Path) -> None:
    rows = analyze(tmp_path / "a.png", "frequency", *SMALL, "--tasks", "needle,code")
    assert {row["task"] for row in rows} == {"needle", "code", "all tasks"}
    shares = {
        task: sum(row["sparse"] for row in rows if row["task"] == task) / 32
        for task in ("needle", "code")
    }
    assert 0 < shares["needle"] < shares["code"]


def test_similarity(tmp_path: Path) -> None:
    rows = analyze(
        tmp_path / "a.svg", "similarity", *SMALL, "--tasks", "needle,code", "--layer", "4"
    )
    assert len(rows) == 2 * 2 * 4
    assert all(abs(row["similarity"]) <= 1 + 1e-12 for row in rows)


def test_fidelity_of_routers_and_of_a_method(tmp_path: Path) -> None:
    arguments = ["fidelity", *SMALL, "--rows", "16", "--tasks", "needle"]
    routed = analyze(tmp_path / "a.png", *arguments)
    assert {row["sparse"] for row in routed} == {0, 1}
    plain = analyze(tmp_path / "b.png", *arguments, "--method", STREAMING)
    assert {row["sparse"] for row in plain} == {None}
    assert len(routed) == len(plain) == 8 * 8
    assert all(0 < row["kept_mass"] <= 1 for row in [*routed, *plain])


def test_a_table_is_shown(tmp_path: Path) -> None:
    arguments = ["fidelity", *SMALL, "--tasks", "code", "--output", str(tmp_path / "a.png")]
    result = runner.invoke(app, ["analyze", *arguments])
    assert result.exit_code == 0, result.output
    assert "not routed sparse" in result.stdout
    assert str(tmp_path / "a.csv") in "".join(result.stdout.split())
    assert "comparing heads" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retrieval", "--tasks", "code"], "'code' has no evidence to look for"),
        (["retrieval", "--length", "64k"], "length 65536 exceeds the 4096 positions"),
        (["similarity", "--tasks", "loogle"], "tasks name the unknown 'loogle'"),
        (["similarity", "--router", "nowhere/x"], "nowhere/x"),
        (["sparsification", "--ratios", "0.5,much"], "ratios must be numbers from 0 to 1"),
        (["sparsification", "--method", "moba-per-query"], "has no lane of sparse heads"),
        (["fidelity", "--output", "a.gif"], "output must end in .png, .svg, .pdf, got a.gif"),
        (["fidelity", "--method", STREAMING, "--router", "x"], "method cannot be given beside"),
        (["frequency", "--from", "nowhere"], "nowhere holds no samples.jsonl"),
        (["runs", "nowhere"], "run nowhere is no folder of `elasticore eval`"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = [] if arguments[0] == "runs" else SMALL
    result = runner.invoke(app, ["analyze", arguments[0], *small, *arguments[1:]])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command", ["retrieval", "sparsification", "frequency", "similarity", "fidelity", "runs"]
)
def test_help_shows_an_example(command: str) -> None:
    result = runner.invoke(app, ["analyze", command, "--help"])
    assert f"elasticore analyze {command}" in " ".join(result.stdout.split())
