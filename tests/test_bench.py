"""The benchmarks: a wrong engine is noticed, peers do the same work, figures are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

import elasticore as ec
from elasticore import SequenceLayout
from elasticore.backends.flex.arrangement import arrange
from elasticore.backends.flex.blocks import blocks_read
from elasticore.backends.serial import SerialAttention
from elasticore.bench import peers
from elasticore.bench.attention import AttentionCase, Backend
from elasticore.bench.cases import SUITES, cases_of, tokens
from elasticore.bench.layer import AttentionWork
from elasticore.bench.report import read_json, write_json
from elasticore.bench.run import Record, Session, add_ratios
from elasticore.bench.timing import Clock
from elasticore.cli import app
from elasticore.patterns import BlockLists

CPU = torch.device("cpu")
SMALL = {
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 64,
    "sink": 128,
    "local": 256,
    "dtype": "float32",
}
runner = CliRunner()


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The command takes the CPU, whose quick cases, columns and warning these tests look for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def work(share: float | None = 0.75, **sizes: object) -> AttentionWork:
    return AttentionCase("case", 1024, share, **{**SMALL, **sizes}).build(CPU)


def blocks_of(work: AttentionWork) -> torch.Tensor:
    """The key blocks that FlexAttention reads, diagonal ones too: bool ``[B, Hq, n, n]``."""
    places = arrange(SequenceLayout.dense(), work.case.batch, 1024, 1024, 128, CPU)
    lists = work.lists if work.case.sparse == "SELECTED" else None
    read = blocks_read(work.plan, places, lists, work.case.heads)
    both = ((read.whole, read.wholes), (read.diagonal, read.diagonals))
    whole, diagonal = (BlockLists(*one).to_mask(8) for one in both)
    return whole | diagonal


def tokens_read(work: AttentionWork) -> torch.Tensor:
    """The same token by token: bool ``[B, Hq, T, T]``."""
    causal = torch.ones(1024, 1024, dtype=torch.bool).tril()
    return blocks_of(work).repeat_interleave(128, 2).repeat_interleave(128, 3) & causal


@pytest.mark.parametrize(
    "case",
    [
        {"share": 0.0},
        {"share": 0.75},
        {"share": 1.0},
        {"share": 0.5, "sink": 0, "local": 128},
        {"share": 0.75, "sparse": "SELECTED", "kv_heads": 2},
        {"share": None, "batch": 4},
    ],
    ids=str,
)
def test_a_peers_block_mask_is_the_work(case):
    one = work(**case)
    mask = tokens_read(one)
    out = scaled_dot_product_attention(one.q, one.k, one.v, attn_mask=mask, enable_gqa=True)
    assert one.difference(out) <= one.tolerance
    assert one.flops == pytest.approx(4 * 64 * int(mask.sum()))


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_both_peers_with_masks_read_the_same(share):
    one = work(share)
    (blocks,) = blocks_of(one)
    assert torch.equal(peers._blocks_read(one), blocks)


def test_reading_one_block_too_few_is_noticed():
    one = work(0.5)
    mask = tokens_read(one)
    mask[:, :, 896:, 768:896] = False
    out = scaled_dot_product_attention(one.q, one.k, one.v, attn_mask=mask)
    assert one.difference(out) > one.tolerance


def test_the_rows_of_a_batch_are_routed_differently():
    rows = {tuple(row) for row in work(None, batch=4).routing}
    assert len(rows) == 4


def test_a_clock_gives_median_and_minimum_of_what_fits():
    calls = []
    timing = Clock(CPU, budget_ms=1, least=3, most=5).measure(lambda: calls.append(1))
    assert 3 <= timing.runs <= 5 < len(calls)
    assert 0 <= timing.min_ms <= timing.ms == timing.host_ms


def test_ratios_are_peers_times_over_ones_own():
    ours = Record("ours", False, ms=2.0)
    other, refused = Record("other", True, ms=3.0), Record("refused", True, skipped="no.")
    dense = [Record(name, name != "ours", ms=8.0) for name in ("dense", "ours", "other", "refused")]
    add_ratios([ours, other, refused], dense)
    assert ours.ratios == {"dense": 4.0, "other": 1.5}


@pytest.mark.parametrize(
    ("length", "text"), [(512, "512"), (16384, "16K"), (2**20, "1M"), (1000, "1000")]
)
def test_lengths_are_written_short(length, text):
    assert tokens(length) == text


class Careless(SerialAttention):
    """Reads everything, whatever the plan says."""

    def attend(self, q, k, v, plan, *, layout, scale):
        full = plan.with_decisions(torch.zeros_like(plan.decisions))
        return super().attend(q, k, v, full, layout=layout, scale=scale)


class Choosy(SerialAttention):
    """Refuses everything."""

    def supports(self, request):
        return ec.Verdict(False, "not today.")


@pytest.mark.usefixtures("clean_registry")
def test_wrong_and_refusing_engines_get_no_time_but_a_reason():
    ec.register_backend("careless", Careless)
    ec.register_backend("choosy", Choosy)
    cases = [case for case in cases_of("attention", CPU, quick=True) if case.share == 0.75]
    session = Session(cases[:1], Clock(CPU, budget_ms=1), ["careless", "choosy"])
    ((_, (careless, choosy)),) = session.run()
    assert "differs from the reference" in careless.failed
    assert "not today" in choosy.skipped
    assert careless.ms is choosy.ms is None


def test_an_interpreted_backend_runs_only_if_it_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (case, *_) = cases_of("attention", CPU, quick=True)
    assert "means nothing" in Backend("triton").left_out(case, CPU)
    assert not Backend("serial").left_out(case, CPU)


@pytest.mark.usefixtures("clean_registry", "on_the_cpu")
def test_the_command_fails_if_a_backend_is_wrong():
    ec.register_backend("careless", Careless)
    arguments = ["bench", "--suite", "decode", "--quick", "--engine"]
    assert runner.invoke(app, [*arguments, "serial"]).exit_code == 0
    result = runner.invoke(app, [*arguments, "careless"])
    assert result.exit_code == 1
    assert "differs from the reference" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("on_the_cpu")
def test_the_command_writes_a_table_json_and_pictures(tmp_path: Path):
    file, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    suites = ("attention", "decode", "router", "selector")
    arguments = [f"--suite={suite}" for suite in suites]
    result = runner.invoke(
        app, ["bench", *arguments, "--quick", "--json", str(file), "--plot", str(plot)]
    )
    assert result.exit_code == 0, result.output
    assert "times mean little" in " ".join(result.stdout.split())
    report = json.loads(file.read_text("utf-8"))
    assert {"gpu", "driver", "versions", "date", "command", "commit"} <= set(report)
    assert {case["suite"] for case in report["cases"].values()} == set(suites)
    for name, case in report["cases"].items():
        assert name in result.stdout
        for engine in case["engines"].values():
            assert not engine["failed"]
            assert (engine["ms"] is None) == bool(engine["skipped"])
    serial = report["cases"]["attention-512-0.75"]["engines"]["serial"]
    assert serial["min_ms"] <= serial["ms"]
    assert serial["runs"] >= 3
    assert "sdpa-flash" in serial["ratios"]
    for suite in suites:
        picture = tmp_path / f"bench-{suite}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_file_is_shown_and_drawn_again_without_a_run(tmp_path: Path, monkeypatch):
    file, plot = tmp_path / "bench.json", tmp_path / "again.png"
    arguments = [f"--suite={suite}" for suite in SUITES]
    first = runner.invoke(app, ["bench", *arguments, "--quick", "--layers=1", "--json", str(file)])
    assert first.exit_code == 0, first.output
    monkeypatch.setattr(Session, "run", None)
    again = runner.invoke(app, ["bench", "--from", str(file), "--plot", str(plot)])
    assert again.exit_code == 0, again.output
    assert "times mean little" not in again.stdout
    for name in json.loads(file.read_text("utf-8"))["cases"]:
        assert name in again.stdout
    for suite in SUITES:
        assert (tmp_path / f"again-{suite}.png").read_bytes().startswith(b"\x89PNG")
    write_json(read_json(file), json.loads(file.read_text("utf-8")), tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text("utf-8") == file.read_text("utf-8")


def test_a_wrong_engine_in_a_file_is_still_an_error(tmp_path: Path):
    file = tmp_path / "bench.json"
    case = AttentionCase("attention", 512, 0.0)
    write_json([(case, [Record("ours", False, failed="it is wrong.")])], {}, file)
    result = runner.invoke(app, ["bench", "--from", str(file)])
    assert result.exit_code == 1
    assert "it is wrong." in result.stdout


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"cases": {"a": {"suite": "poetry"}}}'])
def test_a_file_that_is_no_benchmarks_is_refused(text: str, tmp_path: Path):
    file = tmp_path / "other.json"
    file.write_text(text)
    result = runner.invoke(app, ["bench", "--from", str(file)])
    assert result.exit_code == 2
    assert "is no file of this version's" in " ".join(result.stderr.split())


@pytest.mark.usefixtures("on_the_cpu")
def test_a_model_is_timed_elastic_and_unchanged():
    arguments = ["bench", "--suite", "e2e", "--quick", "--layers", "1"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = result.stdout.split()
    assert {"e2e-512", "sdpa", "fa-ssa-0", "fa-ssa-0.7", "xa-ssa-0.7"} <= set(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "poetry"], "suite 'poetry' is unknown; there are: attention, decode"),
        (["--quick", "--engine", "magic"], "engine 'magic' is unknown here; there are: "),
        (["--quick", "--length", "7"], "length leaves no case"),
        (["--from", "nowhere.json"], "nowhere.json"),
        (["--from", "nowhere.json", "--quick"], "beside it only plot can be given"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments: list[str], message: str):
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = runner.invoke(app, ["bench", "--quick", "--plot", "bench.png"])
    assert result.exit_code == 2
    assert "pip install 'elasticore[plot]'" in " ".join(result.stderr.split())
