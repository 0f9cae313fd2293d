"""The attention call: the function that users call, which checks a call once."""

from __future__ import annotations

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor

from elasticore.choice import run
from elasticore.layout import SequenceLayout
from elasticore.plan import HeadPlan

__all__ = ["check_call", "hybrid_head_attention"]


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
    q, k, v, plan
        See :meth:`HybridHeadAttention.attend <elasticore.HybridHeadAttention.attend>`.
    layout
        Where the sequences lie; None means dense.
    scale
        Factor on q·k; None means ``1 / sqrt(D)``.
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
    layout, scale = check_call(q, k, v, plan, layout, scale)
    if torch.compiler.is_compiling():
        # Here, as an operator brings in PyTorch's compiler: seconds, and whatever breaks in it.
        from elasticore.operator import traced

        return traced(q, k, v, plan, layout, scale, backend)
    return run(q, k, v, plan, layout, scale, backend)


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
        layout = SequenceLayout.dense()
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
    decisions = plan.decisions
    if decisions.device != q.device:
        raise ValueError(
            f"plan is on {decisions.device} but q is on {q.device}; build it from decisions there."
        )
    expected = (layout.sequences(batch), kv_heads)
    if decisions.shape != expected:
        raise ValueError(
            f"plan.decisions must be [sequences, kv_heads] = {list(expected)} for this call, got "
            f"{list(decisions.shape)}."
        )
    if scale is None:
        scale = 1 / math.sqrt(dim)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {scale!r}.")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    return layout, float(scale)


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
