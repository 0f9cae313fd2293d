import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticore.layout import SequenceLayout
from elasticore.router import pool_boundary, pooling

CPU = torch.device("cpu")


def dense(keys):
    batch, tokens = keys.shape[:2]
    return SequenceLayout.dense().segments(batch, tokens, tokens, keys.device)


def packed(lengths, device=CPU):
    cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    return SequenceLayout.packed(cu).segments(1, int(cu[-1]), int(cu[-1]), device)


def padded(lengths, tokens, side, device=CPU):
    length = torch.tensor(lengths, device=device)
    first = tokens - length if side == "left" else torch.zeros_like(length)
    layout = SequenceLayout.padded(first, first + length - 1)
    return layout.segments(len(lengths), tokens, tokens, device)


def pad(sequences, tokens, side):
    """Stack sequences [T, Hkv, D]; what lies in the padding must not matter, so it is NaN."""
    batch = sequences[0].new_full((len(sequences), tokens, *sequences[0].shape[1:]), torch.nan)
    for row, x in zip(batch, sequences, strict=True):
        row[slice(tokens - len(x), None) if side == "left" else slice(0, len(x))] = x
    return batch


def reference(sequence, boundary):
    """The definition, in float64 for one sequence [T, Hkv, D]."""
    x = sequence.double()
    if boundary is not None and len(x) > 2 * boundary:
        x = torch.cat((x[:boundary], x[-boundary:]))
    return x.sum(0) / max(len(x), 1)


def bits(x):
    return x.view(torch.int32)


def test_mean_of_both_ends_by_hand():
    keys = torch.tensor([1.0, 2, 30, 40, 5, 8]).view(1, 6, 1, 1)
    assert pool_boundary(keys, dense(keys), boundary=2).item() == 4.0  # (1 + 2 + 5 + 8) / 4
    assert pool_boundary(keys, dense(keys), boundary=1).item() == 4.5  # (1 + 8) / 2
    # Short: each token once, (1 + 2 + 30 + 40 + 5 + 8) / 6.
    for boundary in (3, 4, 100, None):
        assert pool_boundary(keys, dense(keys), boundary).item() == pytest.approx(86 / 6)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (199, 99.0),  # mean of 0..198
        (200, 99.5),  # mean of 0..199
        (201, 100.0),  # 0..99 and 101..200: (4950 + 15050) / 200
        (300, 149.5),  # 0..99 and 200..299: (4950 + 24950) / 200
        (301, 150.0),  # 0..99 and 201..300
    ],
)
def test_default_boundary_is_a_hundred_at_each_end(tokens, expected):
    keys = torch.arange(tokens).float().view(1, tokens, 1, 1)
    assert pool_boundary(keys, dense(keys)).item() == expected


def test_the_200th_and_201st_token_are_counted_once_and_skipped():
    keys = torch.zeros(1, 201, 1, 1)
    keys[0, 100] = 7  # the middle of 201 tokens is the one that nobody reads
    assert pool_boundary(keys, dense(keys)).item() == 0
    assert pool_boundary(keys[:, 1:], dense(keys[:, 1:])).item() == pytest.approx(7 / 200)


