"""What makes an attention call, as far as that can be said without reading the device."""

from __future__ import annotations

import math

from torch import Tensor

from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.plan import HeadPlan

__all__ = ["check_call", "check_paged"]


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
    _check_forms(q, k, v)
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
    return layout, _scale(scale, dim)


def check_paged(
    q: Tensor,
    pages: Pages,
    plan: HeadPlan,
    layout: SequenceLayout | None,
    scale: float | None,
) -> tuple[SequenceLayout, float]:
    """As :func:`check_call`, for keys and values in pages."""
    if not isinstance(q, Tensor) or q.ndim != 4 or 0 in q.shape or not q.dtype.is_floating_point:
        got = f"{q.dtype} {list(q.shape)}" if isinstance(q, Tensor) else repr(q)
        raise ValueError(
            f"q must be a float tensor [batch, heads, positions, head_dim], got {got}."
        )
    if q.shape[3] > 1 and q.stride(3) != 1:
        raise ValueError(
            f"q must be contiguous along head_dim (stride 1), got strides {q.stride()}; use "
            "q.contiguous()."
        )
    for name, value, kind in (("pages", pages, Pages), ("plan", plan, HeadPlan)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}.")
    if layout is None:
        layout = SequenceLayout.dense()
    elif not isinstance(layout, SequenceLayout):
        raise TypeError(f"layout must be a SequenceLayout or None, got {layout!r}.")
    _, kv_heads, _, dim = pages.keys.shape
    if (pages.keys.dtype, pages.keys.device) != (q.dtype, q.device):
        raise ValueError(
            f"pages hold {pages.keys.dtype} on {pages.keys.device} but q is {q.dtype} on "
            f"{q.device}; use one dtype and one device."
        )
    if q.shape[3] != dim or q.shape[1] % kv_heads:
        raise ValueError(
            f"q must have head_dim {dim} and a multiple of {kv_heads} heads, as pages have, got "
            f"{list(q.shape)}."
        )
    pages.check(q.shape[0], layout)
    decisions = plan.decisions
    if decisions.device != q.device or decisions.shape != pages.table.shape[:2]:
        raise ValueError(
            f"plan.decisions must be [sequences, kv_heads] = {list(pages.table.shape[:2])} on "
            f"{q.device}, got {list(decisions.shape)} on {decisions.device}."
        )
    return layout, _scale(scale, dim)


def _scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {scale!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    return float(scale)


def _check_forms(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless shapes, strides, dtypes and devices make a call."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}.")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: every axis of {list(tensor.shape)} must be >= 1.")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but q is {q.dtype}; use one dtype.")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}; move it there.")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(
                f"{name} must be contiguous along head_dim (stride 1), got strides "
                f"{tensor.stride()}; use {name}.contiguous()."
            )
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {list(k.shape)}, got {list(v.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and head_dim, got q {list(q.shape)} and k "
            f"{list(k.shape)}."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k; "
            "every KV head serves a whole group of query heads."
        )
