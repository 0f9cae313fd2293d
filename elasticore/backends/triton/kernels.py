"""Which kernel runs a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from elasticore.backends.triton import decode, gradients, portable, snapshot
from elasticore.backends.triton.arguments import DECODE_ROWS
from elasticore.layout import Segments
from elasticore.patterns import BlockLists

try:
    from elasticore.backends.triton import hopper
except (ImportError, AttributeError) as error:  # Gluon is experimental: its names still move
    hopper = None  # type: ignore[assignment]
    HOPPER_MISSING = f"{type(error).__name__}: {error}"
else:
    HOPPER_MISSING = ""

__all__ = ["HOPPER_MISSING", "KERNELS", "TRAINING", "attention", "choose", "choose_training"]

DECODE_QUERIES = 16
"""Queries of a sequence up to which the decode kernel runs a call."""
KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "decode": decode.attention,
    "portable": portable.attention,
}
"""The kernels by name; all take the same arguments."""
if hopper is not None:
    KERNELS["hopper"] = hopper.attention


class TrainingKernels(NamedTuple):
    """What training runs beside :func:`attention`; by field, all take the same arguments."""

    reads: Callable[[Tensor], bool]
    """Whether the gradients' kernels can read an incoming gradient where it lies."""

    snapshot: Callable[..., tuple[Tensor, Tensor | None, Tensor]]
    """Both modes forward: see :func:`elasticore.backends.triton.snapshot.attention`."""
    query_gradient: Callable[..., Tensor]
    """See :func:`elasticore.backends.triton.gradients.query_gradient`."""
    key_value_gradients: Callable[..., tuple[Tensor | None, Tensor | None]]
    """See :func:`elasticore.backends.triton.gradients.key_value_gradients`."""


TRAINING = {
    "portable": TrainingKernels(
        lambda grad: grad.stride(3) == 1,
        snapshot.attention,
        gradients.query_gradient,
        gradients.key_value_gradients,
    ),
}
"""The training kernels by name."""
if hopper is not None:
    TRAINING["hopper"] = TrainingKernels(
        hopper.copyable,
        hopper.snapshot_attention,
        hopper.query_gradient,
        hopper.key_value_gradients,
    )


def choose(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int, sequences: int
) -> str:
    """The name of the kernel that runs a call, by shapes, strides and device alone."""
    batch, heads, queries, _ = q.shape
    rows = queries * heads // k.shape[1]
    # In a packed batch the queries are those of all sequences together: few of them say little.
    if sequences == batch and queries <= DECODE_QUERIES and rows <= DECODE_ROWS:
        return "decode"
    if hopper is not None and hopper.supports(q, k, v, scale=scale, block_size=block_size):
        return "hopper"
    return "portable"


def choose_training(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int
) -> TrainingKernels:
    """The training kernels of a call, by shapes, strides and device alone.

    A forward that gradient checkpointing runs again must get the same ones again.
    """
    if hopper is not None and hopper.supports(q, k, v, scale=scale, block_size=block_size):
        return TRAINING["hopper"]
    return TRAINING["portable"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Tensor,
    segments: Segments | None,
    lists: BlockLists | None,
    *,
    scale: float,
    sink: int,
    local: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Run every head in its mode; see :func:`elasticore.backends.triton.portable.attention`."""
    name = choose(q, k, v, scale=scale, block_size=block_size, sequences=modes.shape[0])
    return KERNELS[name](
        q,
        k,
        v,
        modes,
        segments,
        lists,
        scale=scale,
        sink=sink,
        local=local,
        block_size=block_size,
    )
