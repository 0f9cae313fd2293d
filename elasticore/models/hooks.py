"""The hooks of an elastic model: a pass from its start to its end.

Four hooks and the attention function of transformers make a pass. Nothing of it stays on the model:
what they share travels in a :class:`~elasticore.Pass`, an argument that transformers hands on from
the model to every layer, through gradient checkpointing too; what belongs to a prompt lies in the
cache.

1. ``begin_pass`` before the model, and ``begin_base`` before its base model, make the pass.
2. ``route``, before each attention module, takes the layer's *input* at both ends of every
   prompt, runs the module's own key projection on it, and lets the policy decide.
3. :func:`~elasticore.models.attend.attend`, in the attention, runs all heads in one call.
4. ``end_pass``, after the base model, closes what is recorded.

They are opaque to torch.compile, as they read what a compiler would have to guard on, but for a
step of decoding on a static cache (:mod:`~elasticore.models.step`), which needs none of them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from elasticore.errors import ElasticoreError
from elasticore.models.decide import plan_layer
from elasticore.models.passes import PASS, Pass, pass_of
from elasticore.models.state import IMPLEMENTATION, PARALLEL, STATE, LayerState
from elasticore.models.step import Step, begin_step, is_step
from elasticore.models.versions import CACHE

__all__ = ["begin_base", "begin_pass", "end_pass", "route"]


def begin_pass(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a model with a head: note which tokens logits are asked for."""
    if torch.compiler.is_compiling() and is_step(args, kwargs):
        return args, kwargs
    return _begin_pass(args, kwargs)


@torch.compiler.disable
def _begin_pass(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, PASS: pass_of(kwargs)}


def begin_base(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the base model: the pass starts."""
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation != IMPLEMENTATION:
        raise ElasticoreError(
            f"attn_implementation was set to {implementation!r} on an elastic model; call "
            "elasticore.restore(model) first, and elasticize it again if you like."
        )
    if torch.compiler.is_compiling() and is_step(args, kwargs):
        return args, {**kwargs, PASS: Step(kwargs[CACHE])}
    return _begin_base(module, args, kwargs)


@torch.compiler.disable
def _begin_base(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    one = pass_of(kwargs)
    one.begin(torch.is_grad_enabled())
    parallel = getattr(module, PARALLEL, None)
    if parallel is not None:
        parallel.check(kwargs)
        if one.traces:
            raise ValueError(
                "record() sees the heads of its own process only; it cannot record a model under "
                "sequence parallelism."
            )
    if one.traces:
        _wait(module)
        one.started = time.perf_counter()
    return args, {**kwargs, PASS: one}


def end_pass(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the base model: the pass is over."""
    one = kwargs.get(PASS)
    if isinstance(one, Pass):
        _end_pass(module, one)


@torch.compiler.disable
def _end_pass(module: nn.Module, one: Pass) -> None:
    for layer, plan, valid in one.prompts:
        layer.end_prompt(plan, valid)
    if one.traces:
        _wait(module)
        for trace in one.traces:
            trace.finish(one, time.perf_counter() - one.started)


def route(
    attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an attention module: decide for its heads, from its input."""
    one = kwargs.get(PASS)
    if isinstance(one, Step):
        begin_step(attention, args, kwargs, one)
        return None
    return _route(attention, args, kwargs)


@torch.compiler.disable
def _route(
    attention: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    state: LayerState = getattr(attention, STATE)
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    one = kwargs.get(PASS)
    changed = None
    if not isinstance(one, Pass):  # called by itself, not by its model
        one = pass_of(kwargs)
        one.begin(torch.is_grad_enabled())
        changed = args, {**kwargs, PASS: one}
    if one.gradients and not torch.is_grad_enabled():
        raise ValueError(
            "use_reentrant must be False: reentrant gradient checkpointing gives routers wrong "
            'gradients. Enable checkpointing with {"use_reentrant": False}, or with no arguments '
            "of its own."
        )
    one.plans[state.index] = plan_layer(attention, state, one, hidden, kwargs)
    return changed


def _wait(module: nn.Module) -> None:
    """Let the device finish, so that a recorded time is that of the work."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
