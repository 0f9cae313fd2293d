"""What the heads of a layer run in a pass: decided from its input, or what the cache remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

from elasticore.errors import ElasticoreError
from elasticore.models.cache import ElasticCacheLayer, Memory, elastic_layer
from elasticore.models.ends import EndColumns, Ends
from elasticore.models.layouts import PassLayout, packed_lengths, read_layout
from elasticore.models.paged_cache import PagedLayer
from elasticore.models.passes import Pass, Planned
from elasticore.models.state import ROUTER, LayerState
from elasticore.models.versions import CACHE
from elasticore.router.routing import Routing

__all__ = ["plan_layer"]


def plan_layer(
    attention: nn.Module, state: LayerState, one: Pass, hidden: Tensor, kwargs: Mapping[str, Any]
) -> Planned:
    """What a layer's heads run in the pass ``one``.

    Parameters
    ----------
    hidden
        The layer's input, ``[B, T, hidden size]``.
    kwargs
        The other arguments of its attention module.
    """
    cache, layer, past = kwargs.get(CACHE), None, 0
    if cache is not None:
        layer = elastic_layer(cache, int(attention.layer_idx))  # type: ignore[arg-type]
        past = layer.columns
    one.check_past(past, attention.layer_idx)
    layout = one.layouts.get(hidden.device)
    if layout is None:  # the first layer on this device
        layout = _layout(state, hidden, past, kwargs)
        one.layouts[hidden.device] = layout
    if layer is None:
        return _without_cache(attention, state, one, hidden, layout)
    memory = _memory(layer, state, past, layout)
    queries = hidden.shape[1]
    if memory.decisions is None or one.reads_prompt(queries):
        if isinstance(layer.inner, PagedLayer) and not memory.generated:
            raise ElasticoreError(
                "a static cache gives the memory of streaming heads back as soon as a prompt is "
                "read, so a prompt cannot come in chunks: prefill it whole, or attend with "
                "cache='dense'."
            )
        if isinstance(layer.inner, PagedLayer) and state.way.turn == "renew":
            raise ElasticoreError(
                "a further prompt is to be routed anew, but streaming heads have given their "
                "memory back: attend with turn='keep', which keeps what was decided, or with "
                "cache='dense'; or prefill the whole text again."
            )
        planned = _with_prompt(attention, state, one, hidden, layout, memory, past)
        if isinstance(layer.inner, StaticLayer) and not getattr(cache, "offloading", False):
            plan = state.way.plan(planned.decisions, short=True) if state.way.gives_back else None
            one.prompts.append((layer, plan, layout.valid))
            boundary = getattr(_router(attention), "boundary", None)
            if boundary and plan is None and state.way.turn == "renew":
                memory.trail = hidden.new_zeros(len(hidden), 2 * boundary, hidden.shape[2])
    else:
        memory.generated = True
        if getattr(_router(attention), "boundary", None) != 0:
            valid = None if layout.valid is None else layout.valid[:, past : past + queries]
            memory.put_off(hidden, valid, partial(state.family.project, attention))
        planned = _as_before(state, memory, layout, past + queries, queries, prompt=False)
        # What is offloaded is elsewhere just now.
        dynamic = type(layer.inner) is DynamicLayer  # a static one did when its prompt was read
        if state.way.gives_back and past and dynamic and not getattr(cache, "offloading", False):
            before = None if layout.valid is None else layout.valid[:, :past]
            layer.give_back(planned.plan, before)
    if isinstance(layer.inner, PagedLayer):
        layer.inner.own = None if layout.valid is None else layout.valid[:, past : past + queries]
    planned.layer = layer
    memory.columns, memory.valid = past + queries, layout.valid
    memory.plain = layout.order is None and layout.ends is None
    return planned


def _router(attention: nn.Module) -> nn.Module:
    return attention._modules[ROUTER]  # type: ignore[return-value]


def _without_cache(
    attention: nn.Module, state: LayerState, one: Pass, hidden: Tensor, layout: PassLayout
) -> Planned:
    router, project = _router(attention), partial(state.family.project, attention)
    boundary, prompt = getattr(router, "boundary", None), one.prompt_lengths(layout)
    ends: Ends | None = None
    if state.parallel is not None:
        keys = state.parallel.to_heads(project(hidden).transpose(1, 2)).transpose(1, 2)
        ends = _ends(boundary, keys, layout, prompt, lambda keys: keys, spare=False)
    elif boundary != 0:
        ends = _ends(boundary, hidden, layout, prompt, project, spare=False)
    routing = _decide(attention, router, ends, layout, hidden)
    again = not one.decided(state.index, routing)
    plan, queries = state.way.plan_of(routing), hidden.shape[1]
    answers = _answers(state, one, layout, prompt, hidden)
    decisions, mix = routing.decisions, routing.mix
    return Planned(plan, layout, queries, None, decisions, True, mix, again, answers)


def _with_prompt(
    attention: nn.Module,
    state: LayerState,
    one: Pass,
    hidden: Tensor,
    layout: PassLayout,
    memory: Memory,
    past: int,
) -> Planned:
    """A pass that reads a prompt, from its start or on from what the cache holds."""
    router, project = _router(attention), partial(state.family.project, attention)
    boundary, queries = getattr(router, "boundary", None), hidden.shape[1]
    ends: Ends | None = None
    renews = memory.decisions is None or not memory.generated or state.way.turn == "renew"
    if memory.lost and renews and boundary != 0:
        raise ElasticoreError(
            "a prompt is to be routed anew after tokens that a compiled model generated, of which "
            "not enough was kept to route from: attend with turn='keep', generate without "
            "compilation, or prefill the whole text again."
        )
    prompt = one.prompt_lengths(layout)
    if past and memory.decisions is None:  # a cut took the decision: all there is decides
        prompt = layout.length
    answers = _answers(state, one, layout, prompt, hidden)
    if boundary != 0 and not memory.lost:
        memory.settle(project)
        ends = _ends(boundary, hidden, layout, prompt, project)
        ends = ends if memory.ends is None else memory.ends + ends
    decided: Routing | None = None
    if renews:
        decided = _decide(attention, router, ends, layout, hidden)
        one.decided(state.index, decided)
        memory.decisions, memory.plans = decided.decisions, {}
        memory.generated, memory.prompt = False, past + one.prompt_columns(queries)
    if ends is not None:
        if one.leaves_out(queries):  # drafts, or an answer: no prompt, but the text goes on
            rest = layout.length - prompt

            def beyond(position: Tensor) -> Tensor:
                return layout.columns(prompt[:, None] + position)

            where = EndColumns.of(boundary, queries, beyond, layout.row, rest)
            ends = ends + Ends.of(where, hidden, project)
        memory.ends = ends.rows(Tensor.detach)
    if decided is None or past:
        planned = _as_before(state, memory, layout, past + queries, queries)
        planned.answers = answers
        if decided is not None:
            planned.decided, planned.mix = True, decided.mix
        return planned
    plan, decisions, mix = state.way.plan_of(decided), decided.decisions, decided.mix
    return Planned(plan, layout, queries, None, decisions, True, mix, answers=answers)


def _answers(
    state: LayerState, one: Pass, layout: PassLayout, prompt: Tensor, hidden: Tensor
) -> Tensor | None:
    """Which tokens of a pass are no prompt, bool ``[B, T]``; None where they are read alike."""
    batch, queries = hidden.shape[:2]
    if state.way.prefill == "routed" or not one.leaves_out(queries):
        return None
    place = torch.arange(queries, device=hidden.device).expand(layout.row.numel(), -1)
    column = layout.columns(place).clamp(max=queries - 1)
    beyond = (place >= prompt[:, None]) & (place < layout.length[:, None])
    found = torch.zeros(batch, queries, dtype=torch.int64, device=hidden.device)
    rows = layout.row[:, None].expand_as(column)
    return found.index_put_((rows, column), beyond.long(), accumulate=True) > 0


def _as_before(
    state: LayerState,
    memory: Memory,
    layout: PassLayout,
    seen: int,
    queries: int,
    *,
    prompt: bool = True,
) -> Planned:
    """What the cache remembers: decoding, a later chunk or a further turn."""
    assert memory.decisions is not None
    # Where prompts are read in full, it is not the number of tokens that tells answers from them.
    full = state.way.prefill == "full"
    short = not prompt if full else queries < state.way.block_size
    plan = memory.plans.get(short)
    if plan is None:
        plan = memory.plans[short] = state.way.plan(memory.decisions, short=short)
    return Planned(plan, layout, seen, None, memory.decisions)


def _ends(
    boundary: int | None,
    tokens: Tensor,
    layout: PassLayout,
    prompt: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    spare: bool = True,
) -> Ends:
    # All layers have the same prompts, but for a cut after which all there is decides.
    of = boundary, tokens.shape[1], spare, prompt is layout.length
    if of not in layout.end_columns:
        layout.end_columns[of] = EndColumns.of(
            boundary, tokens.shape[1], layout.columns, layout.row, prompt, spare=spare
        )
    return Ends.of(layout.end_columns[of], tokens, project)


def _decide(
    attention: nn.Module, router: nn.Module, ends: Ends | None, layout: PassLayout, hidden: Tensor
) -> Routing:
    if ends is None:  # a policy that reads no keys
        heads = int(attention.config.num_key_value_heads)  # type: ignore[union-attr, arg-type]
        keys = hidden.new_empty(layout.row.numel(), 0, heads, int(attention.head_dim))  # type: ignore[arg-type]
        rows = PassLayout.dense(layout.row.numel(), 0, hidden.device)
        routing = router(keys, rows.layout.segments(layout.row.numel(), 0, 0, hidden.device))
    else:
        routing = router(*ends.window())
    if not isinstance(routing, Routing):
        raise TypeError(
            f"policies must return a Routing, got {type(routing).__name__} from "
            f"{type(router).__name__}."
        )
    return routing


def _memory(layer: ElasticCacheLayer, state: LayerState, past: int, layout: PassLayout) -> Memory:
    """What the cache knows, checked to be this model's and of all that it holds."""
    if past == 0:
        layer.memory = Memory(state.owner)
    memory = layer.memory
    if memory is None or memory.columns != past:
        known = 0 if memory is None else memory.columns
        raise ElasticoreError(
            f"the cache holds {past} tokens, but this model knows how {known} of them were routed: "
            "a pass failed, or a model that is not elastic went on with it; prefill the prompt "
            "again."
        )
    if memory.owner != state.owner:
        raise ElasticoreError(
            "the cache was filled by another model, or by this one while it attended in another "
            "way, so its routing means something else here; prefill the prompt again."
        )
    if memory.decisions is not None and memory.decisions.shape[0] != layout.row.shape[0]:
        raise ElasticoreError(
            f"the cache was prefilled with {memory.decisions.shape[0]} sequences but now serves "
            f"{layout.row.shape[0]}; prefill the prompts in the batch that is generated."
        )
    return memory


def _layout(state: LayerState, hidden: Tensor, past: int, kwargs: Mapping[str, Any]) -> PassLayout:
    """The layout of a pass, from the arguments of its attention modules."""
    cached, position_ids = kwargs.get(CACHE) is not None, kwargs.get("position_ids")
    batch, queries = hidden.shape[:2]
    found = read_layout(
        kwargs.get("attention_mask"),
        position_ids,
        kwargs.get("cu_seq_lens_q"),
        kwargs.get("cu_seq_lens_k"),
        batch=batch,
        queries=queries,
        seen=past + queries,
        device=hidden.device,
        cached=cached,
    )
    cu_queries = found.layout.cu_queries
    if cu_queries is None or not state.local_layers:
        return found
    lengths: Sequence[int] | None = (
        None if position_ids is None else packed_lengths(position_ids).tolist()
    )
    if cached or lengths != cu_queries.tolist():
        raise ValueError(
            "position_ids must start over at every packed sequence, and use_cache be False: this "
            "model's own sliding-window layers know packed sequences by nothing else."
        )
    return found
