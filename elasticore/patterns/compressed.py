"""Block scores from attention to compressed keys: what InfLLM-V2 and NSA have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore.checks import check_int
from elasticore.layout import Segments
from elasticore.patterns.rows import Rows, heaviest, key_means, lists_of, query_tiles
from elasticore.patterns.selector import BlockLists, BlockSelector

__all__ = ["CompressedSelector"]


@dataclass(frozen=True)
class CompressedSelector(BlockSelector):
    """Choose blocks of ``block`` tokens by the attention to means of ``kernel`` keys.

    1. Every ``stride`` tokens, the mean of the next ``kernel`` keys is a compressed key.
    2. Each query attends to the compressed keys that lie behind it as a whole: softmax of
       ``scale · q · k``. A query without any has no say.
    3. These weights are added up over the query heads of a KV head.
    4. A block's score for a query comes from the weights of the compressed keys that overlap it.
    5. Scores are added up over the queries of a row block.
    6. The row reads its sink blocks, its window, and the blocks of the highest scores.

    The parameters are those of the subclasses.
    """

    block: int
    top_k: int
    kernel: int
    stride: int
    sink: int
    local: int

    def __post_init__(self) -> None:
        for name in ("block", "top_k", "kernel", "stride", "local"):
            check_int(name, getattr(self, name), 1)
        check_int("sink", self.sink, 0)
        for name, value, part_name, part in (
            ("kernel", self.kernel, "stride", self.stride),
            ("block", self.block, "stride", self.stride),
            ("sink", self.sink, "block", self.block),
            ("local", self.local, "block", self.block),
        ):
            if value % part:
                raise ValueError(
                    f"{name} must be a multiple of {part_name}={part} tokens, got {value}."
                )

    def check(self, block_size: int) -> None:
        """Raise ``ValueError`` unless ``block`` is a multiple of ``block_size``."""
        if self.block % block_size:
            raise ValueError(
                f"selector block={self.block} must be a multiple of block_size={block_size}; use "
                f"block_size={self.block} or less, or another block."
            )

    @abstractmethod
    def score(self, weights: Tensor) -> Tensor:
        """The scores of blocks.

        Parameters
        ----------
        weights
            float64 ``[..., blocks, n]``: the weights of the ``n`` compressed keys that overlap a
            block, in order; 0 for those that are not there.

        Returns
        -------
        Tensor
            float64 ``[..., blocks]``.
        """

    @property
    @abstractmethod
    def count(self) -> int:
        """Blocks that a row reads, the forced ones among them."""

    def forced(self, first: Tensor, block: Tensor) -> Tensor:
        """Whether rows from position ``first`` read ``block`` (int64) in any case, if not later."""
        recent = first // self.block - self.local // self.block
        return (block > recent) | (block < self.sink // self.block)

    def select(
        self, q: Tensor, k: Tensor, segments: Segments, *, block_size: int, scale: float
    ) -> BlockLists:
        """Choose the key blocks of every row block; see :class:`BlockSelector`."""
        self.check(block_size)
        return lists_of(
            self.choose(q, k, segments, block_size, scale),
            Rows.of(segments, q.shape[2], block_size),
            heads=q.shape[1],
            keys=k.shape[2],
            block=self.block,
            block_size=block_size,
        )

    def choose(self, q: Tensor, k: Tensor, segments: Segments, rows: int, scale: float) -> Tensor:
        """The choice in blocks of ``block`` tokens, for rows of any number of queries.

        Parameters
        ----------
        q, k, segments, scale
            See :meth:`BlockSelector.select <elasticore.BlockSelector.select>`.
        rows
            Queries that choose together, counted from each sequence's start; 1: each for itself.

        Returns
        -------
        Tensor
            bool ``[sequences, Hkv, rows of queries, blocks]``.
        """
        keys = key_means(k, segments, self.kernel, self.stride)
        end = torch.arange(keys.shape[2], device=q.device) * self.stride + self.kernel - 1
        blocks = -(-k.shape[2] // self.block)
        chosen = []
        places = Rows.of(segments, q.shape[2], rows)
        for tile in query_tiles(q, k.shape[1], segments, places, rows, keys.shape[2]):
            visible = (end <= tile.position[..., None]) & tile.present[..., None]
            weights = self._weights(tile.values, keys, visible[:, None, None], scale)
            scores = self.score(self.overlapping(weights, blocks)).sum(3)
            chosen.append(self.best(scores, tile.position[:, None, :, :1]))
        return torch.cat(chosen, 2)

    def best(self, scores: Tensor, first: Tensor) -> Tensor:
        """The blocks that rows from position ``first`` (``[..., 1]``) read, by their scores."""
        block = torch.arange(scores.shape[-1], device=scores.device)
        allowed = block <= first // self.block
        return heaviest(scores, self.forced(first, block) & allowed, allowed, self.count)

    def _weights(self, q: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
        """Attention to compressed keys, summed over the group: ``[s, Hkv, rows, block_size, n]``.

        ``q`` is ``[s, Hkv, group, rows, block_size, D]`` and ``keys`` ``[s, Hkv, n, D]``.
        """
        queries = q.flatten(2, 4).double() * scale
        scores = (queries @ keys.transpose(2, 3)).unflatten(2, q.shape[2:5])
        weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
        # A query that sees none has a row of NaN.
        return torch.where(visible, weights, 0).sum(2)

    def overlapping(self, weights: Tensor, blocks: int) -> Tensor:
        """A view of ``weights`` ``[..., n]``: those of each block, ``[..., blocks, size]``."""
        step, before = self.block // self.stride, self.kernel // self.stride - 1
        size = step + before
        missing = (blocks - 1) * step + size - before - weights.shape[-1]
        return pad(weights, (before, max(missing, 0))).unfold(-1, size, step)[..., :blocks, :]
