"""A call as requests, which is how FlashInfer takes work.

A request is a run of query rows with keys of its own, and ``causal=True`` aligns its last row with
its last key. So a FULL head of a sequence is one request over all its keys; each row block of a
STREAMING or SELECTED head is one over the key blocks that it reads, the diagonal one last, which
makes it exactly causal without any mask.

A request's keys are a list of pages. A page is a block of tokens, and where one begins is free:
pages may lie at any token, as FlashInfer takes the stride from page to page as it is given. So
nothing of K and V is moved, whatever the layout, and what no request lists is never read. The price
is that FlashAttention-3 gathers pages token by token. Rows that lie one after the other it fetches
by TMA, a fifth faster; copying the keys of FULL heads once is little beside that.

The host decides on the requests, because FlashInfer plans on the host. The tables that grow with
the tokens are written on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns import BlockLists, HeadMode, Streaming

__all__ = [
    "TILE",
    "Places",
    "Requests",
    "HostRouting",
    "key_rows",
    "make_requests",
    "page_table",
    "query_rows",
]

TILE = 128
"""Rows of the widest tile of queries, FlashAttention-2's, or of keys."""


class HostRouting(NamedTuple):
    """What a plan and a layout say, on the host.

    Attributes
    ----------
    modes
        int64 ``[sequences, kv_heads]``.
    segments
        Where the sequences lie.
    """

    modes: Tensor
    segments: Segments

    @classmethod
    def read(cls, modes: Tensor, segments: Segments) -> HostRouting:
        """Copy it from the device, all at once."""
        together = torch.cat([modes.flatten().long(), *segments]).cpu()
        sizes = [modes.numel(), *(field.numel() for field in segments)]
        first, *rest = together.split(sizes)
        return cls(first.view(modes.shape), Segments(*rest))

    @property
    def selects(self) -> bool:
        """Whether any head is SELECTED."""
        return bool((self.modes == HeadMode.SELECTED).any())


class Requests(NamedTuple):
    """Requests on the host, int64 ``[requests]`` each.

    Attributes
    ----------
    sequence, head
        Whose rows they are; heads are KV heads, or query heads where those read different keys.
    mode
        The head's mode.
    block
        The row block of a sparse head, the last one of a FULL head, in its sequence.
    begin, queries
        The first query, counted from the sequence's first one, and how many.
    pages, tail
        How many pages, and how many tokens count of the last one.
    """

    sequence: Tensor
    head: Tensor
    mode: Tensor
    block: Tensor
    begin: Tensor
    queries: Tensor
    pages: Tensor
    tail: Tensor


class Places(NamedTuple):
    """Where K lies in memory, in elements: the strides of its batch, head and token axes."""

    row: int
    head: int
    token: int
    unit: int
    """What divides the strides, and so lies between two page numbers."""


def make_requests(
    routing: HostRouting,
    group: int,
    streaming: Streaming,
    block_size: int,
    counts: Tensor | None,
    *,
    sparse: bool,
) -> Requests:
    """Cut the FULL heads of a call into requests, or the others.

    Parameters
    ----------
    routing
        The modes and lengths.
    group
        Query heads per KV head that are requests of their own: 1 where a group's query heads share
        a request.
    streaming, block_size
        What STREAMING heads read.
    counts
        ``[sequences, Hq, row blocks]`` on the host: blocks that SELECTED heads read.
    sparse
        Whether it is about the heads that are not FULL.
    """
    segments = routing.segments
    heads = routing.modes.repeat_interleave(group, 1)
    number = heads.shape[1]
    past = segments.key_length - segments.query_length
    first, last = past // block_size, (segments.key_length - 1) // block_size
    rows = torch.where(segments.query_length > 0, last - first + 1, 0)
    number_each = rows if sparse else (rows > 0).long()
    each = (number_each[:, None] * ((heads != HeadMode.FULL) == sparse)).flatten()

    owner = torch.arange(each.numel()).repeat_interleave(each)
    sequence, head = owner // number, owner % number
    nth = torch.arange(owner.numel()) - (each.cumsum(0) - each)[owner]
    mode = heads.flatten()[owner]
    before, length = past[sequence], segments.key_length[sequence]
    if sparse:
        block = first[sequence] + nth
        start = torch.maximum(block * block_size, before)
    else:
        block, start = last[sequence], before
    stop = torch.minimum((block + 1) * block_size, length)
    pages = block + 1
    sink, local = streaming.blocks(block_size)
    pages = torch.where(mode == HeadMode.STREAMING, pages.clamp(max=sink + local), pages)
    if counts is not None:
        place = (block - first[sequence]).clamp(max=counts.shape[2] - 1)
        listed = counts[sequence, head, place].long()
        pages = torch.where(mode == HeadMode.SELECTED, listed, pages)
    return Requests(
        sequence, head, mode, block, start - before, stop - start, pages, stop - block * block_size
    )


