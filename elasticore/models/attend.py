"""All heads of an elastic layer in one attention call, as was decided."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from elasticore.attention import AttentionRequest
from elasticore.backends.selection import choose_blocks
from elasticore.call import hybrid_head_attention, paged_attention
from elasticore.choice import Choice, choose
from elasticore.errors import ElasticoreError
from elasticore.layout import Segments, SequenceLayout
from elasticore.models.paged_cache import PagedLayer
from elasticore.models.passes import Pass, Planned
from elasticore.models.state import STATE, LayerState
from elasticore.pages import Pages
from elasticore.patterns import BlockLists, HeadMode
from elasticore.plan import HeadPlan

__all__ = ["attend"]


def attend(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None, one: Pass
) -> Tensor:
    """All heads of a layer in one attention call, as its routing has planned.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Tq, D]`` and ``[B, Hkv, Tk, D]``, as transformers hands them to its attention.
    scale
        Factor on q·k; None for ``1 / sqrt(D)``.
    one
        The pass.
    """
    state: LayerState = getattr(attention, STATE)
    planned = one.plans.pop(state.index)
    if planned.layer is not None and isinstance(planned.layer.inner, PagedLayer):
        return _over_pages(one, state, planned, planned.layer.inner.pages, scale, q)
    if k.shape[2] != planned.seen:
        if k.shape[2] != planned.room():
            raise ElasticoreError(
                f"layer {attention.layer_idx} attends to {k.shape[2]} keys, where {planned.seen} "
                f"were expected from {q.shape[2]} queries and the cache: this transformers hands "
                "its cache on in a way that elasticore does not know; run `elasticore doctor`."
            )
        # A preallocated cache: what is not filled yet.
        k, v = k[:, :, : planned.seen], v[:, :, : planned.seen]
    if state.parallel is not None:
        q, k, v = (state.parallel.to_heads(x) for x in (q, k, v))
    if planned.mix is None:
        out = _run(one, state, planned, planned.plan, scale, q, k, v)
    else:
        alike = [torch.full_like(planned.decisions, decision) for decision in (0, 1)]
        plans = [state.way.plan(decisions) for decisions in alike]
        first, second = (_run(one, state, planned, plan, scale, q, k, v) for plan in plans)
        weight = planned.mix.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1])
        out = torch.lerp(first, second, weight[:, None, None])
    return out if state.parallel is None else state.parallel.to_tokens(out)


def _run(
    one: Pass,
    state: LayerState,
    planned: Planned,
    plan: HeadPlan,
    scale: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    def call(plan: HeadPlan, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        return hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale, backend=one.backend)

    def recorded(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        if one.traces and not planned.recomputing:
            _record(one, state, planned, q, k, v, plan, layout, scale)
        return call(plan, q, k, v, layout)

    layout = planned.layout
    out = layout.attend(recorded, q, k, v)
    if planned.answers is not None:
        routed = state.way.plan(plan.decisions, short=True)
        own = layout.attend(partial(call, routed), q, k, v)
        out = torch.where(planned.answers[:, None, :, None], own, out)
    if layout.ends is None or torch.is_grad_enabled():  # while training nobody goes on writing
        return out
    last = state.way.plan(plan.decisions, short=state.way.prefill == "routed")
    return layout.attend_ends(partial(call, last), q, k, v, out)


def _over_pages(
    one: Pass, state: LayerState, planned: Planned, pages: Pages, scale: float | None, q: Tensor
) -> Tensor:
    """A pass that goes on after a prompt, whose streaming heads have given memory back."""
    queries = q.shape[2]
    layout = planned.layout
    own = None if layout.valid is None else layout.valid[:, -queries:]

    def call(q: Tensor, queries: SequenceLayout) -> Tensor:
        if one.traces:
            request = AttentionRequest.of_pages(q, pages, planned.plan, queries)
            _note(one, state, planned, planned.plan, pages.segments(q, queries), None,
                  choose(one.backend, request, paged=True))  # fmt: skip
        return paged_attention(
            q, pages, planned.plan, layout=queries, scale=scale, backend=one.backend
        )

    if own is None or queries == 1:  # a query that is padding stands at the last valid position
        return call(q, SequenceLayout.dense())
    counts = pad(own.sum(1).cumsum(0), (1, 0))
    packed = q.transpose(1, 2)[own].transpose(0, 1)[None]
    out = torch.zeros_like(q.transpose(1, 2))
    out[own] = call(packed, SequenceLayout.packed(counts))[0].transpose(0, 1)
    out = out.transpose(1, 2)
    if layout.ends is None:
        return out
    last = call(q[:, :, -1:], SequenceLayout.dense())
    last = torch.where(layout.ends[0][:, None, None, None], last, out[:, :, -1:])
    return torch.cat((out[:, :, :-1], last), 2)


def _record(
    one: Pass,
    state: LayerState,
    planned: Planned,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout,
    scale: float | None,
) -> None:
    request = AttentionRequest.of(q, k, v, plan, layout)  # with the gradients it asks for
    choice = choose(one.backend, request)
    with torch.no_grad():
        selection = None
        if plan.selector is not None and bool((plan.modes == int(HeadMode.SELECTED)).any()):
            scale = q.shape[3] ** -0.5 if scale is None else scale
            selection = choose_blocks(q, k, plan, layout, scale, every=False)
        segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
        _note(one, state, planned, plan, segments, selection, choice)


def _note(
    one: Pass,
    state: LayerState,
    planned: Planned,
    plan: HeadPlan,
    segments: Segments,
    selection: BlockLists | None,
    choice: Choice,
) -> None:
    for trace in one.traces:
        trace.add(
            one,
            state.index,
            plan=plan,
            segments=segments,
            selection=selection,
            decisions=planned.decisions,
            decided=planned.decided,
            choice=(choice.name, choice.reason),
            local_layers=state.local_layers,
        )
