"""The attention interface that every backend implements, and the function that users call."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from elasticore.errors import UnsupportedRequest
from elasticore.layout import SequenceLayout
from elasticore.plan import HeadMode, HeadPlan

__all__ = [
    "AttentionRequest",
    "HybridHeadAttention",
    "Verdict",
    "hybrid_head_attention",
    "straight_through",
]


class Verdict(NamedTuple):
    """Whether something can be done and, if not, why; true or false as a condition."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class AttentionRequest:
    """What one call asks of a backend, without its data; nothing in it is read from the device."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    sequences: int
    layout: Literal["dense", "padded", "packed"]
    lanes: frozenset[HeadMode]
    block_size: int
    gradients: bool

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, layout: SequenceLayout
    ) -> AttentionRequest:
        """The request that a call makes."""
        batch, heads, queries, dim = q.shape
        _, kv_heads, keys, _ = k.shape
        return cls(
            q.device,
            q.dtype,
            dim,
            heads,
            kv_heads,
            queries,
            keys,
            layout.sequences(batch),
            layout.kind,
            plan.lanes,
            plan.block_size,
            wants_gradients(q, k, v, plan),
        )


def wants_gradients(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan) -> bool:
    """Whether a call is to be differentiable in any of its arguments."""
    tensors = (q, k, v) if plan.gate is None else (q, k, v, plan.gate)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class HybridHeadAttention(ABC):
    """An engine that runs attention heads of different modes in one call.

    Subclass it, implement the three methods, register it with
    :func:`elasticore.register_backend`, and prove it with :mod:`elasticore.testing`.
    """

    name: ClassVar[str]
    lanes: ClassVar[frozenset[HeadMode]] = frozenset(HeadMode)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    @classmethod
    @abstractmethod
    def available(cls) -> Verdict:
        """Whether the engine can run on this machine, decided without importing it if missing."""

    @abstractmethod
    def supports(self, request: AttentionRequest) -> Verdict:
        """Whether this backend can do ``request``: dtype, sizes, device, lanes, gradients.

        The same answer to the same request every time, without touching a device: ``"auto"``
        remembers it, and the documentation asks about devices that are not there.
        """

    def cost(self, request: AttentionRequest) -> float | None:
        """Milliseconds that ``request`` takes here, which it supports; None if nobody knows.

        ``"auto"`` compares it with other backends' estimates. Measure it on the device that the
        request names, as the mean over several shares of sparse heads. None, which is what this
        returns, leaves the backend at its place in the default order.
        """
        return None

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        *,
        layout: SequenceLayout | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Causal attention of every head in the mode that ``plan`` gives it.

        Parameters
        ----------
        q
            ``[B, Hq, Tq, D]``, any strides with a unit last one. The queries are the last
            positions of their sequence; decoding is ``Tq = 1``.
        k, v
            ``[B, Hkv, Tk, D]``, ``Hq`` a multiple of ``Hkv``; never repeated to ``Hq`` heads.
        plan
            Modes ``[sequences, Hkv]`` and their parameters.
        layout
            Where the sequences lie; None means dense.
        scale
            Factor on q·k; None means ``1 / sqrt(D)``.

        Returns
        -------
        Tensor
            ``[B, Hq, Tq, D]`` in q's dtype; zero at queries that are padding. With
            ``plan.gate``, its gradient is that of
            ``(1 - gate) * O_retrieval + gate * O_sparse``.
        """


def hybrid_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    *,
    layout: SequenceLayout | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Check a call once and run it on the chosen backend.

    Parameters
    ----------
    q, k, v, plan, layout, scale
        See :meth:`HybridHeadAttention.attend`.
    backend
        A backend's name for this call; None means the one of :func:`elasticore.use_backend`.

    Returns
    -------
    Tensor
        ``[B, Hq, Tq, D]`` in q's dtype.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong; the message names it and says what is accepted.
    UnsupportedRequest
        If the backend cannot do this call; the message gives its reason.

    Examples
    --------
    >>> import torch, elasticore
    >>> q, k = torch.randn(1, 8, 256, 64), torch.randn(1, 2, 256, 64)
    >>> plan = elasticore.HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8))
    >>> elasticore.hybrid_head_attention(q, k, k, plan, backend="serial").shape
    torch.Size([1, 8, 256, 64])
    """
    from elasticore.backends.registry import resolve

    layout, scale = check_call(q, k, v, plan, layout, scale)
    if torch.compiler.is_compiling():
        from elasticore.operator import traced_attention

        return traced_attention(q, k, v, plan, layout, scale, backend)
    engine = resolve(backend, AttentionRequest.of(q, k, v, plan, layout))
    if not torch.is_autocast_enabled(q.device.type):
        return engine.attend(q, k, v, plan, layout=layout, scale=scale)
    # Autocast would change the dtype of the output and, through the scores, the blocks selected.
    with torch.autocast(q.device.type, enabled=False):
        return engine.attend(q, k, v, plan, layout=layout, scale=scale)


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout | None,
    scale: float | None,
) -> tuple[SequenceLayout, float]:
    """Check everything that can be checked without reading the device; fill in the defaults."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes [batch, heads, positions, head_dim], got "
                f"{list(tensor.shape)}."
            )
    if layout is None:
        layout = _DENSE
    elif not isinstance(layout, SequenceLayout):
        raise TypeError(f"layout must be a SequenceLayout or None, got {layout!r}.")
    if not isinstance(plan, HeadPlan):
        raise TypeError(f"plan must be a HeadPlan, got {type(plan).__name__}.")
    batch, _, queries, dim = q.shape
    _, kv_heads, keys, _ = k.shape
    # A compiler would trace through the cache, and say so.
    check = _check_forms if torch.compiler.is_compiling() else _check_forms_once
    check(_form(q), _form(k), _form(v))
    layout.check(batch, queries, keys, q.device)
    if plan.modes.device != q.device:
        raise ValueError(
            f"plan is on {plan.modes.device} but q is on {q.device}; build it from modes there."
        )
    expected = (layout.sequences(batch), kv_heads)
    if plan.modes.shape != expected:
        raise ValueError(
            f"plan.modes must be [sequences, kv_heads] = {list(expected)} for this call, got "
            f"{list(plan.modes.shape)}."
        )
    if scale is None:
        scale = 1 / math.sqrt(dim)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {scale!r}.")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    return layout, float(scale)


