"""The suite ``selector``: choosing the key blocks of SELECTED heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from elasticore.attention import Verdict
from elasticore.bench.cases import Case, Engine, Ready, Work, tokens
from elasticore.layout import Segments, SequenceLayout
from elasticore.patterns import BlockLists, XAttention
from elasticore.plan import HeadPlan

__all__ = [
    "SelectorCase",
    "SelectorWork",
    "choose_blocks",
    "selector_cases",
    "structured",
]

DEFINITION_LONGEST = 16384
"""Tokens up to which the definition is measured on a GPU."""


def structured(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one sequence whose last row block attends to one key block in sixteen.

    On noise, a selector that keeps 90 % of the mass keeps nearly every block.
    """
    from elasticore.testing import planted_blocks

    planted = planted_blocks(
        length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        keep=max(length // block_size // 64, 1) * 4,
        device=device,
        dtype=getattr(torch, dtype),
    )
    return planted.q, planted.k, planted.v


def choose_blocks(plan: HeadPlan, q: Tensor, k: Tensor, segments: Segments) -> BlockLists:
    """The blocks of a plan's SELECTED heads, by the fastest way there is."""
    assert isinstance(plan.selector, XAttention)
    size, scale = plan.block_size, q.shape[3] ** -0.5
    if not fused(q.device):
        return plan.selector.select(q, k, segments, block_size=size, scale=scale)
    from elasticore.backends.triton.xattention import select

    return select(
        plan.selector,
        q,
        k,
        plan.modes,
        segments,
        block_size=size,
        scale=scale,
        max_queries=q.shape[2],
        max_keys=k.shape[2],
    )


def fused(device: torch.device) -> Verdict:
    """Whether the triton backend can choose the blocks."""
    from elasticore.backends.triton import TritonAttention

    if device.type != "cuda":
        return Verdict(False, "needs an NVIDIA GPU.")
    return TritonAttention.available()


@dataclass(frozen=True)
class SelectorCase(Case):
    """XAttention's choice for every query head of one sequence."""

    suite: ClassVar[str] = "selector"
    unit: ClassVar[str] = "ms"

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 128
    stride: int = 16
    threshold: float = 0.9
    dtype: str = "bfloat16"

    def engines(self) -> Sequence[Engine]:
        """The fused selector and the definition."""
        return [Fused(), Definition()]

    def build(self, device: torch.device) -> SelectorWork:
        """Make q, k and the plan."""
        return SelectorWork(self, device)


class SelectorWork(Work):
    """q, k ``[1, H, T, D]`` and a plan whose heads are all SELECTED."""

    # Rounding may move a block across the threshold: one of a row's blocks, in few rows.
    tolerance = 0.02

    def __init__(self, case: SelectorCase, device: torch.device) -> None:
        self.case = case
        self.q, self.k, _ = structured(
            case.length,
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.block_size,
            case.dtype,
            device,
        )
        decisions = torch.ones(1, case.kv_heads, dtype=torch.int8, device=device)
        selector = XAttention(case.stride, case.threshold)
        self.plan = HeadPlan(decisions, sparse=selector, block_size=case.block_size)
        self.segments = SequenceLayout.dense().segments(1, case.length, case.length, device)
        cells = case.length // case.stride
        pairs = cells * (cells + 1) / 2
        self.flops = 2 * case.heads * pairs * case.stride * case.head_dim

    def difference(self, out: BlockLists) -> float:
        """Blocks that only ``out`` or only the definition chooses, per block chosen."""
        blocks = -(-self.case.length // self.case.block_size)
        mask = out.to_mask(blocks)[0]
        wrong = total = 0
        for row, reference in self.reference:
            chosen = mask[:, row, : reference.shape[-1]]
            wrong += int((chosen != reference).sum())
            total += int(reference.sum())
        return wrong / total

    @cached_property
    def reference(self) -> list[tuple[int, Tensor]]:
        """The definition's choice for one row block in the middle and the last: ``[Hq, blocks]``.

        A row block is scored from its own queries and the keys up to it, so it can be had alone.
        """
        size, device = self.case.block_size, self.q.device
        found = []
        for stop in self._sampled():
            row = (stop - 1) // size
            q, k = self.q[:, :, row * size : stop], self.k[:, :, :stop]
            segments = SequenceLayout.dense().segments(1, q.shape[2], stop, device)
            assert self.plan.selector is not None
            lists = self.plan.selector.select(
                q, k, segments, block_size=size, scale=self.case.head_dim**-0.5
            )
            found.append((row, lists.to_mask(row + 1)[0, :, 0]))
        return found

    def _sampled(self) -> Iterator[int]:
        yield self.case.length // 2
        yield self.case.length


class Fused(Engine):
    """The triton backend's selector."""

    name = "triton"
    peer = False

    def available(self, case: SelectorCase, device: torch.device) -> Verdict:
        """Where the backend is."""
        return fused(device)

    def prepare(self, work: SelectorWork) -> Ready:
        """Nothing to plan."""
        return Ready(lambda: choose_blocks(work.plan, work.q, work.k, work.segments))


class Definition(Engine):
    """The selector's own ``select``, in plain PyTorch."""

    name = "definition"

    def available(self, case: SelectorCase, device: torch.device) -> Verdict:
        """Everywhere."""
        return Verdict(True)

    def left_out(self, case: SelectorCase, device: torch.device) -> str:
        """A loop over row blocks."""
        if device.type == "cuda" and case.length > DEFINITION_LONGEST:
            return f"it defines the method, not measured above {tokens(DEFINITION_LONGEST)} tokens."
        return ""

    def prepare(self, work: SelectorWork) -> Ready:
        """Nothing to plan."""
        selector = work.plan.selector
        assert selector is not None
        size, scale = work.case.block_size, work.case.head_dim**-0.5
        return Ready(
            lambda: selector.select(work.q, work.k, work.segments, block_size=size, scale=scale)
        )


def selector_cases(device: torch.device, quick: bool) -> list[Case]:
    """All heads of a layer, at three lengths."""
    sizes: dict[str, Any] = {}
    lengths: tuple[int, ...] = (16384,) if quick else (16384, 65536, 131072)
    if device.type != "cuda":
        lengths = (512,) if quick else (1024, 4096)
        sizes = {
            "heads": 8,
            "kv_heads": 4,
            "head_dim": 64,
            "block_size": 64,
            "dtype": "float32",
        }
    return [SelectorCase("selector", length, None, **sizes) for length in lengths]
