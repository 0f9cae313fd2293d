"""What runs in an elastic model: one pass, from a layer's input to one attention call.

Four hooks and the attention function of transformers make a pass. Nothing of it stays on the model:
what they share travels in a :class:`Pass`, an argument that transformers hands on from the model to
every layer, through gradient checkpointing too; what belongs to a prompt lies in the cache.

1. ``begin_pass`` before the model, and ``begin_base`` before its base model, make the pass.
2. ``route``, before each attention module, takes the layer's *input* at both ends of every
   prompt, runs the module's own key projection on it, and lets the policy decide.
3. ``attend``, in the attention, runs all heads in one call.
4. ``end_pass``, after the base model, closes what is recorded.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elasticore.attention import AttentionRequest
from elasticore.backends.selection import choose_blocks
from elasticore.call import hybrid_head_attention
from elasticore.choice import choose, current_backend
from elasticore.errors import ElasticoreError
from elasticore.layout import SequenceLayout
from elasticore.models.cache import ElasticCacheLayer, Memory, elastic_layer
from elasticore.models.ends import Ends
from elasticore.models.families import Family
from elasticore.models.layouts import PassLayout, packed_lengths, read_layout
from elasticore.models.recording import Trace, active_traces
from elasticore.models.versions import CACHE
from elasticore.patterns import HeadMode
from elasticore.plan import HeadPlan
from elasticore.router.routing import Routing

if TYPE_CHECKING:
    from elasticore.models.elastic import Elastic
    from elasticore.models.parallel import SequenceParallel

__all__ = ["IMPLEMENTATION", "PASS", "ROUTER", "STATE", "LayerState", "ModelState", "Pass"]

IMPLEMENTATION = "elasticore"
"""What elastic layers are called among transformers' attention implementations."""
STATE = "_elasticore"
"""Attribute that holds the state of an elastic model, and of its attention modules."""
ROUTER = "attention_router"
"""Submodule of an attention module that routes its heads."""
PASS = "elastic"
"""The argument of a model's forward that holds its :class:`Pass`."""


class Pass:
    """One forward pass of an elastic model: what it is told, and what was decided in it.

    A pass makes its own; give one, as ``model(input_ids, elastic=one)``, to tell it something or to
    read the routings afterwards, with their gradients. It serves one forward.

    Parameters
    ----------
    prompt
        How many of each sequence's tokens in this pass belong to the prompt, from the first on: an
        int, or int64 ``[sequences]``. Decisions are made from these alone. None: all, but for the
        tokens that logits are asked for: ``logits_to_keep=n`` keeps the last ``n - 1`` out, which
        are drafts in assisted decoding, and the answer where one is scored.
    backend
        The backend of this pass; None for the one of :func:`elasticore.use_backend`.

    Attributes
    ----------
    routings
        What each elastic layer's policy decided, in order; empty if nothing was decided, as in a
        step of decoding.
    """

    def __init__(self, prompt: int | Tensor | None = None, *, backend: str | None = None) -> None:
        if isinstance(prompt, bool) or not isinstance(prompt, (int, Tensor, type(None))):
            raise TypeError(f"prompt must be an int, a tensor or None, got {prompt!r}.")
        self.prompt = prompt
        self.backend = backend
        self._routings: dict[int, Routing] = {}
        self._plans: dict[int, _Planned] = {}
        self._layouts: dict[torch.device, PassLayout] = {}
        self._past: int | None = None
        self._kept = 0
        self._traces: tuple[Trace, ...] = ()
        self._begun = False
        self._gradients = False
        self._started = 0.0

    @property
    def routings(self) -> list[Routing]:
        """What each elastic layer's policy decided, in order."""
        return [self._routings[index] for index in sorted(self._routings)]

    def __deepcopy__(self, memo: Any) -> Pass:
        return Pass(self.prompt, backend=self.backend)

    def _begin(self, gradients: bool) -> None:
        """The base model starts."""
        if self._begun:
            raise ValueError(f"{PASS} has served a forward pass already; make a Pass for each.")
        self._begun, self._gradients = True, gradients
        self.backend = current_backend() if self.backend is None else self.backend
        self._traces = active_traces()

    def _layout(self, device: torch.device, cached: bool, local: bool, **arguments: Any) -> Any:
        """The layout of this pass, made by its first layer on a device."""
        found = self._layouts.get(device)
        if found is None:
            found = read_layout(device=device, cached=cached, **arguments)
            if found.layout.kind == "packed" and local:
                _check_packed(found, arguments["position_ids"], cached)
            self._layouts[device] = found
        return found

    def _prompt_of(self, layout: PassLayout, queries: int) -> Tensor:
        """How many of each sequence's tokens in this pass are prompt, int64 ``[S]``."""
        if self.prompt is not None:
            prompt = torch.as_tensor(self.prompt, device=layout.length.device)
            return torch.minimum(prompt.clamp(min=0), layout.length)
        if self._kept <= 1:
            return layout.length
        if layout.valid is None:
            return (layout.length - (self._kept - 1)).clamp(min=0)
        drafts = layout.valid[:, -(self._kept - 1) :].sum(1)
        return layout.length - drafts

    def _prompt_columns(self, queries: int) -> int:
        """The columns that the prompt reaches into, as far as the host knows."""
        if isinstance(self.prompt, int):
            return min(max(self.prompt, 0), queries)
        return queries if self.prompt is not None else max(queries - max(self._kept - 1, 0), 0)

    def _leaves_out(self, queries: int) -> bool:
        """Whether tokens of this pass may be no prompt."""
        return isinstance(self.prompt, Tensor) or self._prompt_columns(queries) < queries

    def _reads_prompt(self, queries: int) -> bool:
        """Whether a pass on a filled cache goes on with a prompt: one token does not, unasked."""
        columns = self._prompt_columns(queries)
        return columns > 0 if self.prompt is not None else columns > 1


