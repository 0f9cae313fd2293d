"""What an attention kernel writes to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["outputs"]


def outputs(q: Tensor, *, dense: bool) -> tuple[Tensor, Tensor]:
    """The output, with q's strides, and the LSE, float32 ``[B, Hq, Tq]``.

    If not ``dense``, some queries may belong to no sequence; no kernel writes them, so they start
    as zero and as minus infinity.
    """
    if dense:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
