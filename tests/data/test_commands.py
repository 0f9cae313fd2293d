"""`elasticore data`, as a user and as a script would call it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from elasticore.cli import app

runner = CliRunner()
SETTINGS = ["--tokenizer", "tiny", "--template", "plain", "--min-length", "128"]
SETTINGS += ["--max-length", "1k", "--pack", "2k"]


def call(*arguments: str) -> tuple[int, str, str]:
    result = runner.invoke(app, ["data", *arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_data_are_built_and_shown(files: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "mix"
    sources = [f"--source={name}={files[name]}" for name in ("govreport", "musique")]
    code, out, _ = call("build", *sources, *SETTINGS, "--output", str(output))
    assert code == 0
    assert "multihop_qa" in out
    code, out, _ = call("show", str(output), "--json")
    assert code == 0
    card = json.loads(out)
    assert card["settings"]["max_length"] == 1024
    assert call("show", str(output))[1].count("summarization") == 1
    mixed = ["--mixture", "govreport=1,musique=2", "--tokens", "4k", "--overwrite", "--json"]
    code, out, _ = call("build", *sources, *SETTINGS, "--output", str(output), *mixed)
    assert code == 0
    assert json.loads(out)["settings"]["mixture"] == {"govreport": 1.0, "musique": 2.0}
    assert json.loads(out)["tokens"] <= 4096


def test_files_of_the_official_code_are_shown(tmp_path: Path) -> None:
    row = {
        "input_ids": [1, 2, 3],
        "labels": [-100, 2, 3],
        "seq_lengths": [0, 3],
        "task_ids": [2],
        "task_type": ["Summarization"],
        "range_ids": [[0, 0, 0, 1, 0, 1, 2, 2]],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    code, out, _ = call("show", str(tmp_path / "a.parquet"), "--json")
    assert code == 0
    assert json.loads(out)["format"] == "official"
    assert json.loads(out)["tasks"]["summarization"]["tokens"] == 3
    assert "1 rows, 3 tokens." in call("show", str(tmp_path / "a.parquet"))[1]


@pytest.mark.parametrize("command", ["build", "show"])
def test_help_shows_an_example(command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"elasticore data {command}" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "xsum", "--source", "xsum=a"], "names a source twice"),
        (["--source", "xsum="], "source takes NAME or NAME=PLACE, got 'xsum='"),
        (["--source", "wiki"], "sources must name some of"),
        (["--source", "colt"], "zenodo"),
        (["--source", "xsum=nowhere.jsonl"], "nowhere.jsonl is no file"),
        (["--source", "colt", "--mixture", "colt"], "mixture takes NAME=WEIGHT, got 'colt'"),
        (["--source", "colt", "--mixture", "colt=x"], "mixture takes NAME=WEIGHT, got 'colt=x'"),
        (["--source", "colt", "--tokens", "1g"], "tokens must be a count such as 8192, 8k or"),
        (["--source", "colt", "--pack", "k"], "pack must be a count"),
        (["--source", "colt", "--template", "chat"], "has no chat template"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = call("build", *SETTINGS, "--output", str(tmp_path / "data"), *arguments)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_showing_what_is_not_there(tmp_path: Path) -> None:
    code, _, err = call("show", str(tmp_path))
    assert code == 2
    assert "elasticore data build" in err