@dataclass(eq=False)
class _Planned:
    """What ``route`` leaves to ``attend`` of one layer."""

    plan: HeadPlan
    layout: PassLayout
    decisions: Tensor
    decided: bool
    keys: int
    seen: int
    mix: Tensor | None
    recomputing: bool


@dataclass(eq=False)
class ModelState:
    """That a model is elastic, and how to undo it.

    Attributes
    ----------
    way
        How it attends.
    original
        The model's own config object, which :func:`elasticore.restore` puts back.
    reconfigured
        Modules whose ``config`` was replaced.
    snapshot
        The elastic config as it was made, to notice what a user changes in it.
    handles
        Hooks to remove.
    layers
        The elastic attention modules, in order.
    local_layers
        How many layers the model keeps inside a window of its own.
    """

    way: Elastic
    original: Any
    reconfigured: list[nn.Module] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    local_layers: int = 0


@dataclass(eq=False)
class LayerState:
    """What an elastic attention module knows of its place.

    Attributes
    ----------
    index, local_layers
        Its number among the elastic layers, and how many layers are none.
    way
        How the model attends.
    family
        How the module makes its keys.
    owner
        Digest of the model and its way: whose cache it may read.
    parallel
        The processes that hold a batch together with this one, or None.
    """

    index: int
    local_layers: int
    way: Elastic
    family: Family
    owner: str
    parallel: SequenceParallel | None = None


# Hooks. Opaque to torch.compile: they read what a compiler would have to guard on.


