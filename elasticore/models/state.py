"""What an elastic model remembers: per layer its tapped keys, per model the pass under way."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elasticore.attention import AttentionRequest, hybrid_head_attention
from elasticore.backends.registry import current_backend
from elasticore.backends.selection import choose_blocks
from elasticore.errors import ElasticoreError
from elasticore.layout import Segments, SequenceLayout
from elasticore.models.config import ElasticConfig
from elasticore.models.families import KeyTap
from elasticore.models.layouts import layout_of, packed_lengths
from elasticore.models.memory import recall, remember
from elasticore.models.recording import active_traces
from elasticore.models.versions import CACHE
from elasticore.plan import HeadMode, HeadPlan
from elasticore.router import Routing

if TYPE_CHECKING:
    from elasticore.models.sequence_parallel import SequenceParallel

__all__ = ["LayerState", "ModelState"]

IMPLEMENTATION = "elasticore"
"""What elastic layers are called among transformers' attention implementations."""
STATE = "_elasticore"
"""Attribute that holds a model's :class:`ModelState` and an attention module's LayerState."""
ROUTER = "attention_router"
"""Submodule of an attention module that routes its heads."""


class _Now(threading.local):
    """The pass under way, each thread's own: threads may run one model at the same time."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget the pass before, which may have failed midway."""
        self.layout: tuple[tuple[Any, ...], SequenceLayout] | None = None
        self.static_past: dict[int, int] = {}
        self.started = 0.0
        # By layer: what its hooks saw on the way to its attention.
        self.keys: dict[int, Tensor] = {}
        self.caches: dict[int, tuple[Any, int | Tensor]] = {}

    def __reduce__(self) -> tuple[type[_Now], tuple[()]]:
        return _Now, ()  # a copy of the model is in no pass


@dataclass(eq=False)
class ModelState:
    """What the layers of one elastic model share.

    Attributes
    ----------
    config
        The settings.
    original
        The model's own config object, which :func:`restore` puts back.
    reconfigured
        Modules whose ``config`` was replaced.
    snapshot
        The elastic config as it was made, to notice what a user changes in it.
    handles
        Hooks to remove.
    layers
        The elastic attention layers, in order.
    local_layers
        How many layers the model keeps inside a window of its own.
    routings
        What each elastic layer's router decided in the latest pass that routed.
    sequence_parallel
        What the model was attached to: its passes then see a slice of the tokens each.
    backend
        The context's choice in the latest pass. Gradient checkpointing recomputes with it, in
        whichever context and thread the backward pass runs.
    now
        The pass under way.
    """

    config: ElasticConfig
    original: Any
    family: KeyTap
    reconfigured: list[nn.Module] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    layers: list[LayerState] = field(default_factory=list)
    local_layers: int = 0
    routings: dict[int, Routing] = field(default_factory=dict)
    sequence_parallel: SequenceParallel | None = None
    backend: str | None = None
    now: _Now = field(default_factory=_Now)

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the base model: a new pass starts."""
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        if implementation != IMPLEMENTATION:
            raise ElasticoreError(
                f"attn_implementation was set to {implementation!r} on an elastic model; call "
                "elasticore.restore(model) first, and elasticize it again if you like."
            )
        for layer in module.modules():
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if not (
                function and getattr(layer, "gradient_checkpointing", False) and layer.training
            ):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                raise ValueError(
                    "use_reentrant must be False: reentrant gradient checkpointing gives routers "
                    'wrong gradients. Enable checkpointing with {"use_reentrant": False}, or with '
                    "no arguments of its own."
                )
        if self.sequence_parallel is not None:
            self.sequence_parallel.check(kwargs)
            if active_traces():
                raise ValueError(
                    "record() sees the heads of its own process only; it cannot record a model "
                    "under sequence parallelism."
                )
        self.routings = {}
        self.backend = current_backend()
        self.now.start()
        if active_traces():
            for trace in active_traces():
                trace.start()
            _wait(module)
            self.now.started = time.perf_counter()

    @torch.compiler.disable
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the base model: the pass is over."""
        if active_traces():
            _wait(module)
            for trace in active_traces():
                trace.finish(time.perf_counter() - self.now.started)

    def layout(self, past: int | Tensor, has_cache: bool, **arguments: Any) -> SequenceLayout:
        """The layout of this pass, computed by its first layer and shared with the others."""
        key = (past if isinstance(past, int) else None, *arguments.values())
        if self.now.layout is None or not _same(self.now.layout[0], key):
            layout = layout_of(past=past, **arguments)
            if layout.kind == "packed" and self.local_layers:
                _check_packed(layout, arguments["position_ids"], has_cache)
            self.now.layout = (key, layout)
        return self.now.layout[1]

    def past_of(self, cache: Any, layer: int) -> int | Tensor:
        """Positions in ``cache`` before this pass; a copy where the cache counts on the device."""
        past = cache.get_seq_length(layer)
        return past.clone() if isinstance(past, Tensor) else past

    def is_empty(self, cache: Any, past: int | Tensor) -> bool:
        """Whether the cache held nothing before this pass; reads a device counter once a pass."""
        if isinstance(past, int):
            return past == 0
        if id(cache) not in self.now.static_past:
            self.now.static_past[id(cache)] = int(past)
        return self.now.static_past[id(cache)] == 0


