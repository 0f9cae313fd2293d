"""Where the kernels of these tests run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'elasticore[triton]'")


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
