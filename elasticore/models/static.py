"""Published static patterns, DuoAttention's and PruLong's, as routers that a model can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elasticore.models.config import ElasticConfig
from elasticore.models.elastic import elasticize, restore
from elasticore.models.files import save_router
from elasticore.models.state import STATE
from elasticore.router.gates import sparse_table
from elasticore.router.policies import fixed_policies
from elasticore.router.tables import read_head_table

__all__ = ["PatternConversion", "apply_pattern", "convert_pattern"]

_BLOCK_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True, eq=False)
class PatternConversion:
    """What :func:`convert_pattern` did.

    Attributes
    ----------
    path
        The router directory.
    config
        Our settings.
    sparse
        bool ``[layers, kv_heads]``: which heads stream.
    """

    path: Path
    config: ElasticConfig
    sparse: Tensor


def apply_pattern(
    model: Any,
    path: str | Path,
    *,
    sparsity: float | None = None,
    sink: int | None = None,
    local: int | None = None,
) -> Tensor:
    """Make a model elastic by a pattern that DuoAttention or PruLong published.

    Parameters
    ----------
    model
        The backbone; not elastic yet.
    path
        DuoAttention's directory, or a file of either (:func:`read_head_table`).
    sparsity
        Share of heads that stream, to the nearest head: those with the lowest scores. None makes
        those stream that score below one half, which is all there is to say of a mask.
    sink, local
        Tokens that a streaming head reads. None: those of DuoAttention's ``config.json``; for a
        file alone, PruLong's 128 and 1,024. The window is counted in blocks here, the query's own
        among them, so it ends up to a block earlier than a window of tokens.

    Returns
    -------
    Tensor
        bool ``[layers, kv_heads]``: which heads stream.

    Raises
    ------
    FileNotFoundError
        If there is no pattern at ``path``.
    ValueError
        If it is damaged, is not of this model's sizes, or has a sink or window that no block size
        divides.
    """
    table = read_head_table(path)
    kv_heads = model.config.num_key_value_heads
    if table.scores.shape[1] != kv_heads:
        raise ValueError(
            f"path {path} has {table.scores.shape[1]} KV heads per layer; model has {kv_heads}."
        )
    sink = next(size for size in (sink, table.sink, 128) if size is not None)
    local = next(size for size in (local, table.local, 1024) if size is not None)
    block_size = next((b for b in _BLOCK_SIZES if sink % b == 0 == local % b), None)
    if block_size is None:
        raise ValueError(
            f"sink {sink} and local {local} must be multiples of {_BLOCK_SIZES[-1]} tokens, the "
            "smallest block."
        )
    config = ElasticConfig("fa-ssa", sink=sink, local=local, block_size=block_size)
    sparse = table.scores < 0.5 if sparsity is None else sparse_table(table.scores, sparsity)
    elasticize(model, config, policies=fixed_policies(sparse))
    return sparse


def convert_pattern(
    path: str | Path,
    out: str | Path,
    model: Any,
    *,
    sparsity: float | None = None,
    sink: int | None = None,
    local: int | None = None,
) -> PatternConversion:
    """Write a pattern that DuoAttention or PruLong published as :func:`save_router` would.

    Parameters
    ----------
    path, sparsity, sink, local
        See :func:`apply_pattern`.
    out
        The router directory to write.
    model
        The backbone; not elastic, and left as it is.

    Returns
    -------
    PatternConversion
        What was written.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`apply_pattern`.
    """
    sparse = apply_pattern(model, path, sparsity=sparsity, sink=sink, local=local)
    try:
        return PatternConversion(save_router(model, out), getattr(model, STATE).config, sparse)
    finally:
        restore(model)
