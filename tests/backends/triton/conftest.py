"""Where the kernels of these tests run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from elasticore.testing import Case

pytest.importorskip("triton", reason="needs triton: pip install 'elasticore[triton]'")


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["hopper", "portable"])
def fit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], Case]:
    """Makes a small case one for the training kernels that are tried.

    Those for Hopper on such a GPU, with its heads and blocks; the portable ones everywhere.
    """
    from elasticore.backends.triton import kernels

    if request.param == "portable":
        portable = kernels.TRAINING["portable"]
        monkeypatch.setattr(kernels, "choose_training", lambda *_, **__: portable)
        return lambda case: case
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")

    def larger(case: Case) -> Case:
        wide = 64 if case.head_dim <= 64 else 128
        return dataclasses.replace(case, head_dim=wide, length=2 * case.length, preset="128")

    return larger
