"""The inputs of a case: three sequences of one batch, each routed differently."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elasticore.call import hybrid_head_attention
from elasticore.layout import Segments, SequenceLayout
from elasticore.patterns import BlockLists, BlockSelector, Full, HeadMode, Pattern
from elasticore.plan import HeadPlan
from elasticore.testing.cases import PAIRS, PRESETS, SHORT, Case

__all__ = ["Problem", "ScatteredBlocks", "make_problem"]


@dataclass(frozen=True)
class ScatteredBlocks(BlockSelector):
    """A selector for tests: pseudo-random blocks that depend on nothing but their own place.

    Block ``j`` of row block ``i`` and head ``h`` is chosen for about ``share`` of all triples; the
    diagonal always is. As q and k play no part, every dtype and chunking chooses the same.
    """

    share: float = 0.5

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block; see :class:`BlockSelector`."""
        past = (segments.key_length - segments.query_length)[:, None]
        rows = -(-segments.key_length[:, None] // block_size) - past // block_size
        device = q.device
        row = torch.arange(int(rows.max()) if rows.numel() else 0, device=device)
        row_block = past // block_size + row
        width = int((-(-segments.key_length // block_size)).max()) if len(past) else 0
        column = torch.arange(width, device=device)
        head = torch.arange(q.shape[1], device=device)
        # A multiplicative hash of (head, row block, column), its high bits read as a fraction.
        key = head[:, None, None] * 7919 + row_block[:, None, :, None] * 104729 + column * 1299709
        fraction = (key * 2654435761 % 2**32).double() / 2**32
        mask = (fraction < self.share) & (column < row_block[:, None, :, None])
        mask |= column == row_block[:, None, :, None]
        mask &= (row < rows)[:, None, :, None]
        mask &= (segments.query_length > 0)[:, None, None, None]
        return BlockLists.from_mask(mask)


class Problem(NamedTuple):
    """The arguments of one attention call."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: HeadPlan
    layout: SequenceLayout
    scale: float

    def run(self, backend: str | None = None) -> Tensor:
        """Run the call on ``backend``."""
        return hybrid_head_attention(
            self.q,
            self.k,
            self.v,
            self.plan,
            layout=self.layout,
            scale=self.scale,
            backend=backend,
        )

    def segments(self) -> Segments:
        """Where the sequences lie."""
        return self.layout.segments(
            self.q.shape[0], self.q.shape[2], self.k.shape[2], self.q.device
        )


def make_problem(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lanes: tuple[HeadMode, HeadMode] = PAIRS[0],
    gated: bool = False,
    seed: int = 0,
) -> Problem:
    """Random inputs for ``case``: three sequences, two KV heads each, three routings.

    Parameters
    ----------
    lanes
        Those of the plan's patterns (retrieval, sparse).
    gated
        Whether the plan has a gate, and q, k, v and the gate want gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads, sequences = 2, 3
    lengths = [case.length, max(1, case.length // 2), max(1, case.length - 3)]
    if case.layout == "dense":
        lengths = [case.length] * sequences
    wanted = {"all": case.length, "some": max(1, case.length // 3), "one": 1}[case.queries]
    queries = [min(wanted, length) for length in lengths]

    def draw(heads: int, rows: int, positions: int) -> Tensor:
        # Drawn as [B, T, H, D] and transposed: the strides that models hand over.
        x = torch.randn(rows, positions, heads, case.head_dim, generator=generator)
        return x.to(device=device, dtype=dtype).transpose(1, 2)

    heads = kv_heads * case.group
    if case.layout == "packed":
        cumulative = [
            torch.tensor([0, *itertools.accumulate(sizes)], device=device)
            for sizes in (queries, lengths)
        ]
        layout = SequenceLayout.packed(*cumulative)
        shape = (1, sum(queries), sum(lengths))
    else:
        shape = (sequences, wanted, case.length)
        layout = SequenceLayout.dense()
        if case.layout != "dense":
            missing = torch.tensor([case.length - length for length in lengths], device=device)
            zero = torch.zeros_like(missing)
            last = zero + case.length - 1
            layout = (
                SequenceLayout.padded(missing, last)
                if case.layout == "left"
                else SequenceLayout.padded(zero, last - missing)
            )
    batch, total_queries, total_keys = shape
    q, k, v = (
        draw(heads, batch, total_queries),
        draw(kv_heads, batch, total_keys),
        draw(kv_heads, batch, total_keys),
    )
    block_size, streaming, short = PRESETS[case.preset]
    patterns: dict[HeadMode, Pattern] = {
        HeadMode.FULL: Full(),
        HeadMode.STREAMING: short if case.length < SHORT else streaming,
        HeadMode.SELECTED: ScatteredBlocks(),
    }
    pair = [patterns[lane] for lane in lanes]
    decisions = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.int8, device=device)
    if gated:
        gate = decisions.float().requires_grad_()
        plan = HeadPlan.from_gate(gate, *pair, block_size=block_size)
        for tensor in (q, k, v):
            tensor.requires_grad_()
    else:
        plan = HeadPlan(decisions, *pair, block_size=block_size)
    # Not the default scale, so that whoever ignores the argument shows it.
    return Problem(q, k, v, plan, layout, 1.25 * case.head_dim**-0.5)
