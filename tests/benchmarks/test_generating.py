"""The scripts that say what a token and a cache cost, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("benchmarks.generating", reason="the benchmarks are not here")

import typer

from benchmarks import cache_bytes, generating


def app(function):
    made = typer.Typer()
    made.command()(function)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="it compiles there, for minutes")
def test_every_way_generates_and_says_how_far_it_is_from_what_runs_uncompiled(tmp_path: Path):
    output = tmp_path / "generating.json"
    words = ["--small", "--layers", "2", "--length", "300", "--batch", "2", "--tokens", "20"]
    result = CliRunner().invoke(app(generating.main), [*words, "--output", str(output)])
    assert result.exit_code == 0, result.output
    (case,) = json.loads(output.read_text())["cases"].values()
    assert list(case) == [
        "sdpa dynamic",
        *(
            f"elastic {s} static{ahead}"
            for ahead in (" ahead", "")
            for s in ("0.75", "0", "0.5", "0.9")
        ),
        "sdpa static",
        "sdpa static ahead",
    ]
    for name, way in case.items():
        assert way["tokens"] == 3 and way["ms"] > 0
        # float32 in another order; the first way is what its like are compared with.
        assert way["apart"] is None if name == "sdpa dynamic" else way["apart"] < 1e-4
    assert case["elastic 0.75 static"]["cache_gib"] <= case["elastic 0 static"]["cache_gib"]


def test_bytes_fall_with_the_share_of_streaming_heads(tmp_path: Path):
    output, picture = tmp_path / "bytes.json", tmp_path / "bytes.png"
    words = ["--length", "4096", "--length", "8192", "--output", str(output)]
    result = CliRunner().invoke(app(cache_bytes.main), [*words, "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    long = json.loads(output.read_text())["lengths"]["8192"]
    # A sink, a window, a spare block and what a block may stick out, of 8,193 tokens; a table.
    assert long["static_0.875_of_dense"] <= 1 / 8 + (1 + 16 + 2) * 128 / 8193 * 7 / 8 + 0.02
    assert long["static_0.5_of_dense"] > long["static_0.75_of_dense"]
    assert picture.stat().st_size > 1000
