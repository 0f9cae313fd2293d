"""An engine that is missing, half installed or without a GPU is reported and breaks nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys
for name in {hidden}:
    sys.modules[name] = None  # as if it were not installed
import torch
import elasticore
from elasticore.cli.machine import doctor
q = torch.randn(1, 2, 8, 16)
plan = elasticore.HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8))
assert elasticore.hybrid_head_attention(q, q, q, plan).shape == q.shape
for name in ("triton", "flashinfer"):
    try:
        elasticore.use_backend(name)
    except elasticore.UnsupportedRequest as error:
        assert "is not available here" in str(error), error
    else:
        raise AssertionError(name)
doctor(as_json=True)
"""


def doctor(folder: Path, hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """What ``elasticore doctor`` reports where ``folder`` holds packages, and there is no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hidden=hidden)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {pick["backend"] for pick in report["auto"].values()} == {"serial"}
    return {backend["name"]: backend for backend in report["backends"]}


def package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")


def test_missing(tmp_path: Path) -> None:
    backends = doctor(tmp_path, hidden=("triton", "flashinfer"))
    for name in ("triton", "flashinfer"):
        assert not backends[name]["available"]
        assert f"{name} is not installed; pip install" in backends[name]["reason"]
        # Its class is there all the same, so it can be asked what it would support.
        assert backends[name]["devices"] == ["cuda"]
    assert not backends["flex"]["available"], "its kernels are compiled by Triton"
    assert backends["flex"]["reason"]
    assert backends["serial"]["available"]


def test_half_installed(tmp_path: Path) -> None:
    """The package is found, and its import fails: a library is missing, or a file was lost."""
    package(tmp_path, "triton", "raise ImportError('libtriton.so: cannot open shared object file')")
    package(tmp_path, "flashinfer", "from flashinfer import nothing_of_the_kind")
    backends = doctor(tmp_path)
    assert not backends["triton"]["available"]
    reason = backends["triton"]["reason"]
    assert "its package failed to load (ImportError: libtriton.so" in reason
    assert "reinstall it, or uninstall it" in reason
    assert not backends["flashinfer"]["available"]
    assert backends["flashinfer"]["reason"].endswith(".")


def test_an_emptied_package(tmp_path: Path) -> None:
    for name in ("triton", "flashinfer"):
        package(tmp_path, name, "")
    backends = doctor(tmp_path)
    for name in ("triton", "flashinfer"):
        assert not backends[name]["available"]
        assert backends[name]["reason"]


def test_without_a_gpu(tmp_path: Path) -> None:
    package(tmp_path, "triton", "__version__ = '3.6.0'")
    for name in ("flashinfer", "tvm_ffi", "pynvml"):
        package(tmp_path, name, "__version__ = '0.6.8'")
    backends = doctor(tmp_path)
    for name in ("triton", "flashinfer"):
        assert not backends[name]["available"]
        assert "PyTorch sees no NVIDIA GPU; " in backends[name]["reason"]
    assert "TRITON_INTERPRET=1" in backends["triton"]["reason"]
    assert backends["serial"]["available"]
