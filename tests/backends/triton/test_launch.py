"""A kernel that is launched again is the one that Triton would choose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore as ec
from elasticore.backends.triton import kernels, launch

LENGTH = 1000


def tensors(order: str, shift: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v of the same values however they lie; ``shift`` numbers off a 16-byte address."""
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for heads in (4, 2, 2):
        x = torch.randn(1, LENGTH, heads, 64, generator=generator, device="cuda").to(dtype)
        if order == "heads first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        store = torch.empty(x.numel() + shift, dtype=dtype, device="cuda")
        found.append(store[shift:].as_strided(x.shape, x.stride()).copy_(x).transpose(1, 2))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hopper", "portable", "decode", "training"])
def test_no_call_gets_a_kernel_made_for_another(name: str) -> None:
    if "hopper" not in kernels.KERNELS or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")
    calls = []
    orders, shifts = (
        ("heads first", "tokens first"),
        ((0, 1) if name in ("decode", "portable") else (0, 8)),
    )
    for order, shift, dtype, layout, off in itertools.product(
        orders, shifts, (torch.bfloat16, torch.float16), ("dense", "packed"), (0, 1)
    ):
        q, k, v = tensors(order, shift, dtype)
        if name == "decode":
            q = q[:, :, -3:]
        # Every other table starts one entry off: its address is no multiple of 16 bytes.
        modes = torch.tensor([9] * off + [0, 1], dtype=torch.int8, device="cuda")[off:][None]
        segments = None
        if layout == "packed":
            entries = (0, 0, q.shape[2], 0, LENGTH)
            table = [torch.tensor([0] * off + [n], device="cuda")[off:] for n in entries]
            segments = ec.Segments(*table)
        calls.append((q, k, v, modes, segments, None))

    settings: dict[str, Any] = {"scale": 0.125, "sink": 1, "local": 2, "block_size": 128}

    def run(call: tuple[Any, ...]) -> tuple[Tensor, ...]:
        if name != "training":
            return kernels.KERNELS[name](*call, **settings)
        of = kernels.TRAINING["hopper"]
        out, other, lse = of.snapshot(*call, sparse=ec.HeadMode.STREAMING, both=True, **settings)
        # Any gradient will do; the queries lie in as many ways as one can.
        backward = (*call[:3], call[0], lse, lse.clone(), *call[3:])
        dq = of.query_gradient(*backward, **settings)
        return out, other, lse, dq, *of.key_value_gradients(*backward, **settings)  # type: ignore[return-value]

    alone = []
    for call in calls:
        launch._kernels.clear()
        alone.append(run(call))
    for _ in range(2):
        for call, expected in zip(calls, alone, strict=True):
            assert all(map(torch.equal, run(call), expected))
