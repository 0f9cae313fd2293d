"""InfLLM-V2: sinks, a window, and the blocks that compressed keys score highest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from elasticore.checks import check_int
from elasticore.patterns.compressed import CompressedSelector

__all__ = ["InfLLMV2"]


@dataclass(frozen=True)
class InfLLMV2(CompressedSelector):
    """A block counts as much as the heaviest compressed key that overlaps it.

    The steps are those of :class:`CompressedSelector
    <elasticore.patterns.compressed.CompressedSelector>`. The query heads of a KV head read the same
    blocks. Row blocks that begin below ``dense`` tokens read everything.

    Parameters
    ----------
    block
        Tokens of a key block: a multiple of the plan's block size.
    top_k
        Blocks besides the window, the sink among them.
    kernel, stride
        Tokens of a compressed key, and from one to the next.
    sink, local
        Tokens at the start, and of the window that ends with the row's own block, that every row
        reads; multiples of ``block``.
    dense
        Tokens up to which attention is full.

    Notes
    -----
    Zhao et al. 2025 (InfLLM-V2, arXiv 2509.24663), with the sizes of the Elastic Attention paper's
    Table 6. Two things differ. There every *query* chooses; here the queries of a row block add up
    their scores, so a smaller plan block size makes the rows finer. There a whole sequence is full
    or sparse by its length; here the early rows are full, so that chunks choose what the whole
    does. Sequences up to ``dense`` are the same. The method has no weights of its own; the backbone
    is trained with it. Memory: about 0.5 GB of scores at a time, and a few times the lists.
    """

    block: int = 64
    top_k: int = 64
    kernel: int = 32
    stride: int = 16
    sink: int = 64
    local: int = 2048
    dense: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("dense", self.dense, 0)

    def score(self, weights: Tensor) -> Tensor:
        """The heaviest of the overlapping ones."""
        return weights.amax(-1)

    def forced(self, first: Tensor, block: Tensor) -> Tensor:
        """Sink and window, and everything below ``dense`` tokens."""
        return super().forced(first, block) | (first < self.dense)

    @property
    def count(self) -> int:
        """Blocks that a row reads, the forced ones among them."""
        return self.top_k + self.local // self.block
