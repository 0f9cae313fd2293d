"""Kernels for Hopper (sm_90), forward and backward: warp-specialised, written in Gluon.

Each launches one program on every multiprocessor. A producer warp takes pieces of work from a
schedule and has the copy engine bring what they need; two consumer warpgroups compute.
"""

from __future__ import annotations

from torch import Tensor

from elasticore.attention import Verdict
from elasticore.backends.triton.arguments import capability
from elasticore.backends.triton.hopper.dkv import key_value_gradients
from elasticore.backends.triton.hopper.dq import query_gradient
from elasticore.backends.triton.hopper.forward import attention
from elasticore.backends.triton.hopper.memory import BLOCK, DTYPES, copyable
from elasticore.backends.triton.hopper.snapshot import attention as snapshot_attention

__all__ = [
    "attention",
    "copyable",
    "key_value_gradients",
    "query_gradient",
    "snapshot_attention",
    "supports",
]


def supports(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int) -> Verdict:
    """Whether the kernels can run this call: a Hopper GPU, and tensors that its copy engine reads.

    Looks at sizes, strides and addresses only; nothing is read from the device.
    """
    if not q.is_cuda or capability(q.device) != 9:
        return Verdict(False, "the Hopper kernels need a GPU of compute capability 9.0.")
    if q.dtype not in DTYPES:
        return Verdict(False, f"the Hopper kernels compute in bfloat16 and float16, not {q.dtype}.")
    if q.shape[3] not in (64, 128):
        return Verdict(False, f"the Hopper kernels are for head_dim 64 and 128, not {q.shape[3]}.")
    if block_size != BLOCK:
        return Verdict(False, f"the Hopper kernels are for block_size {BLOCK}, not {block_size}.")
    if not scale > 0:
        return Verdict(False, f"the Hopper kernels need a scale above 0, not {scale}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not copyable(x):
            return Verdict(
                False, f"the copy engine needs {name} on 16-byte addresses and positive strides."
            )
    return Verdict(True)
