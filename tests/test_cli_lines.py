"""What commands print can be copied and read by programs; no mistake ends in a traceback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from elasticore.cli import app, console
from elasticore.cli.console import place, plain_errors, steps
from elasticore.demo import Answer
from elasticore.processes import Launched, launched

runner = CliRunner()

CODE = (
    "def a_rather_long_function_name(first_argument, second_argument, third_argument, fourth):\n"
    "\treturn d[1:key:2], 'status :bug: and :smile:'   \n"
    "x = [1, 2][/bold]\n" + "y" * 100 + "\n"
)


def test_an_answer_is_printed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda *_, **__: CODE)
    (tmp_path / "prompt.txt").write_text("def")
    command = ["run", "--model", "tiny", "--prompt-file", str(tmp_path / "prompt.txt")]
    result = runner.invoke(app, [*command, "--max-new-tokens", "1"])
    assert result.exit_code == 0, result.output
    assert result.stdout == CODE + "\n"
    assert "\r" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_error_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a-rather-long-name-of-a-folder" / ("another" * 12) / "run [v2] :bug: #3"
    result = runner.invoke(app, ["eval", "report", str(folder)])
    assert result.exit_code == 2
    assert result.stderr == f"error: run {folder} is no folder of `elasticore eval`.\n"


def test_a_path_is_shown_with_every_character(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    shown = Console(file=file, soft_wrap=console.out.soft_wrap, emoji=console.out._emoji, width=20)
    name = "runs/[v2]/a:bug:b/[/bold]/" + "x" * 40
    shown.print(f"Routers: {place(name)}")
    assert file.getvalue() == f"Routers: {name}\n"


@pytest.mark.parametrize("option", [["--json"], ["--model", "tiny"], ["--samples", "3"]])
def test_options_in_front_of_report_are_not_ignored(option: list[str], tmp_path: Path) -> None:
    result = runner.invoke(app, ["eval", *option, "report", str(tmp_path)])
    assert result.exit_code == 2
    assert f"{option[0]} before report belongs to eval itself" in result.stderr


@pytest.mark.parametrize("command", [[], ["train"], ["eval", "report"]])
def test_the_short_form_of_help_is_known(command: list[str]) -> None:
    assert runner.invoke(app, [*command, "-h"]).exit_code == 0


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "1"}, "RANK in the environment is 1, but WORLD_SIZE says that there are 1"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE in the environment is 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK in the environment is '-1'"),
    ],
)
def test_what_a_launcher_has_left_behind_is_named(
    variables: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "r.yaml").write_text("backbone: tiny\ntargets: {code: 1}\ndata: {kind: offline}\n")
    for dry in ([], ["--dry-run"]):
        options = ["--config", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run"), *dry]
        result = runner.invoke(app, ["train", *options])
        assert result.exit_code == 2
        assert says in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_launchers_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == Launched(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert launched() == Launched(3, 4)


def test_an_interrupted_evaluation_says_what_it_leaves_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")
    from elasticore.eval.language_model import ElasticLM

    out = tmp_path / "run"
    command = ["eval", "--model", "tiny", "--tasks", "basic:needle", "--lengths", "512"]
    command += ["--samples", "2", "--dtype", "float32", "--output", str(out)]
    generate, asked = ElasticLM._model_generate, []

    def interrupted(self: Any, *arguments: Any, **settings: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(ElasticLM, "_model_generate", interrupted)
    result = runner.invoke(app, command)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [  # no bar: it is no terminal
        "answering, full: 0 of 2",
        "answering, full: 1 of 2",
        f"interrupted: the answers so far are in {out}; the same command goes on.",
    ]
    assert len((out / "full" / "answers.jsonl").read_text("utf-8").splitlines()) == 1
    result = runner.invoke(app, command)
    assert result.exit_code == 0
    assert len(asked) == 3
    assert result.stderr.splitlines()[0] == "answering, full: 0 of 1"


def test_progress_in_a_log_file_is_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(steps(range(25), "reading [a]")) == list(range(25))
    lines = [f"reading [a]: {done} of 25" for done in (0, 3, 6, 9, 12, 15, 18, 21, 24, 25)]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("as_json", [True, False])
def test_without_matplotlib_the_demo_still_answers(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.zeros(8, 4, dtype=torch.int8)
    answer = Answer(
        *("needle", 512, "Where?", "here"),
        *(("here", "here"), True, (True, True), None),
        *(0.5, 0.4, 0.3, (0.1, 0.2), (1, 2), "serial", table),
    )
    monkeypatch.setattr("elasticore.demo.run_demo", lambda *_, **__: [answer])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "routing.png"
    command = ["demo", "--model", "tiny", "--picture", str(picture)]
    result = runner.invoke(app, [*command, *["--json"] * as_json])
    assert result.exit_code == 0, result.output
    assert "no picture: plot needs matplotlib" in result.stderr
    if as_json:
        report = json.loads(result.stdout)
        assert (report["picture"], report["answers"][0]["expected"]) == (None, "here")
    else:
        assert "right" in result.stdout
        assert str(picture) not in result.stdout
    assert not picture.exists()


@pytest.mark.parametrize(
    ("command", "missing"),
    [("train --config recipe.yaml", "yaml"), ("eval --model tiny --output run", "lm_eval")],
)
def test_what_is_not_installed_is_named_with_its_extra(
    command: str, missing: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from elasticore.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    extra = command.split()[0]
    line = f"error: {missing} is not installed; pip install 'elasticore[{extra}]'."
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, line)


@pytest.mark.parametrize(
    "command",
    [
        "analyze frequency --output {}/x.png",
        "demo --model tiny --picture {}/x.png",
        "bench --suite router --quick --json {}/x.json",
        "plot training runs --csv {}/x.csv --output x.png",
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    for name in (
        "cli.analyzing.load",
        "demo.run_demo",
        "bench.run.Session",
        "train.curves.read_curves",
    ):
        monkeypatch.setattr(f"elasticore.{name}", work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = runner.invoke(app, command.format(tmp_path / "file").split())
    assert result.exit_code == 2
    assert f"{tmp_path / 'file'}/x." in result.stderr
    assert "cannot be written: File exists; choose another place." in result.stderr


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (KeyError("outputs"), ["error: KeyError: 'outputs'", "elasticore --traceback COMMAND"]),
        (MemoryError(), ["error: MemoryError: ", "elasticore --traceback COMMAND"]),
        (OSError(), ["error: OSError: "]),
        (ValueError("a [b] c"), ["error: a [b] c"]),
    ],
)
def test_any_error_ends_in_one_line(
    error: Exception, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, plain_errors():
        raise error
    assert ended.value.exit_code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines)
    assert all(one.startswith(begin) for one, begin in zip(said, lines, strict=True))
