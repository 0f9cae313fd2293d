"""Forward and backward of one attention layer, in turns with the blended ways."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import elasticore as ec
from benchmarks.training.blended import PEERS
from benchmarks.training.measuring import (
    NO_MEMORY,
    clear,
    console,
    in_turns,
    peak_memory,
    ratios,
    reason,
    rounded,
)
from benchmarks.training.sizes import BETWEEN, OURS, SHARES, Sizes
from elasticore.bench.cases import tokens as written
from elasticore.bench.timing import Call

__all__ = ["Layer", "between", "layer", "layers"]

CLOSE = 2**-5
"""Relative L2 difference up to which bfloat16 results count as the same.

Outputs and probabilities are rounded by 2⁻⁹, and FlashAttention's backward rounds twice more; what
is computed from another mask differs by about 1.
"""


def layers(sizes: Sizes, ours: str, device: torch.device) -> dict[str, Any]:
    """Every length and share, and the share between them."""
    found: dict[str, Any] = {}
    cases = [(length, share) for length in sizes.lengths for share in SHARES]
    for length, share in track(cases, "layer", console=console):
        found[f"{written(length)}-{share:g}"] = layer(sizes, length, share, ours, device)
        clear(device)
    for length in map(written, sizes.lengths):
        low, high = (found[f"{length}-{share:g}"] for share in SHARES)
        found[f"{length}-{BETWEEN:g}"] = between(low, high)
    return found


class Layer:
    """The tensors of one attention layer and one gradient of its output."""

    def __init__(self, sizes: Sizes, length: int, share: float, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, sizes.dtype)

        def random(heads: int) -> Tensor:
            shape = 1, length, heads, sizes.head_dim  # as projections lie in memory
            made = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            return made.transpose(1, 2)

        self.q, self.k, self.v = (
            random(heads).requires_grad_()
            for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        )
        self.gradient = random(sizes.heads)
        streams = torch.arange(sizes.kv_heads, device=device) < round(share * sizes.kv_heads)
        self.gate = streams[None].float().requires_grad_()
        self.plan = ec.HeadPlan.from_gate(
            self.gate,
            sparse=ec.Streaming(sizes.sink, sizes.local),
            block_size=sizes.block_size,
        )

    def forward(self, backend: str) -> Tensor:
        """The output, with what its backward needs."""
        return ec.hybrid_head_attention(self.q, self.k, self.v, self.plan, backend=backend)

    def both(self, backend: str) -> tuple[Tensor, ...]:
        """The output and all gradients."""
        out = self.forward(backend)
        inputs = self.q, self.k, self.v, self.gate
        return out.detach(), *torch.autograd.grad(out, inputs, self.gradient)


def layer(
    sizes: Sizes, length: int, share: float, ours: str, device: torch.device
) -> dict[str, Any]:
    """Times, memory and differences of all ways to run one layer."""
    work = Layer(sizes, length, share, device)
    inputs = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    engines = {OURS: ours} | {peer.name: peer.name for peer in PEERS}
    calls: dict[str, Call] = {}
    memory: dict[str, Any] = {}
    failed: dict[str, str] = {}
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, backend in engines.items():
        try:
            for _ in range(2):  # the first one compiles
                results.pop(name, None)
                with peak_memory(device) as peak:
                    results[name] = work.both(backend)
        except Exception as error:  # the others are still worth comparing
            failed[name] = reason(error)
        else:
            # The other engines' results, which are kept to be compared, do not count.
            beyond = peak["beyond_gb"]
            whole = None if beyond is None else rounded(beyond + inputs / 1e9)
            memory[name] = {"total_gb": whole, "beyond_gb": beyond}
            calls[name] = functools.partial(work.both, backend)
            calls[f"{name} forward"] = functools.partial(work.forward, backend)
    differences = compare(results)
    results.clear()
    for name, one in differences.items():
        if not all(difference <= CLOSE for difference in one.values()):
            failed[name] = f"its results differ from those of the last one: {one}."
    ms = in_turns(calls, device)
    total = {name: rounded(ms.get(name)) for name in engines}
    return {
        "ms": total,
        "forward_ms": {name: rounded(ms.get(f"{name} forward")) for name in engines},
        "ratios": ratios(total),
        "memory": {name: memory.get(name, NO_MEMORY) for name in engines},
        "differences": differences,
        "failed": failed,
    }


def compare(results: Mapping[str, tuple[Tensor, ...]]) -> dict[str, dict[str, float]]:
    """Relative L2 differences of each engine's output and gradients from the last engine's."""
    if not results:
        return {}
    *others, reference = results
    return {
        name: {
            tensor: rounded(float((a.float() - b.float()).norm() / b.float().norm()))
            for tensor, a, b in zip(
                ("out", "q", "k", "v", "gate"), results[name], results[reference], strict=True
            )
        }
        for name in others
    }


def between(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """The figures at a share of 0.7, on the line through the shares that were measured."""
    part = (BETWEEN - SHARES[0]) / (SHARES[1] - SHARES[0])

    def line(of: str) -> dict[str, float | None]:
        pairs = {name: (low[of][name], high[of][name]) for name in low[of]}
        return {
            name: None if None in pair else rounded(pair[0] + part * (pair[1] - pair[0]))
            for name, pair in pairs.items()
        }

    ms = line("ms")
    return {"interpolated": True, "ms": ms, "forward_ms": line("forward_ms"), "ratios": ratios(ms)}
