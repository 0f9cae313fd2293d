"""The attention calls as PyTorch operators: what ``torch.compile`` sees of them.

The operators are opaque: a compiled graph holds the call, and the backend is chosen when it runs,
as in eager code. Forward only: a call with gradients stays outside of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.attention import wants_gradients
from elasticore.choice import run, run_paged
from elasticore.layout import Segments, SequenceLayout
from elasticore.pages import Pages
from elasticore.patterns import (
    BlockLists,
    BlockSelector,
    Full,
    Pattern,
    Streaming,
    XAttention,
)
from elasticore.plan import HeadPlan

__all__ = ["traced", "traced_paged"]


@dataclass(frozen=True)
class _Chosen(BlockSelector):
    """Block lists that were made before the operator ran."""

    lists: BlockLists

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        return self.lists


_outside_the_graph = torch.compiler.disable(
    run,
    reason="hybrid_head_attention cannot be traced with gradients; do without fullgraph=True",
)


def traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout,
    scale: float,
    backend: str | None,
) -> Tensor:
    """:func:`~elasticore.choice.run`, while ``torch.compile`` traces.

    XAttention chooses its blocks inside the operator. Any other selector is traced itself. The
    operator has no backward pass: where gradients are wanted, the call breaks the graph.
    """
    if wants_gradients(q, k, v, plan):
        return _outside_the_graph(q, k, v, plan, layout, scale, backend)
    lists = None
    stride, threshold, quirk, chunk = 0, 0.0, False, 0
    selector = plan.selector
    if isinstance(selector, XAttention):
        stride, threshold = selector.stride, selector.threshold
        quirk, chunk = selector.official_quirk, selector.chunk
    elif selector is not None:
        segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
        lists = selector.select(q, k, segments, block_size=plan.block_size, scale=scale)
    return torch.ops.elasticore.hybrid_head_attention(
        q,
        k,
        v,
        plan.decisions,
        int(plan.retrieval.lane),
        int(plan.sparse.lane),
        plan.streaming.sink,
        plan.streaming.local,
        plan.block_size,
        None if lists is None else lists.indices,
        None if lists is None else lists.counts,
        stride,
        float(threshold),
        quirk,
        chunk,
        layout.kind,
        layout.first,
        layout.last,
        layout.query_offset,
        layout.cu_queries,
        layout.cu_keys,
        scale,
        backend,
    )


@torch.library.custom_op("elasticore::hybrid_head_attention", mutates_args=())
def _hybrid_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decisions: Tensor,
    retrieval: int,
    sparse: int,
    sink: int,
    local: int,
    block_size: int,
    indices: Tensor | None,
    counts: Tensor | None,
    stride: int,
    threshold: float,
    official_quirk: bool,
    chunk: int,
    kind: str,
    first: Tensor | None,
    last: Tensor | None,
    query_offset: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    patterns: list[Pattern] = [Full(), Streaming(sink, local)]  # by lane
    if stride:
        patterns.append(XAttention(stride, threshold, official_quirk, chunk))
    elif indices is not None and counts is not None:
        patterns.append(_Chosen(BlockLists(indices, counts)))
    plan = HeadPlan(
        decisions, patterns[retrieval], patterns[sparse], block_size=block_size, check=False
    )
    layout = SequenceLayout(kind, first, last, query_offset, cu_queries, cu_keys)  # type: ignore[arg-type]
    out = run(q, k, v, plan, layout, scale, backend)
    # An operator's output has the strides that its fake promises, whatever the backend's are.
    return torch.empty_like(q).copy_(out) if out.stride() != _strides(q) else out


def _strides(q: Tensor) -> tuple[int, ...]:
    return torch.empty_like(q, device="meta").stride()


@_hybrid_head_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


def traced_paged(
    q: Tensor,
    pages: Pages,
    plan: HeadPlan,
    layout: SequenceLayout,
    scale: float,
    backend: str | None,
) -> Tensor:
    """:func:`~elasticore.choice.run_paged`, while ``torch.compile`` traces."""
    return torch.ops.elasticore.paged_attention(
        q,
        pages.keys,
        pages.values,
        pages.table,
        pages.lengths,
        plan.decisions,
        int(plan.retrieval.lane),
        int(plan.sparse.lane),
        plan.streaming.sink,
        plan.streaming.local,
        plan.block_size,
        layout.kind,
        layout.cu_queries,
        layout.cu_keys,
        scale,
        backend,
    )


@torch.library.custom_op("elasticore::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    decisions: Tensor,
    retrieval: int,
    sparse: int,
    sink: int,
    local: int,
    block_size: int,
    kind: str,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    patterns = (Full(), Streaming(sink, local))  # by lane: no other reads pages
    plan = HeadPlan(
        decisions, patterns[retrieval], patterns[sparse], block_size=block_size, check=False
    )
    layout = SequenceLayout(kind, cu_queries=cu_queries, cu_keys=cu_keys)  # type: ignore[arg-type]
    out = run_paged(q, Pages(keys, values, table, lengths), plan, layout, scale, backend)
    return torch.empty_like(q).copy_(out) if out.stride() != _strides(q) else out


@_paged_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)
