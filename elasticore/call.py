"""The attention call: the function that users call, which checks and runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticore.choice import run
from elasticore.layout import SequenceLayout
from elasticore.plan import HeadPlan
from elasticore.preconditions import check_call

__all__ = ["hybrid_head_attention"]


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
    """Check a call and run it on the chosen backend.

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
    if torch.compiler.is_compiling():
        # Here, as an operator brings in PyTorch's compiler: seconds, and whatever breaks in it.
        from elasticore.operator import traced

        return traced(q, k, v, plan, *check_call(q, k, v, plan, layout, scale), backend)
    return run(q, k, v, plan, layout, scale, backend)
