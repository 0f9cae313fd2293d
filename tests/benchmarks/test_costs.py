"""The script ``benchmarks/costs.py``: from benchmark results to the table that auto reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "costs.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the script is not here")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("costs_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TABLE", tmp_path / "costs.json")
    return module


def case(share: float | None, engines: dict[str, Any], **changes: Any) -> dict[str, Any]:
    parameters = {
        "length": 4096,
        "share": share,
        "sparse": "STREAMING",
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "batch": 1,
        "block_size": 128,
    }
    suite = changes.pop("suite", "attention")
    return {
        "suite": suite,
        "parameters": {**parameters, **changes},
        "engines": {
            name: {"ms": ms, "plan_ms": 2.0 if name == "flex" else None}
            for name, ms in engines.items()
        },
    }


CASES = {
    "attention-4K-0": case(
        0.0, {"triton": 3.0, "serial": 4.0, "sdpa-cudnn": 3.1, "flex": 1.0, "flashinfer": 0.5}
    ),
    "attention-4K-1": case(
        1.0, {"triton": 1.0, "serial": None, "sdpa-cudnn": None, "flex": 1.0, "flashinfer": 0.5}
    ),
    "attention-xa-4K-1": case(1.0, {"triton": 2.0, "flashinfer": 1.0}, sparse="SELECTED"),
    "attention-batch4-4K": case(None, {"triton": 9.0}, batch=4),
    "decode-batch8-4K-0": case(0.0, {"triton": 0.5}, suite="decode", batch=8),
}


def results(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "results.json"
    about = {"gpu": "NVIDIA H200", "date": "today", "commit": "abc", "cases": CASES, **changes}
    path.write_text(json.dumps(about), encoding="utf-8")
    return str(path)


def run(script: ModuleType, *arguments: str) -> Any:
    app = script.typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, arguments)


def test_a_time_is_the_mean_over_the_shares_with_what_a_routing_costs(
    script: ModuleType, tmp_path: Path
) -> None:
    assert run(script, results(tmp_path)).exit_code == 0
    table = json.loads(script.TABLE.read_text("utf-8"))["milliseconds"]
    assert table == {
        "9.0": {
            # Not serial, which lacks a share; flex with its plan; no flashinfer without one.
            "prefill-d128": {"triton": {"4096": 2.0}, "flex": {"4096": 3.0}},
            # With selected blocks everything is made in every call.
            "selected-d128": {"triton": {"4096": 2.0}, "flashinfer": {"4096": 1.0}},
            "decode-d128": {"triton": {"32768": 0.5}},
        }
    }


def test_other_gpus_keep_their_figures(script: ModuleType, tmp_path: Path) -> None:
    run(script, results(tmp_path, gpu="NVIDIA A100", capability="8.0"))
    run(script, results(tmp_path))
    assert set(json.loads(script.TABLE.read_text("utf-8"))["milliseconds"]) == {"8.0", "9.0"}
    failed = run(script, results(tmp_path, gpu="Unheard Of"))
    assert failed.exit_code == 2
    assert "Unheard Of" in failed.output


def test_the_check_compares_auto_with_dense_attention(script: ModuleType, tmp_path: Path) -> None:
    result = run(script, results(tmp_path), "--check")
    assert result.exit_code == 0, "triton, whose mean is the lowest, takes 3.0 ms; dense 3.1"
    assert "0.968" in result.output
    slower = {**CASES, "attention-4K-0": case(0.0, {"triton": 3.0, "sdpa-cudnn": 2.9})}
    result = run(script, results(tmp_path, cases=slower), "--check")
    assert result.exit_code == 1
    assert "1.034" in result.output
    assert not script.TABLE.exists(), "a check writes nothing"
