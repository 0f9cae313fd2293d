"""Attention calls over every registered backend: run with ``make bench``.

Each group is one piece of work; its lines are the backends that can do it, and dense causal SDPA as
the peer that reads everything. On a GPU the sizes are those of an 8B model's layer; on a CPU they
are small, and the times mean little.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn.functional import scaled_dot_product_attention

import elasticore as ec
from elasticore.backends.registry import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, DIM = (32, 8, 128) if DEVICE == "cuda" else (8, 2, 64)
LENGTHS = (4096, 16384, 65536) if DEVICE == "cuda" else (1024, 4096)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHARES = (0.0, 0.5, 0.75, 1.0)
NAMES = [backend.name for backend in backends() if backend.available]


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(1, length, heads, DIM, generator=generator, device=DEVICE, dtype=DTYPE)
        return x.transpose(1, 2)

    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def timed(benchmark: BenchmarkFixture, run: Callable[[], torch.Tensor]) -> None:
    """Time ``run`` with the device's work in it, after warm-ups that compile what is compiled."""

    def whole() -> torch.Tensor:
        out = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    out = benchmark.pedantic(whole, warmup_rounds=2, rounds=10 if DEVICE == "cuda" else 3)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("length", LENGTHS)
def test_full_and_streaming(
    benchmark: BenchmarkFixture, length: int, share: float, backend: str
) -> None:
    benchmark.group = f"{length} tokens, {share:.0%} streaming"
    q, k, v = inputs(length)
    modes = (torch.arange(KV_HEADS, device=DEVICE) < share * KV_HEADS).to(torch.int8)[None]
    plan = ec.HeadPlan(modes)
    timed(benchmark, lambda: ec.hybrid_head_attention(q, k, v, plan, backend=backend))


@pytest.mark.parametrize("length", LENGTHS)
def test_dense_sdpa(benchmark: BenchmarkFixture, length: int) -> None:
    benchmark.group = f"{length} tokens, 0% streaming"
    q, k, v = inputs(length)
    timed(benchmark, lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
