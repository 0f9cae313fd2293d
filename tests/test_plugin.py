"""A backend and a pattern from another package take part in everything, with no change in ours."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import elasticore
from elasticore import Elastic, HeadPlan, SequenceLayout, UnsupportedRequest, testing
from elasticore.bench.attention import AttentionCase, DecodeCase
from elasticore.cli import app

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "plugins" / "elasticore_example"

pytestmark = pytest.mark.usefixtures("example")


def strided(**settings: Any) -> Any:
    return importlib.import_module("elasticore_example.pattern").Strided(**settings)


# --- The backend ---------------------------------------------------------------------------------


def test_it_is_listed_after_our_own_and_nothing_was_registered() -> None:
    infos = {info.name: info for info in elasticore.list_backends()}
    assert list(infos)[-1] == "example"
    assert infos["example"].available
    assert "example" in CliRunner().invoke(app, ["doctor"]).stdout


def test_it_runs_when_it_is_named_and_auto_keeps_to_its_own() -> None:
    q = torch.randn(1, 4, 100, 32)
    plan = HeadPlan(torch.tensor([[0, 1, 1, 0]], dtype=torch.int8))
    with elasticore.use_backend("example"):
        out = elasticore.hybrid_head_attention(q, q, q, plan)
    serial = elasticore.hybrid_head_attention(q, q, q, plan, backend="serial")
    assert torch.allclose(out, serial, atol=1e-5)
    long = torch.zeros(1, 4, 4097, 16)
    with pytest.raises(UnsupportedRequest, match="up to 4096 keys; there are 4097"):
        elasticore.hybrid_head_attention(long, long, long, plan, backend="example")


CASES = [case for case in testing.matrix() if case.length <= 129][::3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_conforms(case: testing.Case) -> None:
    for check in (testing.check_output, testing.check_same_alone, testing.check_repeatable):
        check("example", case, dtype=torch.float32)
    testing.check_gradients("example", case, dtype=torch.float64)
    testing.check_checkpointing("example", case)


def test_the_conformance_command_finds_it_in_its_processes(example: Path, tmp_path: Path) -> None:
    report = tmp_path / "conformance.json"
    command = f"-m elasticore.testing example --cases packed-g1-d32-t12.-(all|some) --json {report}"
    done = subprocess.run(
        [sys.executable, *command.split(), "--dtype", "float32", "--processes", "2", "--gradients"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(example), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(report.read_text("utf-8"))
    assert counts["failed"] == counts["left"] == 0
    # 3 lengths, queries all and some, 3 presets, 10 checks each; and it reads no pages.
    assert counts["checks"] == sum(counts["by_check"].values()) == 3 * 2 * 3 * 10
    assert counts["unsupported"] == 3 * 2 * 3


def test_it_is_benchmarked_by_its_name(tmp_path: Path) -> None:
    for case in (AttentionCase("attention", 512, 0.75), DecodeCase("decode-batch1", 512, 0.75)):
        assert "example" in [engine.name for engine in case.engines()]
    report, length = tmp_path / "bench.json", "1024" if torch.cuda.is_available() else "512"
    arguments = ["bench", "--suite", "attention", "--engine", "example", "--quick", "--length"]
    result = CliRunner().invoke(app, [*arguments, length, "--json", str(report)])
    assert result.exit_code == 0, result.output
    cases = json.loads(report.read_text("utf-8"))["cases"]
    assert cases
    for case in cases.values():
        assert set(case["engines"]) == {"example"}
        assert case["engines"]["example"]["ms"] > 0


def test_it_has_a_row_in_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    support = importlib.import_module("support").support()
    rows = [line.split(" | ")[:2] for line in support.splitlines()]
    assert ["| `example`", "cpu"] in rows
    assert ["| `example`", "cuda"] in rows


def test_a_broken_version_of_it_is_reported_and_breaks_nothing(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "elasticore_example.attention", None)
    (info,) = (info for info in elasticore.list_backends() if info.name == "example")
    assert not info.available
    assert "its package failed to load (ModuleNotFoundError" in info.reason
    assert "reinstall it, or uninstall it" in info.reason
    with pytest.raises(UnsupportedRequest, match="not available here: its package failed"):
        elasticore.use_backend("example")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    # Nor does a broken selector stand in the way of another one.
    monkeypatch.setitem(sys.modules, "elasticore_example.pattern", None)
    ours = Elastic.load("fa-xa").to_dict()
    assert Elastic.from_dict(ours).sparse == elasticore.XAttention()
    with pytest.raises(ValueError, match="'strided': its package failed to load"):
        Elastic.from_dict({**ours, "sparse": {"name": "strided"}})
    with pytest.raises(ValueError, match="has no name"):
        Elastic(sparse=testing.ScatteredBlocks()).to_dict()


# --- The pattern ---------------------------------------------------------------------------------


def test_it_reads_what_it_says() -> None:
    """Block by block from the definition, for a padded batch with an empty row."""
    layout = SequenceLayout.padded(torch.tensor([0, 50, 9]), torch.tensor([99, 99, 8]))
    q, k = torch.randn(3, 4, 70, 16), torch.randn(3, 2, 100, 16)
    segments = layout.segments(3, 70, 100, q.device)
    lists = strided(every=3, recent=2).select(q, k, segments, block_size=16, scale=1.0)
    for s, (_, _, queries, _, keys) in enumerate(torch.stack(segments, 1).tolist()):
        first = (keys - queries) // 16
        for r in range(lists.counts.shape[2]):
            row = first + r
            exists = queries and row * 16 < keys
            wanted = [b for b in range(row + 1) if b % 3 == 0 or b > row - 2] if exists else []
            for head in range(4):
                count = int(lists.counts[s, head, r])
                assert lists.indices[s, head, r, :count].tolist() == wanted


@pytest.mark.parametrize("backend", ["serial", "example"])
def test_every_backend_runs_it(backend: str) -> None:
    problem = testing.make_problem(testing.Case("left", 4, 32, 129, "some", "32"))
    plan = HeadPlan(problem.plan.decisions, sparse=strided(every=2, recent=1), block_size=32)
    problem = problem._replace(plan=plan)
    reference = testing.dense_attention(problem)
    assert torch.allclose(problem.run(backend).double(), reference, atol=1e-5)


def test_a_file_holds_it_by_its_name(tmp_path: Path) -> None:
    way = Elastic(elasticore.AllRetrieval(), retrieval=strided(every=5))
    folder = way.save(tmp_path / "way")
    saved = json.loads((folder / "router.json").read_text())["way"]
    assert saved["retrieval"] == {"name": "strided", "every": 5, "recent": 2}
    assert Elastic.load(folder) == way
    with pytest.raises(ValueError, match=r"unknown; there are: .*xattention.*strided"):
        Elastic.from_dict({**way.to_dict(), "retrieval": {"name": "dilated"}})
    with pytest.raises(ValueError, match="every must be an int of at least 1 block, got 0"):
        strided(every=0)


# --- Both ----------------------------------------------------------------------------------------


def step(backend: str) -> tuple[float, Tensor]:
    """The loss of a two-layer model with strided sparse heads, and the routers' gradients."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
    )
    model = transformers.LlamaForCausalLM(config)
    way = Elastic(sparse=strided(every=4, recent=1), block_size=16)
    model = elasticore.elasticize(model, way).train()
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    with elasticore.use_backend(backend), elasticore.record() as trace:
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert trace.prefill.backend == backend
    gradients = [p.grad for r in elasticore.routers(model) for p in r.parameters()]
    return float(loss.detach()), torch.cat([g.flatten() for g in gradients if g is not None])


def test_routers_train_over_the_backend_with_the_pattern() -> None:
    (loss, gradient), (expected, reference) = step("example"), step("serial")
    assert loss == pytest.approx(expected, rel=1e-5)
    assert float(reference.norm()) > 0
    assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


# --- The package ---------------------------------------------------------------------------------


def test_pip_builds_what_the_other_tests_install_by_hand(example: Path, tmp_path: Path) -> None:
    for module in ("pip", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    pip = "-m pip install --quiet --no-deps --no-build-isolation --no-index --target"
    done = subprocess.run(
        [sys.executable, *pip.split(), str(tmp_path), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    def entry_points(folder: Path) -> set[str]:
        (file,) = folder.glob("elasticore_example-*.dist-info/entry_points.txt")
        return set(file.read_text("utf-8").split("\n")) - {""}

    assert entry_points(tmp_path) == entry_points(example)
