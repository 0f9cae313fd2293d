"""Static policies: decisions that do not depend on the input, from a router's own call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elasticore.checks import check_int, check_number
from elasticore.layout import Segments
from elasticore.plan import HeadMode
from elasticore.router.routing import Routing

__all__ = ["AllRetrieval", "AllSparse", "FixedPolicy", "fixed_policies", "random_head_table"]


class AllRetrieval(nn.Module):
    """Every head in its retrieval mode: the backbone itself, where that mode is FULL."""

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`."""
        shape = segments.row.numel(), keys.shape[2]
        return Routing(torch.zeros(shape, dtype=torch.int8, device=keys.device))


class AllSparse(nn.Module):
    """Every head in its sparse mode, as StreamingLLM and XAttention run."""

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`."""
        shape = segments.row.numel(), keys.shape[2]
        return Routing(torch.ones(shape, dtype=torch.int8, device=keys.device))


class FixedPolicy(nn.Module):
    """One layer of a head table: the same decisions for every sequence.

    Parameters
    ----------
    decisions
        Bool or integer tensor (or nested sequence) ``[kv_heads]``: 0 = retrieval, 1 = sparse. Kept
        as an int8 buffer of the ``state_dict``.

    Raises
    ------
    TypeError, ValueError
        On another dtype, shape or value.
    """

    decisions: Tensor

    def __init__(self, decisions: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("decisions", _integers("decisions", decisions, 1, highest=1))

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`.

        Raises
        ------
        ValueError
            If the keys have another number of KV heads than the table.
        """
        if keys.shape[2] != self.decisions.numel():
            raise ValueError(
                f"keys have {keys.shape[2]} KV heads but decisions are for "
                f"{self.decisions.numel()}; give one entry per KV head, not per query head."
            )
        decisions = self.decisions.to(keys.device)
        return Routing(decisions.expand(segments.row.numel(), -1))


def fixed_policies(
    table: Tensor | Sequence[Sequence[int]], retrieval: HeadMode = HeadMode.FULL
) -> nn.ModuleList:
    """One :class:`FixedPolicy` per layer of a head table.

    Parameters
    ----------
    table
        Bool or integer tensor (or nested sequence) ``[layers, kv_heads]``. Either decisions
        (0 = retrieval, 1 = sparse), or :class:`HeadMode` values: an entry other than ``retrieval``
        is sparse.
    retrieval
        The mode that means retrieval; leave the default for a table of decisions.

    Raises
    ------
    TypeError, ValueError
        On another dtype (threshold a float table first), shape or value.
    """
    modes = _integers("table", table, 2, highest=max(HeadMode))
    return nn.ModuleList(FixedPolicy(layer != int(retrieval)) for layer in modes)


def random_head_table(layers: int, kv_heads: int, msr: float, seed: int) -> Tensor:
    """A random table with exactly ``round(msr * layers * kv_heads)`` sparse heads.

    Parameters
    ----------
    layers, kv_heads
        Sizes of the table, each at least 1.
    msr
        Ω_MSR wanted, from 0 to 1 (Eq. 4).
    seed
        Of a private generator: the same arguments give the same table.

    Returns
    -------
    Tensor
        bool ``[layers, kv_heads]`` on the CPU; True = sparse.
    """
    check_int("layers", layers, 1)
    check_int("kv_heads", kv_heads, 1)
    check_number("msr", msr, 0, 1)
    check_int("seed", seed, 0)
    heads = layers * kv_heads
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
    # round, not int: (1 - 0.9) * 10 is 0.9999999999999998 and means 1.
    return (order < round(msr * heads)).view(layers, kv_heads)


def _integers(name: str, value: object, ndim: int, highest: int) -> Tensor:
    """``value`` as an int8 copy with ``ndim`` axes and values from 0 to ``highest``."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a sequence of ints, got {value!r}.") from None
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be bool or integer, got {tensor.dtype}; threshold it first.")
    if tensor.ndim != ndim or tensor.numel() == 0:
        wanted = "[kv_heads]" if ndim == 1 else "[layers, kv_heads]"
        raise ValueError(f"{name} must be {wanted}, got shape {list(tensor.shape)}.")
    if int(tensor.min()) < 0 or int(tensor.max()) > highest:
        raise ValueError(f"{name} must hold values from 0 to {highest}, got {tensor.tolist()}.")
    return tensor.to(torch.int8, copy=True)