def query_rows(
    requests: Requests, segments: Segments, queries: int, heads: int, device: torch.device
) -> Tensor:
    """The rows of all requests, one after the other: numbers in ``[batch, Tq, heads]``, flat.

    Parameters
    ----------
    requests, segments
        On the host.
    queries, heads
        ``Tq``, and heads that have requests.
    device
        Where the result is wanted.
    """
    s = requests.sequence
    first = segments.row[s] * queries + segments.query_start[s] + requests.begin
    base = (first * heads + requests.head).to(device)
    request, nth = _spread(requests.queries, device)
    return base[request] + nth * heads


def page_table(
    requests: Requests,
    segments: Segments,
    group: int,
    streaming: Streaming,
    block_size: int,
    places: Places,
    lists: BlockLists | None,
    device: torch.device,
) -> Tensor:
    """The pages of all requests, one after the other: int32, in units of ``places.unit``."""
    s = requests.sequence
    base = _first_key(requests, segments, group, places)
    past = (segments.key_length - segments.query_length)[s]
    fields = (base, requests.mode, requests.block, requests.pages, s, requests.head)
    per_request = torch.stack([*fields, requests.block - past // block_size]).to(device)
    request, nth = _spread(requests.pages, device)
    base, mode, row, pages, s, head, place = per_request[:, request]
    sink, _ = streaming.blocks(block_size)
    # A STREAMING row skips what its pages lack, from its sink to its window.
    gap = torch.where((mode == HeadMode.STREAMING) & (nth >= sink), row + 1 - pages, 0)
    block = nth + gap
    if lists is not None:
        selected = mode == HeadMode.SELECTED
        # Of other heads anything is looked up, inside the table, and dropped.
        place, column = (torch.where(selected, x, 0) for x in (place, nth))
        block = torch.where(selected, lists.indices[s, head, place, column].long(), block)
    step = block_size * places.token // places.unit
    return (base + block * step).int()


def key_rows(
    requests: Requests, segments: Segments, group: int, places: Places, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of FULL heads' requests, one after the other, each filled up to whole tiles.

    What a tile holds beyond a request's keys is multiplied by zero, so it must not be NaN.

    Returns
    -------
    tuple
        The keys, in units of ``places.unit``; which of these rows are filling; and, on the host,
        ``[requests, 2]``, how many keys and how many filling rows each request has.
    """
    length = segments.key_length[requests.sequence]
    filling = -length % TILE
    base = _first_key(requests, segments, group, places).to(device)
    request, nth = _spread(length + filling, device)
    inside = nth < length.to(device)[request]
    rows = torch.where(inside, base[request] + nth * (places.token // places.unit), 0)
    start = (length + filling).cumsum(0) - filling
    request, nth = _spread(filling, device)
    return rows, start.to(device)[request] + nth, torch.stack([length, filling], 1)


def _first_key(requests: Requests, segments: Segments, group: int, places: Places) -> Tensor:
    """Where the first key of each request's sequence and head lies."""
    s = requests.sequence
    base = segments.row[s] * places.row + requests.head // group * places.head
    return (base + segments.key_start[s] * places.token) // places.unit


def _spread(counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every item of every request: the request, and the item's number in it."""
    total = int(counts.sum())
    start = (counts.cumsum(0) - counts).to(device)
    request = torch.arange(counts.numel(), device=device).repeat_interleave(
        counts.to(device), output_size=total
    )
    return request, torch.arange(total, device=device) - start[request]