@torch.compiler.disable
def begin_pass(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a model with a head: note which tokens logits are asked for."""
    return args, {**kwargs, PASS: _pass_of(kwargs)}


@torch.compiler.disable
def begin_base(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the base model: the pass starts."""
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation != IMPLEMENTATION:
        raise ElasticoreError(
            f"attn_implementation was set to {implementation!r} on an elastic model; call "
            "elasticore.restore(model) first, and elasticize it again if you like."
        )
    one = _pass_of(kwargs)
    one._begin(torch.is_grad_enabled())
    parallel = getattr(module, STATE_PARALLEL, None)
    if parallel is not None:
        parallel.check(kwargs)
        if one._traces:
            raise ValueError(
                "record() sees the heads of its own process only; it cannot record a model under "
                "sequence parallelism."
            )
    if one._traces:
        _wait(module)
        one._started = time.perf_counter()
    return args, {**kwargs, PASS: one}


STATE_PARALLEL = "_elasticore_parallel"
"""Attribute of a base model whose passes see a slice of the tokens each."""


@torch.compiler.disable
def end_pass(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the base model: the pass is over."""
    one = kwargs.get(PASS)
    if isinstance(one, Pass) and one._traces:
        _wait(module)
        for trace in one._traces:
            trace.finish(one, time.perf_counter() - one._started)


@torch.compiler.disable
def route(
    attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an attention module: decide for its heads, from its input."""
    state: LayerState = getattr(attention, STATE)
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    one = kwargs.get(PASS)
    changed = None
    if not isinstance(one, Pass):  # called by itself, not by its model
        one = _pass_of(kwargs)
        one._begin(torch.is_grad_enabled())
        changed = args, {**kwargs, PASS: one}
    if one._gradients and not torch.is_grad_enabled():
        raise ValueError(
            "use_reentrant must be False: reentrant gradient checkpointing gives routers wrong "
            'gradients. Enable checkpointing with {"use_reentrant": False}, or with no arguments '
            "of its own."
        )
    one._plans[state.index] = _route(attention, state, one, hidden, kwargs)
    return changed


def _route(
    attention: nn.Module, state: LayerState, one: Pass, hidden: Tensor, kwargs: Mapping[str, Any]
) -> _Planned:
    cache, layer, past, keys = kwargs.get(CACHE), None, 0, hidden.shape[1]
    if cache is not None:
        index = int(attention.layer_idx)  # type: ignore[arg-type]
        layer = elastic_layer(cache, index)
        past, keys = layer.columns, int(cache.get_mask_sizes(keys, index)[0])
    if one._past is None:
        one._past = past
    elif one._past != past:
        raise ElasticoreError(
            f"the cache holds {one._past} tokens in some layers and {past} in layer "
            f"{attention.layer_idx}: a pass failed midway; prefill the prompt again."
        )
    batch, queries = hidden.shape[:2]
    seen = past + queries
    layout = one._layout(
        hidden.device,
        cache is not None,
        bool(state.local_layers),
        attention_mask=kwargs.get("attention_mask"),
        position_ids=kwargs.get("position_ids"),
        cu_queries=kwargs.get("cu_seq_lens_q"),
        cu_keys=kwargs.get("cu_seq_lens_k"),
        batch=batch,
        queries=queries,
        seen=seen,
    )
    router: nn.Module = getattr(attention, ROUTER)
    boundary = getattr(router, "boundary", None)

    def project(tokens: Tensor) -> Tensor:
        return state.family.project(attention, tokens)

    if layer is None:
        recomputing = state.index in one._routings
        prompt = one._prompt_of(layout, queries)
        if state.parallel is not None:
            whole = state.parallel.to_heads(project(hidden).transpose(1, 2)).transpose(1, 2)
            ends = _ends(boundary, whole, layout, prompt, lambda keys: keys, spare=False)
        elif boundary == 0:
            ends = None
        else:
            ends = _ends(boundary, hidden, layout, prompt, project, spare=False)
        routing = _decide(attention, router, ends, layout, hidden)
        if not recomputing:
            one._routings[state.index] = routing
        plan = state.way.plan_of(routing)
        return _Planned(plan, layout, routing.decisions, True, keys, seen, routing.mix, recomputing)

    memory = _memory(layer, state, past)
    _check_rows(memory, layout)
    decided: Routing | None = None
    if memory.decisions is None or one._reads_prompt(queries):
        ends = memory.ends
        if boundary != 0:
            memory.settle(project)
            prompt = one._prompt_of(layout, queries)
            if past and memory.decisions is None:  # a cut took the decision: all there is decides
                prompt = layout.length
            own = _ends(boundary, hidden, layout, prompt, project)
            ends = own if memory.ends is None else memory.ends + own
        if memory.decisions is None or not memory.generated or state.way.turn == "renew":
            decided = _decide(attention, router, ends, layout, hidden)
            one._routings[state.index] = decided
            memory.decisions, memory.plans = decided.decisions, {}
            memory.generated, memory.prompt = False, past + one._prompt_columns(queries)
        if ends is not None:
            rest = layout.length - prompt

            def beyond(position: Tensor) -> Tensor:
                return layout.columns(prompt[:, None] + position)

            if one._leaves_out(queries):  # drafts, or an answer: no prompt, but the text goes on
                ends = ends + Ends.of(boundary, hidden, beyond, layout.row, rest, project)
            memory.ends = ends.rows(Tensor.detach)
    else:
        memory.generated = True
        if boundary != 0:
            own_valid = None if layout.valid is None else layout.valid[:, past:seen]
            memory.put_off(hidden, own_valid, lambda: memory.settle(project))
    memory.columns, memory.valid = seen, layout.valid
    assert memory.decisions is not None
    if decided is not None and past == 0:
        plan = state.way.plan_of(decided)
    else:
        plan = _continue(memory, state.way, queries)
    mix = None if decided is None else decided.mix
    return _Planned(plan, layout, memory.decisions, decided is not None, keys, seen, mix, False)


def _ends(
    boundary: int | None,
    tokens: Tensor,
    layout: PassLayout,
    prompt: Tensor,
    project: Any,
    *,
    spare: bool = True,
) -> Ends:
    return Ends.of(boundary, tokens, layout.columns, layout.row, prompt, project, spare=spare)


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


def _memory(layer: ElasticCacheLayer, state: LayerState, past: int) -> Memory:
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
    return memory


def _check_rows(memory: Memory, layout: PassLayout) -> None:
    if memory.decisions is not None and memory.decisions.shape[0] != layout.row.numel():
        raise ElasticoreError(
            f"the cache was prefilled with {memory.decisions.shape[0]} sequences but now serves "
            f"{layout.row.numel()}; prefill the prompts in the batch that is generated."
        )


def _continue(memory: Memory, way: Elastic, queries: int) -> HeadPlan:
    """The plan of a pass on top of a cache: decoding, a later chunk or a further turn."""
    short = queries < way.block_size
    assert memory.decisions is not None
    if short not in memory.plans:
        memory.plans[short] = way.plan(memory.decisions, short=short)
    return memory.plans[short]


def attend(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None, one: Pass
) -> Tensor:
    """All heads of a layer in one attention call, as ``route`` has decided.

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
    planned = one._plans.pop(state.index)
    if k.shape[2] != planned.keys:
        raise ElasticoreError(
            f"layer {attention.layer_idx} attends to {k.shape[2]} keys, where {planned.keys} were "
            f"expected from {q.shape[2]} queries and the cache: this transformers hands its cache "
            "on in a way that elasticore does not know; run `elasticore doctor`."
        )
    if planned.seen < planned.keys:  # a preallocated cache: what is not filled yet
        k, v = k[:, :, : planned.seen], v[:, :, : planned.seen]
    if state.parallel is not None:
        q, k, v = (state.parallel.to_heads(x) for x in (q, k, v))

    layout = planned.layout

    def run(plan: HeadPlan, decisions: Tensor) -> Tensor:
        out = layout.attend(functools.partial(_call, one, state, planned, plan, scale), q, k, v)
        if layout.ends is None or torch.is_grad_enabled():  # while training nobody goes on writing
            return out
        short = functools.partial(_call, one, state, None, state.way.plan(decisions, short=True))
        return layout.attend_ends(functools.partial(short, scale), q, k, v, out)

    if planned.mix is None:
        out = run(planned.plan, planned.decisions)
    else:
        alike = [torch.full_like(planned.decisions, decision) for decision in (0, 1)]
        first, second = (run(state.way.plan(decisions), decisions) for decisions in alike)
        weight = planned.mix.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1])
        out = torch.lerp(first, second, weight[:, None, None])
    return out if state.parallel is None else state.parallel.to_tokens(out)


def _call(
    one: Pass,
    state: LayerState,
    recorded: _Planned | None,
    plan: HeadPlan,
    scale: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
) -> Tensor:
    if one._traces and recorded is not None and not recorded.recomputing:
        _record(one, state, recorded, q, k, v, plan, layout, scale)
    return hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale, backend=one.backend)


def _record(
    one: Pass,
    state: LayerState,
    planned: _Planned,
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
        for trace in one._traces:
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


def _pass_of(kwargs: Mapping[str, Any]) -> Pass:
    """The pass that was given, or a new one; with the logits that are asked for."""
    one = kwargs.get(PASS)
    if one is None:
        one = Pass()
    elif not isinstance(one, Pass):
        raise TypeError(f"{PASS} must be an elasticore.Pass, got {one!r}.")
    kept = kwargs.get("logits_to_keep")
    if isinstance(kept, int):
        one._kept = kept
    return one


def _check_packed(layout: PassLayout, position_ids: Tensor | None, has_cache: bool) -> None:
    """Raise unless a model's own sliding-window layers tell the packed sequences apart as well."""
    assert layout.layout.cu_queries is not None
    lengths: Sequence[int] | None = (
        None if position_ids is None else packed_lengths(position_ids).tolist()
    )
    if has_cache or lengths != layout.layout.cu_queries.tolist():
        raise ValueError(
            "position_ids must start over at every packed sequence, and use_cache be False: this "
            "model's own sliding-window layers know packed sequences by nothing else."
        )


def _wait(module: nn.Module) -> None:
    """Let the device finish, so that a recorded time is that of the work."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