@pytest.mark.parametrize("boundary", [2, 100, None])
def test_additions_form_a_tree(boundary):
    # Fixing the order is what makes the bits the same on every device: slots meet at half their
    # distance, (2²⁴ - 2²⁴) + (1 + 1) = 2. From left to right, 2²⁴ + 1 would round to 2²⁴.
    big = 2.0**24
    slots = {2: 4, 100: 200, None: 128}[boundary]
    keys = torch.zeros(1, slots, 1, 1)
    keys[0, [0, 1, slots // 2, slots // 2 + 1], 0, 0] = torch.tensor([big, 1.0, -big, 1.0])
    assert pool_boundary(keys, dense(keys), boundary).item() == 2 / torch.tensor(float(slots))


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    boundary=st.sampled_from([1, 2, 3, 7, None]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_integers_pool_exactly(lengths, boundary, seed):
    # Sums of small integers are exact in float32, so the only rounding is the division's.
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-99, 100, (1, sum(lengths), 2, 3), generator=generator).float()
    expected = torch.stack([reference(x, boundary).float() for x in keys[0].split(lengths)])
    assert torch.equal(pool_boundary(keys, packed(lengths), boundary), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("boundary", [100, 16, 3, None])
def test_same_bits_alone_padded_and_packed(boundary, dtype):
    torch.manual_seed(0)
    lengths, tokens = [1, 450, 5, 200, 33, 201, 32, 129], 500
    sequences = [torch.randn(n, 3, 8).to(dtype) for n in lengths]
    alone = [pool_boundary(x[None], dense(x[None]), boundary) for x in sequences]
    alone = torch.cat(alone)
    assert alone.dtype == torch.float32
    everything = torch.cat(sequences)[None]
    results = {"packed": pool_boundary(everything, packed(lengths), boundary)}
    for side in ("left", "right"):
        batch = pad(sequences, tokens, side)
        results[side] = pool_boundary(batch, padded(lengths, tokens, side), boundary)
    # The strides of a [B, Hkv, T, D] projection, cut from a longer cache.
    cache = torch.randn(1, 3, everything.shape[1] + 9, 16).to(dtype)
    view = cache.transpose(1, 2)[:, 4:-5, :, 8:]
    view.copy_(everything)
    results["strided"] = pool_boundary(view, packed(lengths), boundary)
    for name, result in results.items():
        assert torch.equal(bits(result), bits(alone)), name
    expected = torch.stack([reference(x, boundary) for x in sequences])
    torch.testing.assert_close(alone.double(), expected, rtol=0, atol=1e-6)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any),
    extra=st.integers(0, 70),
    chunk=st.sampled_from([2, 3, 8, 128]),
)
@settings(deadline=None, max_examples=60)
def test_pooling_all_tokens_has_the_same_bits_after_any_number_of_rounds(lengths, extra, chunk):
    torch.manual_seed(sum(lengths))
    sequences = [torch.randn(n, 1, 4) for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "_CHUNK", chunk)
        alone = torch.cat([pool_boundary(x[None], dense(x[None]), None) for x in sequences])
        together = pool_boundary(torch.cat(sequences)[None], packed(lengths), None)
        tokens = max(lengths) + extra
        left = pool_boundary(pad(sequences, tokens, "left"), padded(lengths, tokens, "left"), None)
    assert torch.equal(bits(alone), bits(together))
    assert torch.equal(bits(alone), bits(left))
    expected = torch.stack([reference(x, None) for x in sequences])
    torch.testing.assert_close(alone.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("boundary", [2, None])
def test_empty_sequences_give_zeros(boundary):
    keys = torch.ones(1, 3, 2, 4)
    result = pool_boundary(keys, packed([0, 3, 0]), boundary)
    assert torch.equal(result[:, 0, 0], torch.tensor([0.0, 1.0, 0.0]))
    nothing = pool_boundary(torch.ones(2, 0, 2, 4), padded([0, 0], 0, "right"), boundary)
    assert torch.equal(nothing, torch.zeros(2, 2, 4))
    no_rows = torch.ones(0, 5, 2, 4)
    assert pool_boundary(no_rows, dense(no_rows), boundary).shape == (0, 2, 4)


@pytest.mark.parametrize("boundary", [2, None])
def test_gradient_is_one_over_the_count_where_a_token_is_pooled(boundary):
    lengths = [3, 6]
    keys = pad([torch.randn(n, 1, 1) for n in lengths], 7, "left").requires_grad_()
    pool_boundary(keys, padded(lengths, 7, "left"), boundary).sum().backward()
    third, last = torch.tensor(1.0) / 3, torch.tensor(1.0) / (4 if boundary else 6)
    middle = torch.tensor(0.0) if boundary else last
    expected = torch.stack(
        [
            torch.tensor([0.0, 0, 0, 0, third, third, third]),
            torch.tensor([0.0, last, last, middle, middle, last, last]),
        ]
    )
    assert torch.equal(keys.grad[:, :, 0, 0], expected)


def test_a_boundary_reads_only_its_tokens():
    # A billion tokens that share one token's memory: copying them, or a T x T mask, cannot work.
    keys = torch.ones(1, 1, 2, 4).expand(1, 10**9, 2, 4)
    assert torch.equal(pool_boundary(keys, dense(keys)), torch.ones(1, 2, 4))


@pytest.mark.parametrize("boundary", [100, None])
def test_nothing_is_read_on_the_host(boundary):
    keys = torch.empty(1, 700, 2, 8, device="meta", dtype=torch.bfloat16)  # has no values
    cu = torch.empty(6, device="meta", dtype=torch.int64)
    segments = SequenceLayout.packed(cu).segments(1, 700, 700, cu.device)
    assert pool_boundary(keys, segments, boundary).shape == (5, 2, 8)


@pytest.mark.parametrize(
    ("keys", "boundary", "error", "message"),
    [
        (torch.ones(1, 4, 2, 8, dtype=torch.int64), 2, TypeError, "keys must be a float tensor"),
        ([1.0], 2, TypeError, "keys must be a float tensor, got list"),
        (torch.ones(4, 2, 8), 2, ValueError, r"got shape \[4, 2, 8\]"),
        (torch.ones(1, 4, 2, 8), 0, ValueError, "boundary must be at least 1"),
        (torch.ones(1, 4, 2, 8), 2.0, TypeError, "boundary must be an int"),
        (torch.ones(1, 4, 2, 8), True, TypeError, "boundary must be an int"),
        (torch.ones(1, 4, 2, 8, device="meta"), 2, ValueError, "segments are on cpu but keys"),
    ],
)
def test_bad_input_is_named(keys, boundary, error, message):
    with pytest.raises(error, match=message):
        pool_boundary(keys, packed([4]), boundary)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("boundary", [100, None])
def test_gpu_has_the_bits_of_the_cpu_and_does_not_wait(boundary):
    torch.manual_seed(0)
    lengths = [1, 4000, 5, 200, 201]
    keys = torch.randn(1, sum(lengths), 8, 128, dtype=torch.bfloat16)
    expected = pool_boundary(keys, packed(lengths), boundary)
    on_gpu = keys.cuda().requires_grad_()
    segments = packed(lengths, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = pool_boundary(on_gpu, segments, boundary)
        result.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(bits(result.detach().cpu()), bits(expected))
