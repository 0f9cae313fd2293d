"""The tutorial of docs/evaluation.md, as a newcomer would paste it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

from typer.testing import CliRunner

from elasticore.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")


def commands() -> list[list[str]]:
    """The commands of the page's bash blocks, without ``elasticore``."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("elasticore eval")]


def test_the_first_commands_make_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluation, report, *_ = commands()
    assert evaluation[:3] == ["eval", "--model", "tiny"] and report[:2] == ["eval", "report"]
    samples = evaluation.index("--samples") + 1
    evaluation[samples] = "1"  # of the five
    shown = CliRunner().invoke(app, evaluation)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("basic-1024-needle", "streaming", "Ω_MSR"))
    table = CliRunner().invoke(app, report)
    assert table.exit_code == 0, table.output
    head, _, *rows = table.stdout.splitlines()
    assert head.startswith("| method | basic-1024-retrieval | basic-1024-retrieval Ω_MSR |")
    scores = {row.split(" | ")[0].strip("| "): float(row.split(" | ")[1]) for row in rows}
    assert scores["full"] == scores["elastic"] == 100 > scores["streaming"]


def test_every_other_command_is_understood() -> None:
    group = typer.main.get_command(app).commands["eval"]
    for _, *arguments in commands()[2:]:
        if arguments[0] == "report":
            group.commands["report"].make_context("report", arguments[1:])
        else:
            group.make_context("eval", arguments)


def test_help_has_an_example_per_need() -> None:
    shown = " ".join(CliRunner().invoke(app, ["eval", "--help"]).output.replace("│", "").split())
    needs = ["Without a download", "A model of the hub", "Benchmarks, from a folder", "Baselines"]
    assert all(need in shown for need in needs)
    for part in ("--router tiny --method full", "--data data", "pattern:path=masks.tsv"):
        assert part in shown
