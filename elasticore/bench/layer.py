"""The tensors of one attention call over all heads of a layer, and what its output must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elasticore.attention import AttentionRequest
from elasticore.bench.cases import Work
from elasticore.bench.selector import choose_blocks, structured
from elasticore.bench.timing import captured
from elasticore.call import hybrid_head_attention
from elasticore.layout import Segments, SequenceLayout
from elasticore.patterns import BlockLists, BlockSelector, Streaming, XAttention
from elasticore.plan import HeadPlan

if TYPE_CHECKING:
    from elasticore.bench.attention import AttentionCase

__all__ = ["AttentionWork"]


class AttentionWork(Work):
    """q, k, v and the plan of a case; the same seed gives the same tensors.

    Prefill tensors lie in memory as projections give them, ``[B, T, H, D]``; a cache is
    ``[B, H, T, D]``.

    Attributes
    ----------
    q, k, v
        ``[B, H, T, D]``.
    plan
        What each head does.
    routing
        The same modes on the host.
    """

    def __init__(self, case: AttentionCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.routing = case.routing()
        dtype = getattr(torch, case.dtype)
        selected = case.sparse == "SELECTED"
        sparse = XAttention(threshold=0.9) if selected else Streaming(case.sink, case.local)
        decisions = (torch.tensor(self.routing, device=device) != 0).to(torch.int8)
        self.plan = HeadPlan(decisions, sparse=sparse, block_size=case.block_size)
        if case.sparse == "SELECTED":
            self.q, self.k, self.v = structured(
                case.length,
                case.heads,
                case.kv_heads,
                case.head_dim,
                case.block_size,
                case.dtype,
                device,
            )
        else:
            self.q, self.k, self.v = self._random(dtype)
        # Rounding an output, and the weights before their product with V, to the dtype: relative
        # errors of eps / sqrt(12) each at most, in the root mean square.
        self.tolerance = max(torch.finfo(dtype).eps, 1e-4)
        self.segments = SequenceLayout.dense().segments(
            case.batch, case.queries, case.length, device
        )
        past = case.length - case.queries
        causal = case.queries * past + case.queries * (case.queries + 1) / 2
        lists = self.lists if case.sparse == "SELECTED" else None
        kept = float((1 - self.plan.esr(self.segments, selection=lists)).sum()) * causal
        group = case.heads // case.kv_heads
        self.flops = 4 * case.head_dim * group * kept
        if case.queries == 1:
            rows = 2 * kept + 2 * case.batch * case.heads  # of k and v; of q and the output
            self.bytes = rows * case.head_dim * self.q.element_size()

    def _random(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        case = self.case

        def draw(heads: int, length: int) -> Tensor:
            shape = case.batch, length, heads, case.head_dim
            x = torch.randn(shape, generator=generator, device=self.device, dtype=dtype)
            return x.transpose(1, 2) if case.queries > 1 else x.transpose(1, 2).contiguous()

        return (
            draw(case.heads, case.queries),
            draw(case.kv_heads, case.length),
            draw(case.kv_heads, case.length),
        )

    def choose(self) -> BlockLists:
        """Run the selector: the key blocks of SELECTED heads."""
        return choose_blocks(self.plan, self.q, self.k, self.segments)

    @cached_property
    def lists(self) -> BlockLists:
        """The key blocks of SELECTED heads, chosen once."""
        return self.choose()

    def request(self) -> AttentionRequest:
        """What the call asks of a backend."""
        return AttentionRequest.of(self.q, self.k, self.v, self.plan, SequenceLayout.dense())

    def as_timed(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``call``; for decoding on a GPU, as the replay of a CUDA graph."""
        return captured(call) if self.q.is_cuda and self.case.queries == 1 else call

    def difference(self, out: Tensor | list[Tensor]) -> float:
        """The largest relative error (L2) over the sampled rows."""
        if isinstance(out, list):
            out = torch.cat(out)
        errors = []
        for rows, reference in self.reference:
            sample = out[:, :, rows].to(reference.dtype)
            errors.append((sample - reference).norm() / reference.norm())
        worst = float(torch.stack(errors).max())
        return worst if worst == worst else float("inf")  # NaN compares as no error at all

    @cached_property
    def reference(self) -> list[tuple[slice, Tensor]]:
        """Rows of the output, computed by the serial backend in float32.

        The work is causal: the rows up to position n are the last ones of the same work on n
        tokens. So one block of rows in the middle and one at the end stand for all.
        """
        found = []
        for stop in self._sampled():
            past = self.case.length - self.case.queries
            start = max(past, (stop - 1) // self.case.block_size * self.case.block_size)
            rows = slice(start - past, stop - past)
            q, k, v = (
                x.float() for x in (self.q[:, :, rows], self.k[:, :, :stop], self.v[:, :, :stop])
            )
            plan = self.plan
            if self.case.sparse == "SELECTED":
                chosen = _Chosen(self.lists, start // self.case.block_size)
                plan = dataclasses.replace(plan, sparse=chosen, check=False)
            found.append((rows, hybrid_head_attention(q, k, v, plan, backend="serial")))
        return found

    def _sampled(self) -> Iterator[int]:
        if self.case.queries > 1:
            yield self.case.length // 2 // self.case.block_size * self.case.block_size
        yield self.case.length


@dataclass(frozen=True)
class _Chosen(BlockSelector):
    """One row block of lists that are there already.

    So the attention is compared on the same blocks; the suite ``selector`` compares the choice.
    """

    lists: BlockLists
    row: int

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        row = slice(self.row, self.row + 1)
        return BlockLists(self.lists.indices[:, :, row], self.lists.counts[:, :, row])
