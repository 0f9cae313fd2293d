"""What was made from tensors, kept while nobody writes to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Memo"]

Made = TypeVar("Made")


class Memo(Generic[Made]):
    """The last thing made; a copy of it starts empty.

    It holds for the same tensors with the same values: PyTorch counts the writes to a tensor. For
    those made under ``torch.inference_mode`` it does not, and in a CUDA graph the making has to be
    part of the graph, so that a replay follows the values. There nothing is kept. Nor does another
    stream see it, which may be ahead of the one that makes it. What ``torch.compile`` traces must
    not come here.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, tuple[Tensor, ...], Made] | None = None

    def __reduce__(self) -> tuple[type[Memo[Made]], tuple[()]]:
        return type(self), ()

    def get(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        device: torch.device,
        make: Callable[[], Made],
    ) -> Made:
        """What ``make`` returns, or returned for the same ``key`` and ``tensors`` on ``device``."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        stream = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make()
            stream = torch.cuda.current_stream(device).cuda_stream
        writes = tuple(tensor._version for tensor in tensors)
        # What is made in inference mode is of no use to autograd.
        state = key, device, stream, torch.is_inference_mode_enabled(), writes
        kept = self._kept  # read once: another thread may write it
        if kept is not None and kept[0] == state and _same(kept[1], tensors):
            return kept[2]
        made = make()
        self._kept = state, tuple(tensors), made
        return made


def _same(kept: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    return len(kept) == len(tensors) and all(a is b for a, b in zip(kept, tensors, strict=True))
