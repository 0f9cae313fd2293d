"""XAttention's blocks from the GPU kernels: those of the definition, wherever rounding lets it say.

Without a GPU the kernels run in Triton's interpreter, so the problems are small.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore import HeadMode, SequenceLayout, XAttention, testing
from elasticore.backends.triton import xattention
from elasticore.layout import Segments
from elasticore.patterns import BlockLists
from elasticore.testing import Case, ScatteredBlocks
from tests.plans import mixed

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.float16]  # Triton's interpreter computes bfloat16 wrongly


def draw(
    seed: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int = 32,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Random q and k ``[1, H, T, D]``, keys far enough apart for some blocks to be heavy."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, queries, heads, dim, generator=generator)
    k = 3 * torch.randn(1, keys, kv_heads, dim, generator=generator)
    return q.to(device, dtype).transpose(1, 2), k.to(device, dtype).transpose(1, 2)


def select(
    selector: XAttention,
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    layout: SequenceLayout | None = None,
    modes: Tensor | None = None,
    scale: float | None = None,
    max_keys: int | None = None,
) -> BlockLists:
    """The lists from the kernels."""
    segments = segments_of(q, k, layout)
    if modes is None:
        modes = torch.full((len(segments.row), k.shape[1]), int(HeadMode.SELECTED))
    return xattention.select(
        selector,
        q,
        k,
        modes.to(q.device, torch.int8),
        segments,
        block_size=block,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        max_queries=q.shape[2],
        max_keys=k.shape[2] if max_keys is None else max_keys,
    )


def segments_of(q: Tensor, k: Tensor, layout: SequenceLayout | None) -> Segments:
    layout = layout or SequenceLayout.dense()
    return layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)


def rows_of(lists: BlockLists, sequence: int = 0) -> list[list[list[int]]]:
    """Per head, per row block that has one: the list of blocks."""
    return [
        [row[:count] for row, count in zip(rows, counts, strict=True) if count]
        for rows, counts in zip(
            lists.indices[sequence].tolist(), lists.counts[sequence].tolist(), strict=True
        )
    ]


# --- The definition, and how far rounding may stray from it --------------------------------------


def masses(
    q: Tensor, k: Tensor, selector: XAttention, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition's masses in float64 ``[Hq, row blocks, key blocks]``, for one sequence.

    And the relative error of each row block's that float32 may cause, ``[Hq, row blocks, 1]``. An
    antidiagonal's sum of n products is off by at most n roundings of the sum of their sizes, twice
    that on tensor cores, which truncate; a weight by twice as much, itself and the sum it is
    divided by; sums of weights by a rounding for each column.
    """
    stride, keys, past = selector.stride, k.shape[1], k.shape[1] - q.shape[1]
    begin, end = past // block * block, -(-keys // block) * block
    rows = pad(q.double(), (0, 0, past - begin, end - keys))
    columns = pad(k.double(), (0, 0, 0, end - keys)).repeat_interleave(len(q) // len(k), 0)
    rows = rows.unflatten(1, (-1, stride)).flip(2).flatten(2)
    columns = columns.unflatten(1, (-1, stride)).flatten(2)
    row = torch.arange(begin, end, stride, device=q.device)[:, None]
    future = torch.arange(0, end, stride, device=q.device) > row
    votes = (row + stride > past) & (row < keys)

    scores = (rows @ columns.mT * (scale / stride)).masked_fill(future, -torch.inf)
    sizes = (rows.abs() @ columns.abs().mT * (abs(scale) / stride)).masked_fill(future, 0)
    weights = (scores.softmax(-1) * votes).unflatten(1, (-1, block // stride))
    mass = weights.sum(2).unflatten(-1, (-1, block // stride)).sum(-1)
    score_error = 2 * rows.shape[-1] * EPS * sizes.amax(-1)
    error = 2 * score_error.unflatten(1, (-1, block // stride)).amax(-1) + len(future[0]) * EPS
    return mass, error[..., None]


def check(
    lists: BlockLists,
    q: Tensor,
    k: Tensor,
    selector: XAttention,
    *,
    block: int,
    layout: SequenceLayout | None = None,
    modes: Tensor | None = None,
    scale: float | None = None,
) -> int:
    """Hold every list to the definition; return how many hold a choice among several blocks.

    A list is right if it is the forced blocks and the k heaviest others, for the smallest k that
    reaches the threshold. Every comparison gives the kernels the benefit of rounding.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    telling = 0
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(segments_of(q, k, layout), 1).tolist()
    ):
        counts = lists.counts[index]
        if q_length == 0:
            assert not counts.any()
            continue
        mass, error = masses(
            q[row, :, q_start : q_start + q_length],
            k[row, :, k_start : k_start + k_length],
            selector,
            block,
            scale,
        )
        heads, rows, blocks = mass.shape
        selected = torch.ones(heads, dtype=torch.bool, device=q.device)
        if modes is not None:
            selected = (
                (modes[index] == int(HeadMode.SELECTED)).repeat_interleave(group).to(q.device)
            )
        assert not counts[~selected].any(), "heads that are not SELECTED list nothing"
        assert not counts[:, rows:].any(), "rows behind the sequence's end list nothing"
        mass, error, counts = mass[selected], error[selected], counts[selected, :rows]
        indices = lists.indices[index, selected, :rows]
        counted = torch.arange(indices.shape[-1], device=q.device) < counts[..., None]
        ascending = indices[..., 1:] > indices[..., :-1]
        assert bool((ascending | ~counted[..., 1:]).all()), "ascending, each block once"
        assert not (counted & (indices >= blocks)).any()
        chosen = BlockLists(indices, counts).to_mask(blocks)
        column = torch.arange(blocks, device=q.device)
        diagonal = (k_length - q_length) // block + torch.arange(rows, device=q.device)[:, None]
        forced = (column == 0) | (column == diagonal)
        assert bool(chosen[:, forced].all()), "block 0 and the diagonal are in every list"
        assert not chosen[:, column > diagonal].any(), "no block lies in the future"
        others = ~forced & (column < diagonal)
        lightest = mass.masked_fill(~(chosen & others), torch.inf).amin(-1, keepdim=True)
        heaviest = mass.masked_fill(chosen | ~others, 0).amax(-1, keepdim=True)
        kept, total = (mass * chosen).sum(-1, keepdim=True), mass.sum(-1, keepdim=True)
        required = selector.threshold * total
        assert bool((heaviest * (1 - error) <= lightest * (1 + error)).all()), "heaviest first"
        assert bool((kept * (1 + error) >= required * (1 - error)).all()), "enough mass"
        if selector.threshold < 1:
            without = (kept - lightest) * (1 - error)
            assert bool((without <= required * (1 + error)).all()), "no block too many"
        telling += int(((chosen & others).any(-1) & (others & ~chosen).any(-1)).sum())
    return telling


# --- Against the definition ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "dim", "block", "stride", "threshold"),
    [
        (2, 1, 300, 300, 32, 32, 4, 0.7),  # several tiles each way
        (1, 1, 300, 556, 32, 32, 4, 0.9),  # a chunk from inside a block on
        (2, 2, 96, 224, 48, 32, 8, 0.7),  # a chunk from a block's first token on
        (1, 1, 72, 112, 32, 32, 8, 0.6),  # ... and from a whole cell on, inside a block
        (7, 1, 1, 200, 32, 16, 4, 0.5),  # decoding
        (4, 2, 20, 150, 32, 16, 16, 0.8),  # a block is one cell
        (1, 1, 33, 33, 64, 16, 16, 0.9),
        (1, 1, 1, 1, 32, 32, 8, 0.9),
        (1, 1, 257, 257, 16, 64, 64, 1.0),
    ],
)
def test_lists_are_those_of_the_definition(
    heads: int, kv_heads: int, queries: int, keys: int, dim: int, block: int, stride: int,
    threshold: float, dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    q, k = draw(0, heads, kv_heads, queries, keys, dim, dtype, device)
    selector = XAttention(stride, threshold)
    lists = select(selector, q, k, block=block)
    telling = check(lists, q, k, selector, block=block)
    if keys > 256 and threshold < 1:
        assert telling, "the data leaves nothing to choose"
    if threshold == 1:
        assert rows_of(lists)[0] == [list(range(row + 1)) for row in range(-(-keys // block))]


@pytest.mark.parametrize("layout", ["dense", "left", "right", "packed"])
@pytest.mark.parametrize("queries", ["all", "some", "one"])
def test_every_layout(layout: str, queries: str, device: str) -> None:
    """Three sequences with modes of their own, and NaN wherever there is none."""
    problem = mixed(testing.make_problem(Case(layout, 1, 32, 70, queries, "32"), device=device))
    q, k = problem.q, 3 * problem.k
    selector, modes = XAttention(8, 0.6), problem.plan.modes
    expected = select(selector, q, k, block=32, layout=problem.layout, modes=modes)
    check(expected, q, k, selector, block=32, layout=problem.layout, modes=modes)

    q, k = (pad(x, (0, 0, 0, 7), value=torch.nan) for x in (q, k))
    if layout == "packed":
        poisoned = problem.layout
    else:
        end = k.shape[2] - 8
        offset = torch.full((3,), end + 1 - problem.q.shape[2], device=device)
        first, last = torch.zeros_like(offset), torch.full_like(offset, end)
        if layout != "dense":
            assert problem.layout.first is not None
            assert problem.layout.last is not None
            first, last = problem.layout.first, problem.layout.last
        poisoned = SequenceLayout.padded(first, last, offset)
        position = torch.arange(k.shape[2], device=device)
        outside = (position < first[:, None]) | (position > last[:, None])
        k = k.masked_fill(outside[:, None, :, None], torch.nan)
        query = outside.gather(1, (offset[:, None] + torch.arange(q.shape[2], device=device))
                               .clamp(max=k.shape[2] - 1))  # fmt: skip
        q = q.masked_fill(query[:, None, :, None], torch.nan)
    ours = select(selector, q, k, block=32, layout=poisoned, modes=modes)
    for index in range(3):
        assert rows_of(ours, index) == rows_of(expected, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_goes_to_the_earlier_block(dtype: torch.dtype, device: str) -> None:
    q = torch.zeros(1, 1, 6 * 16, 32, dtype=dtype, device=device)  # every weight is the same
    (rows,) = rows_of(select(XAttention(16, 0.75), q, q, block=16))
    # Four of five are enough for 3.75, five of six for 4.5.
    assert rows[4:] == [[0, 1, 2, 4], [0, 1, 2, 3, 5]]


def test_a_threshold_of_one_keeps_what_is_lost_in_rounding(device: str) -> None:
    q, k = draw(9, 1, 1, 80, 80, device=device)
    (rows,) = rows_of(select(XAttention(16, 1.0), q, k, block=16, scale=20.0))
    assert rows == [list(range(row + 1)) for row in range(5)]


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale: float, device: str) -> None:
    q, k = draw(1, 1, 1, 100, 200, device=device)
    selector = XAttention(8, 0.7)
    lists = select(selector, q, k, block=32, scale=scale)
    assert check(lists, q, k, selector, block=32, scale=scale)


# --- The same blocks, however the call looks -----------------------------------------------------


@pytest.mark.parametrize("chunk", [32, 96])
def test_a_prefill_in_chunks_chooses_what_one_in_one_go_does(chunk: int, device: str) -> None:
    q, k = draw(2, 2, 1, 230, 230, device=device)
    selector = XAttention(8, 0.7)
    parts: list[list[list[int]]] = [[], []]
    for begin in range(0, 230, chunk):
        end = min(begin + chunk, 230)
        lists = rows_of(select(selector, q[:, :, begin:end], k[:, :, :end], block=32))
        parts = [mine + more for mine, more in zip(parts, lists, strict=True)]
    assert parts == rows_of(select(selector, q, k, block=32))


@pytest.mark.parametrize(("queries", "tails"), [(37, (6, 7)), (40, (0, 7)), (40, (3, 0))])
def test_a_packed_sequence_chooses_what_it_does_alone(
    queries: int, tails: tuple[int, int], device: str
) -> None:
    """Its neighbour and the batch's tail are NaN.

    Its first query lies inside a cell, or its last query or key inside the batch's last cell, of
    which a tensor descriptor knows nothing.
    """
    selector = XAttention(8, 0.6)
    one, other, three = (
        draw(3, 1, 1, queries, keys, dtype=torch.float16, device=device)
        for queries, keys in ((72, 72), (21, 33), (queries, 104))
    )
    # The last query, or key, weighs the most in the scores that it is part of.
    three[0][:, :, -1] *= 8
    if tails[1] == 0:
        three[1][:, :, -1] = 30 * three[0][:, :, -8]
    nothing = [torch.full_like(x, torch.nan) for x in other]
    expected = [rows_of(select(selector, q, k, block=32)) for q, k in (one, three)]
    q, k = (
        pad(torch.cat(parts, 2), (0, 0, 0, tail), value=torch.nan)
        for parts, tail in zip(zip(one, nothing, three, strict=True), tails, strict=True)
    )
    starts = [0, 72, 93, 93 + queries], [0, 72, 105, 209]
    layout = SequenceLayout.packed(*(torch.tensor(x, device=device) for x in starts))
    lists = select(selector, q, k, block=32, layout=layout, modes=torch.tensor([[2], [0], [2]]))
    assert [rows_of(lists, index) for index in range(3)] == [expected[0], [[]], expected[1]]


def test_a_padded_sequence_chooses_what_it_does_alone(device: str) -> None:
    lengths, starts, width = [72, 33, 104], [3, 50, 5], 112
    selector = XAttention(8, 0.6)
    alone = [draw(4 + i, 1, 1, n, n, dtype=torch.float16, device=device)
             for i, n in enumerate(lengths)]  # fmt: skip
    expected = [rows_of(select(selector, q, k, block=32)) for q, k in alone]
    q, k = (
        torch.cat(
            [
                pad(x, (0, 0, start, width - start - x.shape[2]), value=torch.nan)
                for x, start in zip(parts, starts, strict=True)
            ]
        )
        for parts in zip(*alone, strict=True)
    )
    first = torch.tensor(starts, device=device)
    last = first + torch.tensor(lengths, device=device) - 1
    lists = select(selector, q, k, block=32, layout=SequenceLayout.padded(first, last))
    assert [rows_of(lists, index) for index in range(3)] == expected


def test_strides_and_alignment_do_not_matter(device: str) -> None:
    q, k = draw(4, 2, 1, 130, 150, dtype=torch.float16, device=device)
    selector = XAttention(8, 0.7)
    expected = rows_of(select(selector, q, k, block=32))
    assert rows_of(select(selector, q.contiguous(), k.contiguous(), block=32)) == expected
    # Rows of 33 numbers, between others that nobody may read.
    odd = [pad(x, (1, 0), value=torch.nan)[..., 1:] for x in (q, k)]
    assert all(x.stride(-2) == 33 for x in odd)
    assert rows_of(select(selector, *odd, block=32)) == expected


def test_a_small_workspace_changes_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    q, k = draw(5, 2, 2, 300, 300, device=device)
    expected = rows_of(select(XAttention(4, 0.7), q, k, block=32))
    monkeypatch.setattr(xattention, "WORKSPACE", 1)  # a tile at a time
    assert rows_of(select(XAttention(4, 0.7), q, k, block=32)) == expected


def test_wider_bounds_change_the_lists_width_and_dtype_only(device: str) -> None:
    q, k = draw(6, 1, 1, 5, 100, device=device)
    selector = XAttention(64, 0.7)
    narrow = select(selector, q, k, block=64)
    wide = select(selector, q, k, block=64, max_keys=64 * 2**15)
    assert (narrow.indices.dtype, wide.indices.dtype) == (torch.int16, torch.int32)
    assert (narrow.indices.shape[-1], wide.indices.shape[-1]) == (2, 2**15)
    assert rows_of(wide) == rows_of(narrow)


def test_two_calls_give_the_same_lists_whatever_the_other_heads_do(device: str) -> None:
    q, k = draw(7, 3, 3, 100, 100, dtype=torch.float16, device=device)
    selector = XAttention(8, 0.6)
    every, again = (rows_of(select(selector, q, k, block=16)) for _ in range(2))
    assert every == again
    some = rows_of(select(selector, q, k, block=16, modes=torch.tensor([[0, 2, 1]])))
    assert some == [[], every[1], []]


# --- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["dense", "left", "right", "packed"])
@pytest.mark.parametrize(
    ("stride", "block", "dtype"),
    [
        (16, 128, torch.bfloat16),
        (16, 128, torch.float16),
        (16, 128, torch.float32),
        (4, 64, torch.bfloat16),
        (64, 128, torch.bfloat16),
    ],
)
def test_large_problems(stride: int, block: int, layout: str, dtype: torch.dtype) -> None:
    case = Case(layout, 4, 128, 4000, "all", "32")
    problem = testing.make_problem(case, dtype=dtype, device="cuda")
    selector, modes = XAttention(stride, 0.9), torch.full_like(problem.plan.modes, 2)
    k = 2 * problem.k
    lists = select(selector, problem.q, k, block=block, layout=problem.layout, modes=modes)
    assert check(lists, problem.q, k, selector, block=block, layout=problem.layout)


@pytest.mark.gpu
def test_it_never_waits_for_the_device_and_can_be_captured() -> None:
    q, k = draw(8, 8, 2, 3000, 3000, 128, torch.bfloat16, "cuda")
    selector = XAttention()
    modes = torch.full((1, 2), 2, dtype=torch.int8, device="cuda")
    segments = segments_of(q, k, None)

    def call() -> BlockLists:
        return xattention.select(
            selector, q, k, modes, segments, block_size=128, scale=0.1, max_queries=3000,
            max_keys=3000,
        )  # fmt: skip

    expected = call().counts.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = call()
    modes.fill_(0)
    graph.replay()
    assert not lists.counts.any()
    modes.fill_(2)
    graph.replay()
    assert torch.equal(lists.counts, expected)


# --- What it does not do -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        (XAttention(official_quirk=True), "official_quirk"),
        (XAttention(stride=2), "stride=2"),
        (XAttention(stride=128), "stride=128"),
        (ScatteredBlocks(), "ScatteredBlocks"),
    ],
)
def test_what_it_cannot_choose_is_said(selector: Any, reason: str) -> None:
    verdict = xattention.supports(selector)
    assert not verdict
    assert reason in verdict.reason


def test_it_supports_the_papers_settings() -> None:
    assert xattention.supports(XAttention())


# --- Planted blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "keep"), [(1024, 4), (1000, 4), (1024, 8)])
def test_planted_blocks_hold_the_attention_and_are_found(length: int, keep: int) -> None:
    planted = testing.planted_blocks(
        length, heads=4, kv_heads=2, head_dim=64, block_size=32, keep=keep
    )
    mask = planted.mask
    assert mask.shape == (4, 32, 32)
    assert bool((mask.sum(-1) <= keep + 1).all())
    assert float(mask[:, 3 * keep :].float().mean()) > 0.75 * keep / 32

    k = planted.k.repeat_interleave(2, 1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (planted.q @ k.mT / 8).masked_fill(future, -torch.inf)
    padding = (0, -length % 32) * 2
    mass = pad(scores.softmax(-1)[0], padding).unflatten(2, (32, 32)).unflatten(1, (32, 32))
    share = (mass.sum((2, 4)) * mask).sum(-1) / mass.sum((2, 3, 4))
    assert float(share.min()) > 0.99

    segments = SequenceLayout.dense().segments(1, length, length, torch.device("cpu"))
    lists = XAttention(8).select(planted.q, planted.k, segments, block_size=32, scale=1 / 8)
    found = lists.to_mask(32)[0]
    sink = torch.arange(32) == 0
    assert not (found & ~mask & ~sink).any()
    if keep == 4:  # each block holds a quarter: none can be left out at a threshold of 0.9
        assert torch.equal(found, mask | sink)


def test_planted_blocks_are_the_same_on_every_device_and_dtype(device: str) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "block_size": 16, "keep": 4}
    masks = [
        testing.planted_blocks(200, **sizes, device=place, dtype=dtype).mask.cpu()
        for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16))
    ]
    assert torch.equal(*masks)
    other = testing.planted_blocks(200, **sizes, seed=1).mask
    assert not torch.equal(masks[0], other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 6}, "keep must be a positive multiple of 4"),
        ({"keep": 0}, "keep must be a positive multiple of 4"),
        ({"block_size": 6}, "block_size must be a positive multiple of 4"),
        ({"kv_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
    ],
)
def test_planted_blocks_refuse_what_they_cannot_plant(change: dict[str, int], message: str) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 32, "block_size": 16, "keep": 4, **change}
    with pytest.raises(ValueError, match=message):
        testing.planted_blocks(64, **sizes)
