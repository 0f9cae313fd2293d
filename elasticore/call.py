"""The attention call: the function that users call, which checks and runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticore.choice import run, run_paged
from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.plan import HeadPlan
from elasticore.preconditions import check_call, check_paged

__all__ = ["hybrid_head_attention", "paged_attention"]


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


@torch.no_grad()
def paged_attention(
    q: Tensor,
    pages: Pages,
    plan: HeadPlan,
    *,
    layout: SequenceLayout | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over keys and values in pages, each head in its mode; without gradients.

    Parameters
    ----------
    q
        ``[B, Hq, Tq, D]``: the last positions of each sequence, whose keys are in the pages.
    pages
        Where keys and values are.
    plan
        What every head reads: everything, or a sink and a window.
    layout
        Of the queries: None for a row per sequence, or a packed one.
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
        If an argument is wrong.
    UnsupportedRequest
        If the backend cannot do this call, or none can.

    Examples
    --------
    >>> import torch, elasticore
    >>> pool = torch.randn(4, 16, 2 * 64)  # 4 pages of 16 tokens, keys beside values
    >>> keys, values = pool[:, None].expand(-1, 2, -1, -1).chunk(2, -1)
    >>> table = torch.tensor([[[2, 0], [3, 1]]], dtype=torch.int32)  # two heads, two pages each
    >>> pages = elasticore.Pages(keys, values, table, torch.tensor([20]))
    >>> plan = elasticore.HeadPlan(torch.tensor([[0, 0]], dtype=torch.int8))
    >>> elasticore.paged_attention(torch.randn(1, 8, 1, 64), pages, plan).shape
    torch.Size([1, 8, 1, 64])
    """
    if torch.compiler.is_compiling():
        from elasticore.operator import traced_paged

        return traced_paged(q, pages, plan, *check_paged(q, pages, plan, layout, scale), backend)
    return run_paged(q, pages, plan, layout, scale, backend)
