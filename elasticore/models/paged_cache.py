"""A cache layer whose streaming heads have given their memory back: keys and values in pages.

Once a prompt is routed for good, a streaming head will read its sink and its window and nothing
else. Its keys and values then move into pages that go round: block ``j`` of the text lies where
block ``j - ring`` lay, which no query reads any more. So a table that is written once says where
everything is and will be, and only lengths change from step to step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from elasticore.errors import ElasticoreError
from elasticore.pages import Pages
from elasticore.patterns import HeadMode

__all__ = ["SPARE", "PagedLayer"]

SPARE = 1
"""Blocks behind the window that a streaming head keeps, so that tokens can be taken off the end."""
STEP = 1024
"""Tokens by which the pages of full heads grow at the most, of an eighth of what they hold."""
NOWHERE = 0
"""The page that tokens go to which are padding."""


class PagedLayer(CacheLayerMixin):
    """Keys and values by (row, KV head): all of full heads, sink and window of streaming ones.

    Attributes
    ----------
    pool
        ``[pages, page_size, 2 * D]``, keys beside values.
    table
        int32 ``[rows, kv_heads, blocks]``: see :class:`elasticore.Pages`.
    lengths
        int64 ``[rows]``: valid tokens.
    room
        Positions that there is room for, once and for all; None: pages grow.
    columns
        Positions held, padding among them; with ``room`` counted on the device.
    streams
        Per row and head, whether it streams.
    own
        bool ``[rows, T]``: what is no padding in the next ``update``; None: all.
    """

    is_croppable = True

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        modes: Tensor,
        valid: Tensor | None,
        *,
        sink: int,
        local: int,
        page_size: int,
        room: int = -1,
    ) -> None:
        """Take over what a dense layer holds.

        Parameters
        ----------
        keys, values
            ``[rows, kv_heads, columns, D]``.
        modes
            int8 ``[rows, kv_heads]`` of :class:`HeadMode` values, FULL or STREAMING; read here, for
            which the device is waited for once.
        valid
            bool ``[rows, columns]``: what is no padding; None: all.
        sink, local
            What streaming heads read, in blocks.
        page_size
            Tokens of a block.
        room
            Positions that there shall be room for; -1: pages grow.
        """
        super().__init__()
        rows, _, columns, self.dim = keys.shape
        self.room = None if room < 0 else room
        self.dtype, self.device = keys.dtype, keys.device
        self.sink, self.local, self.page_size = sink, local, page_size
        self.ring, self.below = local + SPARE, 0
        self.own: Tensor | None = None
        self.is_initialized = True
        self.streams = (modes == int(HeadMode.STREAMING)).tolist()
        self.is_compileable = self.room is not None
        self.columns: int | Tensor = columns
        if self.room is not None:
            self.columns = torch.tensor(columns, device=self.device)
        self.lengths = torch.full((rows,), columns, device=self.device)
        if valid is not None:
            self.lengths = valid.sum(1)
            order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
            keys, values = (x.gather(2, order.expand_as(x)) for x in (keys, values))
        blocks = -(-columns // page_size)
        short = blocks * page_size - columns
        old = [pad(x, (0, 0, 0, short)).unflatten(2, (blocks, page_size)) for x in (keys, values)]
        self._arrange(columns)
        kept = self._kept(blocks, self.ring)
        place = self.table[:, :, :blocks][kept].long()
        self.pool[place, :, : self.dim] = old[0][kept]
        self.pool[place, :, self.dim :] = old[1][kept]

    def _arrange(self, tokens: int) -> None:
        """New pages for so many tokens of each row and some more, with nothing in them."""
        blocks = -(-(tokens + min(STEP, tokens // 8)) // self.page_size) + 1
        if self.room is not None:
            blocks = -(-self.room // self.page_size)
        block, page = torch.arange(blocks), 1 + NOWHERE
        turning = torch.where(block < self.sink, block, self.sink + (block - self.sink) % self.ring)
        streaming = min(blocks, self.sink + self.ring)
        table = torch.empty(len(self.streams), len(self.streams[0]), blocks, dtype=torch.int32)
        for row, heads in enumerate(self.streams):
            for head, streams in enumerate(heads):
                table[row, head] = page + (turning if streams else block)
                page += streaming if streams else blocks
        self.table = table.to(self.device)
        self.pool = torch.zeros(
            page, self.page_size, 2 * self.dim, dtype=self.dtype, device=self.device
        )

    def _kept(self, blocks: int, ring: int) -> Tensor:
        """Which of the first ``blocks`` blocks each head has, bool ``[rows, kv_heads, blocks]``."""
        block = torch.arange(blocks, device=self.device)
        last = ((self.lengths - 1) // self.page_size)[:, None, None]
        streams = torch.tensor(self.streams, device=self.device)[:, :, None]
        near = (block < self.sink) | (block > last - ring)
        return (block <= last) & (~streams | near)

    def _rearrange(
        self, tokens: int = 0, ring: int | None = None, rows: list[int] | None = None
    ) -> None:
        """Move everything to new pages, with room for ``tokens`` more.

        Parameters
        ----------
        ring
            Blocks that go round; None: as many as before.
        rows
            What to take; None: all rows.
        """
        pool, table, held, streams = self.pool, self.table, self.ring, self.streams
        self.ring = held if ring is None else ring
        if rows is not None:
            index = torch.tensor(rows, device=self.device)
            self.streams = [self.streams[row] for row in rows]
            self.lengths, table = self.lengths[index], table[index]
        columns = int(self.columns)
        # Rows that are routed as those in their places were, as beams are, find room there.
        if rows is None or self.streams != streams:
            self._arrange(columns + tokens)
        blocks = -(-columns // self.page_size)
        kept = self._kept(blocks, min(self.ring, held))
        self.pool[self.table[:, :, :blocks][kept].long()] = pool[table[:, :, :blocks][kept].long()]

    @property
    def pages(self) -> Pages:
        """Where all keys and values are."""
        kv_heads = len(self.streams[0])
        keys, values = self.pool[:, None].expand(-1, kv_heads, -1, -1).chunk(2, -1)
        return Pages(keys, values, self.table, self.lengths)

    def nbytes(self) -> int:
        """Bytes of all that is held, as allocated."""
        return sum(x.nbytes for x in (self.pool, self.table, self.lengths))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it is made of what is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values; return these alone, as all others are in pages."""
        tokens = key_states.shape[2]
        ring = self.local + SPARE + -(-(tokens - 1) // self.page_size)
        full = self.room is None and self.columns + tokens > self.table.shape[2] * self.page_size
        if full or ring > self.ring or (tokens == 1 and ring < self.ring):
            # A pass of several blocks needs the window of its first query and its own keys.
            self._rearrange(tokens, max(ring, self.ring) if tokens > 1 else ring)
        own, self.own = self.own, None
        step = torch.arange(tokens, device=self.device)
        position = self.lengths[:, None] + (step if own is None else own.cumsum(1) - 1)
        heads = self.table.shape[1]
        block = (position.clamp(min=0) // self.page_size)[:, None].expand(-1, heads, -1)
        page = self.table.gather(2, block).long()
        if own is not None:
            page = torch.where(own[:, None], page, NOWHERE)
        slot = (position.clamp(min=0) % self.page_size)[:, None].expand(-1, heads, -1)
        self.pool[page, slot] = torch.cat((key_states, value_states), -1).to(self.dtype)
        if self.room is None:
            self.lengths = self.lengths + (tokens if own is None else own.sum(1))
        else:  # where a graph finds it
            self.lengths.add_(tokens if own is None else own.sum(1))
        self.columns += tokens  # in place on the device
        self.below = max(self.below - tokens, 0)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the positions, as if all were there."""
        if self.room is not None:
            return self.room, 0
        return int(self.columns) + query_length, 0

    def get_seq_length(self) -> Any:
        """Positions held: an int, or a tensor on the device."""
        return self.columns

    def get_max_length(self) -> int:
        """Positions that there is room for; -1 if there is no limit."""
        return -1 if self.room is None else self.room

    def stay(self) -> None:
        """Tell ``torch.compile`` that all tensors stay where they are, for CUDA graphs."""
        for tensor in (self.pool, self.table, self.lengths, self.columns):
            torch._dynamo.mark_static_address(tensor)

    def cut(self, columns: int, gone: Tensor | int) -> None:
        """Take positions off the end.

        Parameters
        ----------
        columns
            How many.
        gone
            Of each row, how many of these are no padding.

        Raises
        ------
        ElasticoreError
            If streaming heads do not have any more what they would read then.
        """
        spare = (self.ring - self.local) * self.page_size
        if self.below + columns > spare:
            raise ElasticoreError(
                f"the cache cannot be cropped by {self.below + columns} tokens: its streaming "
                f"heads have kept {spare} behind their window. Attend with cache='dense' to crop "
                "further, or prefill the text again."
            )
        self.below += columns
        self.columns -= columns
        if self.room is None:
            self.lengths = self.lengths - gone
        else:
            self.lengths.sub_(gone)

    def offload(self) -> None:
        """Move everything to the CPU."""
        self.pool, self.table, self.lengths = (
            x.to("cpu", non_blocking=True) for x in (self.pool, self.table, self.lengths)
        )

    def prefetch(self) -> None:
        """Move it back."""
        self.pool, self.table, self.lengths = (
            x.to(self.device, non_blocking=True) for x in (self.pool, self.table, self.lengths)
        )

    def select(self, rows: list[int]) -> None:
        """Replace the rows by the ones of these numbers."""
        self._rearrange(rows=rows)
