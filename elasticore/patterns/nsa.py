"""The selected branch of NSA: the blocks that compressed attention weighs most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elasticore.patterns.compressed import CompressedSelector

__all__ = ["NSASelected"]


@dataclass(frozen=True)
class NSASelected(CompressedSelector):
    """A block counts as much as all compressed keys that overlap it, each by what they share.

    The steps are those of :class:`CompressedSelector
    <elasticore.patterns.compressed.CompressedSelector>`. A compressed key counts once for every
    stride of tokens that it shares with the block. The query heads of a KV head read the same
    blocks.

    Parameters
    ----------
    block
        Tokens of a key block: a multiple of the plan's block size.
    top_k
        Blocks that a row reads, sink and window among them.
    kernel, stride
        Tokens of a compressed key, and from one to the next.
    sink, local
        Tokens at the start, and of the window that ends with the row's own block, that every row
        reads; multiples of ``block``.

    Notes
    -----
    Yuan et al. 2025 (Native Sparse Attention, arXiv 2502.11089, Eqs. 8 to 12), with the sizes of
    the Elastic Attention paper's Table 6 and one sink and two local blocks as there. This is one of
    the method's three branches, without the learned ones: keys are compressed by their mean, as a
    selector does not know its layer, and the queries of a row block choose together where there
    every *query* does. The whole method is
    :class:`~elasticore.eval.baselines.NativeSparseAttention`.
    Memory: about 0.5 GB of scores at a time, and a few times the lists.
    """

    block: int = 64
    top_k: int = 128
    kernel: int = 32
    stride: int = 16
    sink: int = 64
    local: int = 128

    def score(self, weights: Tensor) -> Tensor:
        """The sum, each weight times the strides that its compressed key shares with the block."""
        place = torch.arange(weights.shape[-1], device=weights.device)
        inside, parts = self.block // self.stride, self.kernel // self.stride
        shared = torch.minimum(place + 1, place.flip(0) + 1).clamp(max=min(inside, parts))
        return weights @ shared.to(weights.dtype)

    @property
    def count(self) -> int:
        """Blocks that a row reads, the forced ones among them."""
        return self.top_k
