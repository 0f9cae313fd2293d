"""What an elastic model remembers: per layer its tapped keys, per model the pass under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elasticore.attention import AttentionRequest, hybrid_head_attention
from elasticore.errors import ElasticoreError
from elasticore.layout import Segments, SequenceLayout
from elasticore.models.config import ElasticConfig
from elasticore.models.families import KeyTap
from elasticore.models.layouts import layout_of
from elasticore.models.recording import active_traces
from elasticore.plan import HeadMode, HeadPlan
from elasticore.router import Routing

__all__ = ["LayerState", "ModelState"]

STATE = "_elasticore"
"""Attribute that holds a model's :class:`ModelState` and an attention module's LayerState."""
ROUTER = "attention_router"
"""Submodule of an attention module that routes its heads."""
_ROUTINGS = "_elasticore_decisions"  # attribute of a cache: {layer: int8 [sequences, kv_heads]}


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
    handles
        Hooks to remove.
    layers
        The elastic attention layers, in order.
    local_layers
        How many layers the model keeps inside a window of its own.
    routings
        What each elastic layer's router decided in the latest pass that routed.
    """

    config: ElasticConfig
    original: Any
    family: KeyTap
    reconfigured: list[nn.Module] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    layers: list[LayerState] = field(default_factory=list)
    local_layers: int = 0
    routings: dict[int, Routing] = field(default_factory=dict)
    _layout: tuple[tuple[Any, ...], SequenceLayout] | None = None
    _static_past: dict[int, int] = field(default_factory=dict)
    _started: float = 0.0

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the base model: a new pass starts."""
        for layer in module.modules():
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if not (
                function and getattr(layer, "gradient_checkpointing", False) and layer.training
            ):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                raise ValueError(
                    "gradient_checkpointing_kwargs must have use_reentrant=False: reentrant "
                    "checkpointing gives routers wrong gradients. Call "
                    'model.gradient_checkpointing_enable({"use_reentrant": False}).'
                )
        self.routings = {}
        self._layout = None
        self._static_past = {}
        if active_traces():
            _wait(module)
            self._started = time.perf_counter()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the base model: the pass is over."""
        for layer in self.layers:
            layer.keys = None
        if active_traces():
            _wait(module)
            for trace in active_traces():
                trace.finish(time.perf_counter() - self._started)

    def layout(self, past: int | Tensor, **arguments: Any) -> SequenceLayout:
        """The layout of this pass, computed by its first layer and shared with the others."""
        key = (past if isinstance(past, int) else None, *arguments.values())
        if self._layout is None or not _same(self._layout[0], key):
            self._layout = (key, layout_of(past=past, **arguments))
        return self._layout[1]

    def past_of(self, cache: Any, layer: int) -> int | Tensor:
        """Positions in ``cache`` before this pass; a copy where the cache counts on the device."""
        past = cache.get_seq_length(layer)
        return past.clone() if isinstance(past, Tensor) else past

    def is_empty(self, cache: Any, past: int | Tensor) -> bool:
        """Whether the cache held nothing before this pass; reads a device counter once a pass."""
        if isinstance(past, int):
            return past == 0
        if id(cache) not in self._static_past:
            self._static_past[id(cache)] = int(past)
        return self._static_past[id(cache)] == 0


@dataclass(eq=False)
class LayerState:
    """One elastic attention layer: taps its keys, routes at the prefill, attends ever after."""

    index: int
    attention: nn.Module
    model: ModelState
    keys: Tensor | None = None
    cache: Any = None
    past: int | Tensor = 0

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module: note the cache as it is before this pass."""
        self.cache = kwargs.get("past_key_values")
        self.past = 0
        if self.cache is not None:
            self.past = self.model.past_of(self.cache, self.layer_index)

    def tap(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the tapped module: keep a reference to the keys before RoPE."""
        self.keys = output

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
        """Route if this is a prefill, then run all heads in one attention call."""
        batch, query_heads, queries, head_dim = q.shape
        layout = self.model.layout(
            self.past,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            cu_queries=kwargs.get("cu_seq_lens_q"),
            cu_keys=kwargs.get("cu_seq_lens_k"),
            batch=batch,
            queries=queries,
            keys=k.shape[2],
            has_cache=self.cache is not None,
            device=q.device,
        )
        segments = layout.segments(batch, queries, k.shape[2], q.device)
        prefill = self.cache is None or self.model.is_empty(self.cache, self.past)
        if prefill:
            assert self.keys is not None
            tapped = self.model.family.keys(self.keys, query_heads, k.shape[1], head_dim)
            routing = self.router(tapped, segments)
            self.model.routings[self.index] = routing
            decisions = routing.decisions
            if self.cache is not None:
                if not hasattr(self.cache, _ROUTINGS):
                    setattr(self.cache, _ROUTINGS, {})
                getattr(self.cache, _ROUTINGS)[self.index] = decisions
            plan = self._plan(routing)
        else:
            decisions = self._remembered(segments)
            plan = self._continue(decisions, queries)
        self.keys = self.cache = None  # neither is ours to keep alive
        if active_traces():
            self._record(q, k, v, plan, layout, segments, decisions, prefill, scale)
        return hybrid_head_attention(q, k, v, plan, layout=layout, scale=scale)

    def _plan(self, routing: Routing) -> HeadPlan:
        config = self.model.config
        if routing.gate is not None and routing.gate.requires_grad:
            return config.gated_plan(routing.gate)
        return config.plan(self._modes(routing.decisions))

    def _modes(self, decisions: Tensor) -> Tensor:
        config = self.model.config
        modes = torch.where(decisions > 0, int(config.sparse), int(config.retrieval))
        return modes.to(torch.int8)

    def _remembered(self, segments: Segments) -> Tensor:
        decisions = getattr(self.cache, _ROUTINGS, {}).get(self.index)
        if decisions is None:
            raise ElasticoreError(
                "past_key_values was filled before this model was elastic, so nothing says how its "
                "heads were routed; prefill the prompt again with the elastic model."
            )
        if decisions.shape[0] != segments.row.shape[0]:
            raise ElasticoreError(
                f"past_key_values was prefilled with {decisions.shape[0]} sequences but now serves "
                f"{segments.row.shape[0]}; prefill the prompts in the batch that is generated."
            )
        return decisions.to(segments.row.device)

    def _continue(self, decisions: Tensor, queries: int) -> HeadPlan:
        """The plan of a pass on top of a cache: decoding, a later chunk or a further turn."""
        config = self.model.config
        modes = self._modes(decisions)
        if queries < config.block_size:
            if config.decode == "full":
                modes = torch.zeros_like(modes)
            else:
                # No selector can score a fraction of a row block.
                modes = modes.masked_fill(modes == int(HeadMode.SELECTED), int(HeadMode.FULL))
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
        with torch.no_grad():
            selection = None
            if plan.selector is not None:
                selection = plan.selector.select(
                    q,
                    k,
                    segments,
                    block_size=plan.block_size,
                    scale=q.shape[3] ** -0.5 if scale is None else scale,
                )
            request = AttentionRequest.of(q, k, v, plan, layout)
            for trace in active_traces():
                trace.add(self, plan, segments, selection, decisions, prefill, request)


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Equal values, and tensors that are the same objects."""
    return all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def _wait(module: nn.Module) -> None:
    """Let the device finish, so that a recorded time is that of the work."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
