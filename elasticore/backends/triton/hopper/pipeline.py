"""One key block of the forward pass, for the producer and for a consumer.

Keys and values have STAGES places each. A step frees the keys it used and the values of the step
before, so one barrier, ``kv_free``, speaks of both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from elasticore.backends.triton.hopper.memory import ROWS, copy, load_values

__all__ = ["LAG", "fetch", "partial_sums", "step"]

LAG = gl.constexpr(8.0)
"""Powers of two by which a row's weights may exceed 1 before what was summed so far is rescaled."""


@gluon.jit
def fetch(k_desc, v_desc, v, k_shared, v_shared, k_full, v_full, kv_free, batch, kv_head, key_start,
          key_length, block, visited, v_batch, v_head, v_token, D: gl.constexpr,
          STAGES: gl.constexpr, RAGGED: gl.constexpr):  # fmt: skip
    """The producer's part: bring a block's keys and values. Returns the next visit's number."""
    SIZE: gl.constexpr = k_desc.block_shape[2]
    key = key_start + block * SIZE
    stage = visited % STAGES
    mbarrier.wait(kv_free.index(stage), ((visited // STAGES) & 1) ^ 1)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    copy(k_desc, [batch, kv_head, key, 0], k_full.index(stage), k_shared.index(stage))
    visited += 1
    mbarrier.wait(kv_free.index(visited % STAGES), ((visited // STAGES) & 1) ^ 1)
    whole = True
    if RAGGED:
        # What the copy engine would bring in after the sequence's end may be NaN, and a weight of
        # 0 does not silence that.
        inside = key_length - block * SIZE
        whole = inside >= SIZE
        if inside < SIZE:
            base = v + batch.to(gl.int64) * v_batch + kv_head.to(gl.int64) * v_head
            load_values(base, key, v_token, v_shared.index(stage), inside, SIZE, D)
            fence_async_shared()
            mbarrier.arrive(v_full.index(stage), count=1)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes, pred=whole)
    copy(v_desc, [batch, kv_head, key, 0], v_full.index(stage), v_shared.index(stage), pred=whole)
    return visited


@gluon.jit
def step(q, o, top, total, weights, visited, k_shared, v_shared, k_full, v_full, kv_free, zero,
         scale, slack, SIZE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A consumer's part: this block's softmax beside the last block's product with its values.

    On the tensor cores: this block's scores, then the last one's values. The softmax of this block
    runs beside the latter. ``top`` is what a row's ``weights`` are relative to, ``total`` their sum
    by thread, ``o`` the output without the last block.
    """
    values: gl.constexpr = o.type.layout
    before = visited % STAGES
    visited += 1
    stage = visited % STAGES
    phase = (visited // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    s_next = warpgroup_mma(q, k_shared.index(stage).reshape([SIZE, D]).permute((1, 0)), zero,
                           use_acc=False, is_async=True)  # fmt: skip
    o_next = warpgroup_mma(weights, v_shared.index(before).reshape([SIZE, D]), o,
                           is_async=True)  # fmt: skip
    s = warpgroup_mma_wait(1, deps=[s_next])
    # What the weights are relative to may lag behind the maximum: most steps then find it
    # unchanged and leave o alone. That saves power, which bounds the clock.
    found = gl.max(s, 1)
    higher = gl.where(found > top + slack, found, top)
    shrink = gl.exp2((top - higher) * scale)
    p = gl.exp2(s * scale - (higher * scale)[:, None])
    by_thread: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.convert_layout(shrink, by_thread)[:, None] + partial_sums(p)
    top = higher
    weights = gl.convert_layout(p.to(weights.dtype), gl.DotOperandLayout(0, values, 2))
    # Waiting for the values here, and not when they are needed, keeps the assembler from moving
    # the softmax behind the wait for the tensor cores.
    mbarrier.wait(v_full.index(stage), phase)
    o = warpgroup_mma_wait(0, deps=[o_next])
    mbarrier.arrive(kv_free.index(stage), count=1)
    return _shrink(o, shrink), top, total, weights, visited


@gluon.jit
def partial_sums(p):
    """Sums of the weights that each thread holds of a row, ``[rows, 4]``: no thread waits."""
    return gl.sum(gl.sum(p.reshape([ROWS, p.shape[1] // 8, 4, 2]), 3), 1)


def _products(n: int) -> str:
    """PTX for ``n`` numbers times their factors, jumped over where a warp's factors are all 1.

    A thread holds two rows of an accumulator: elements 0 and 2 of every four are one of each.
    """
    copies = "".join(f"mov.b32 ${i}, ${n + i}; " for i in range(n))
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * n + i}; " for i in range(n))
    return (
        f"{{ .reg .pred same; {copies}"
        f"setp.eq.f32 same, ${2 * n}, 0f3F800000; "
        f"setp.eq.and.f32 same, ${2 * n + 2}, 0f3F800000, same; "
        "vote.sync.all.pred same, same, 0xffffffff; "
        f"@same bra.uni DONE; {products}DONE: }}"
    )


PRODUCTS = gl.constexpr(_products(32))
PRODUCTS_REGISTERS = gl.constexpr(",".join(["=f"] * 32 + ["f"] * 64))


@gluon.jit
def _shrink(o, factor):
    """``o * factor[:, None]``."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, o.type.layout))[:, None]
    return gl.inline_asm_elementwise(
        PRODUCTS, PRODUCTS_REGISTERS, [o, factor], gl.float32, is_pure=True, pack=32)  # fmt: skip