@dataclass(eq=False)
class LayerState:
    """One elastic attention layer: taps its keys, routes at the prefill, attends ever after."""

    index: int
    attention: nn.Module
    model: ModelState
    continued: tuple[Tensor, bool, HeadPlan] | None = None
    """The last plan for a filled cache, and what it was made of: one for all steps of decoding."""

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module: note the cache as it is before this pass."""
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else self.model.past_of(cache, self.layer_index)
        self.model.now.caches[self.index] = cache, past

    def tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the tapped module: keep a reference to the keys before RoPE."""
        self.model.now.keys[self.index] = output

    @property
    def layer_index(self) -> int:
        """The layer's index in the model, local layers included."""
        return int(self.attention.layer_idx)  # type: ignore[arg-type]

    @property
    def router(self) -> nn.Module:
        """The router or policy of this layer."""
        return getattr(self.attention, ROUTER)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Attend over the whole batch: under sequence parallelism, with some of the heads."""
        keys = self.model.now.keys.pop(self.index)  # popped: not ours to keep alive
        tapped = self.model.family.keys(keys, q.shape[1], k.shape[1], q.shape[3])
        parallel = self.model.sequence_parallel
        if parallel is None:
            return self._attend(q, k, v, tapped, attention_mask, scale, kwargs)
        q, k, v, heads = (parallel.to_heads(x) for x in (q, k, v, tapped.transpose(1, 2)))
        out = self._attend(q, k, v, heads.transpose(1, 2), attention_mask, scale, kwargs)
        return parallel.to_tokens(out)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tapped: Tensor,
        attention_mask: Tensor | None,
        scale: float | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Route if this is a prefill, then run all heads in one attention call."""
        batch, query_heads, queries, _ = q.shape
        cache, past = self.model.now.caches.pop(self.index)  # popped, as the keys
        recomputing = _recomputing()
        layout = self.model.layout(
            past,
            cache is not None,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            cu_queries=kwargs.get("cu_seq_lens_q"),
            cu_keys=kwargs.get("cu_seq_lens_k"),
            batch=batch,
            queries=queries,
            keys=k.shape[2],
            device=q.device,
        )
        segments = layout.segments(batch, queries, k.shape[2], q.device)
        prefill = cache is None or self.model.is_empty(cache, past)
        routing: Routing | None = None
        if prefill:
            routing = self._route(tapped, segments)
            decisions = routing.decisions
            if not recomputing:
                self.model.routings[self.index] = routing
            if cache is not None:
                remember(cache, self.index, decisions)
            plan = self._plan(routing)
        else:
            decisions = self._remembered(cache, segments)
            if layout.kind == "padded" and queries > 1:
                decisions = self._route_late(tapped, segments, decisions)
                remember(cache, self.index, decisions)
            plan = self._continue(decisions, queries)
        if active_traces() and not recomputing:
            self._record(q, k, v, plan, layout, segments, decisions, prefill, scale)
        backend = self.model.backend if recomputing else None

        def attention(plan: HeadPlan) -> Tensor:
            return hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale, backend=backend)

        if routing is None or routing.mix is None:
            return attention(plan)
        both = [self.model.config.plan(self._modes(torch.full_like(decisions, m))) for m in (0, 1)]
        weight = routing.mix.to(q.dtype).repeat_interleave(query_heads // k.shape[1])
        return torch.lerp(attention(both[0]), attention(both[1]), weight[:, None, None])

    def _route(self, keys: Tensor, segments: Segments) -> Routing:
        routing = self.router(keys, segments)
        if not isinstance(routing, Routing):
            raise TypeError(
                f"policies must return a Routing, got {type(routing).__name__} from "
                f"{type(self.router).__name__}."
            )
        return routing

    def _route_late(self, keys: Tensor, segments: Segments, decisions: Tensor) -> Tensor:
        """Decide now for the rows whose prompt begins in this chunk: those before were padding."""
        begins = (segments.key_length == segments.query_length) & (segments.query_length > 0)
        chunk = segments._replace(key_start=segments.query_start, key_length=segments.query_length)
        late = self._route(keys, chunk).decisions
        return torch.where(begins[:, None], late, decisions)

    def _plan(self, routing: Routing) -> HeadPlan:
        config = self.model.config
        if routing.gate is not None and routing.gate.requires_grad:
            return config.gated_plan(routing.gate)
        return config.plan(self._modes(routing.decisions))

    def _modes(self, decisions: Tensor) -> Tensor:
        config = self.model.config
        modes = torch.where(decisions > 0, int(config.sparse), int(config.retrieval))
        return modes.to(torch.int8)

    def _remembered(self, cache: Any, segments: Segments) -> Tensor:
        decisions = recall(cache, self.index)
        if decisions is None:
            raise ElasticoreError(
                f"{CACHE} was filled before this model was elastic, so nothing says how its "
                "heads were routed; prefill the prompt again with the elastic model."
            )
        if decisions.shape[0] != segments.row.shape[0]:
            raise ElasticoreError(
                f"{CACHE} was prefilled with {decisions.shape[0]} sequences but now serves "
                f"{segments.row.shape[0]}; prefill the prompts in the batch that is generated."
            )
        return decisions.to(segments.row.device)

    def _continue(self, decisions: Tensor, queries: int) -> HeadPlan:
        """The plan of a pass on top of a cache: decoding, a later chunk or a further turn."""
        short = queries < self.model.config.block_size
        last = self.continued  # read once: another thread may generate as well
        if last is None or not _same(last[:2], (decisions, short)):
            last = self.continued = decisions, short, self._new_plan(decisions, short)
        return last[2]

    def _new_plan(self, decisions: Tensor, short: bool) -> HeadPlan:
        config = self.model.config
        modes = self._modes(decisions)
        if short:
            if config.decode == "full":
                modes = torch.zeros_like(modes)
            else:
                # No selector can score a fraction of a row block.
                modes = modes.masked_fill(modes == int(HeadMode.SELECTED), int(HeadMode.FULL))
            return config.plan_without_selector(modes)
        return config.plan(modes)

    def _record(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        layout: SequenceLayout,
        segments: Segments,
        decisions: Tensor,
        prefill: bool,
        scale: float | None,
    ) -> None:
        request = AttentionRequest.of(q, k, v, plan, layout)  # with the gradients it asks for
        with torch.no_grad():
            selection = None
            if plan.selector is not None and bool((plan.modes == int(HeadMode.SELECTED)).any()):
                scale = q.shape[3] ** -0.5 if scale is None else scale
                selection = choose_blocks(q, k, plan, layout, scale, every=False)
            for trace in active_traces():
                trace.add(self, plan, segments, selection, decisions, prefill, request)


def _check_packed(layout: SequenceLayout, position_ids: Tensor | None, has_cache: bool) -> None:
    """Raise unless a model's own sliding-window layers tell the packed sequences apart as well."""
    assert layout.cu_queries is not None
    lengths = None if position_ids is None else packed_lengths(position_ids).tolist()
    if has_cache or lengths != layout.cu_queries.tolist():
        raise ValueError(
            "position_ids must start over at every packed sequence, and use_cache be False: this "
            "model's own sliding-window layers know packed sequences by nothing else."
        )


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Equal values, and tensors that are the same objects."""
    return all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def _recomputing() -> bool:
    """Whether gradient checkpointing runs this forward again, inside the backward pass."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def _wait(module: nn.Module) -> None:
    """Let the device finish, so that a recorded time is that of the work."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