_DENSE = SequenceLayout.dense()

_Form: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""All that the host knows of a tensor."""


def _form(tensor: Tensor) -> _Form:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _check_forms(q: _Form, k: _Form, v: _Form) -> None:
    """Raise unless tensors of these forms make a call."""
    q_shape, _, q_dtype, q_device = q
    for name, (shape, strides, dtype, device) in (("q", q), ("k", k), ("v", v)):
        if not dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {dtype}.")
        if 0 in shape:
            raise ValueError(f"{name} is empty: every axis of {list(shape)} must be >= 1.")
        if dtype != q_dtype:
            raise TypeError(f"{name} is {dtype} but q is {q_dtype}; use one dtype.")
        if device != q_device:
            raise ValueError(f"{name} is on {device} but q is on {q_device}; move it there.")
        if shape[3] > 1 and strides[3] != 1:
            raise ValueError(
                f"{name} must be contiguous along head_dim (stride 1), got strides "
                f"{strides}; use {name}.contiguous()."
            )
    (k_shape, *_), (v_shape, *_) = k, v
    if k_shape != v_shape:
        raise ValueError(f"v must have the shape of k {list(k_shape)}, got {list(v_shape)}.")
    if q_shape[0] != k_shape[0] or q_shape[3] != k_shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head_dim, got q {list(q_shape)} and k "
            f"{list(k_shape)}."
        )
    if q_shape[1] % k_shape[1]:
        raise ValueError(
            f"q has {q_shape[1]} heads, which is no multiple of the {k_shape[1]} heads of k; "
            "every KV head serves a whole group of query heads."
        )


_check_forms_once = functools.lru_cache(maxsize=4096)(_check_forms)


def require(verdict: Verdict, name: str) -> None:
    """Raise ``UnsupportedRequest`` with the reason unless ``verdict`` is ok."""
    if not verdict.ok:
        raise UnsupportedRequest(f"backend {name!r} cannot do this call: {verdict.reason}")


class _StraightThrough(torch.autograd.Function):
    """The chosen branch's output, with the gate's gradient from both branches."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, chosen: Tensor, other: Tensor, member: Tensor) -> Tensor:
        ctx.save_for_backward(gate, chosen, other, member)
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, chosen, other, member = ctx.saved_tensors
        (grad,) = grads
        gate_grad = None
        if ctx.needs_input_grad[0]:
            exact = torch.promote_types(chosen.dtype, torch.float32)

            def head(h: int) -> Tensor:
                difference = other[:, h].to(exact) - chosen[:, h].to(exact)
                return (grad[:, h].to(exact) * difference).sum(-1)

            # [B, Hq, Tq], one head's D at a time: no copy of the outputs in float32 is kept.
            dot = torch.stack([head(h) for h in range(grad.shape[1])], 1)
            dot = dot.unflatten(1, (gate.shape[1], -1)).sum(2)  # [B, Hkv, Tq]
            # Padding is cut out, not multiplied by zero: it may hold anything, NaN too.
            if dot.shape[0] == member.shape[0]:
                per_sequence = torch.where(member[:, None], dot, 0).sum(-1)
            else:  # packed: one row holds every sequence
                per_sequence = member.to(exact) @ torch.where(member.any(0), dot[0], 0).T
            # other - chosen is O_sparse - O_retrieval where the gate chose retrieval.
            gate_grad = (per_sequence * (1 - 2 * gate)).to(gate.dtype)
        return gate_grad, grad, None, None


def straight_through(
    gate: Tensor, chosen: Tensor, other: Tensor, layout: SequenceLayout, keys: int
) -> Tensor:
    """``chosen``, with the gradient of ``(1 - gate) * O_retrieval + gate * O_sparse`` for the gate.

    What a backend uses that has no kernel of its own for it: run the plan, run ``plan.swapped()``
    without gradients, and join the two outputs here. The gradient of q, k and v flows through
    ``chosen`` only, which is exact as the gate is 0 or 1.

    Parameters
    ----------
    gate
        ``[sequences, kv_heads]``, exactly 0 or 1.
    chosen, other
        ``[B, Hq, Tq, D]``: the outputs of the plan and of ``plan.swapped()``.
    layout
        Where the sequences lie.
    keys
        Positions of the key axis (``Tk``).
    """
    batch, _, queries, _ = chosen.shape
    segments = layout.segments(batch, queries, keys, chosen.device)
    # Which queries belong to which sequence, [sequences, Tq]; padding belongs to none.
    step = torch.arange(queries, device=chosen.device)
    start, length = segments.query_start[:, None], segments.query_length[:, None]
    member = (step >= start) & (step < start + length)
    return _StraightThrough.apply(gate, chosen, other, member)
