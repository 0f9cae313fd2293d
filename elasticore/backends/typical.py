"""Requests to ask backends about where there is no call: in doctor, in the documentation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from elasticore.attention import AttentionRequest
from elasticore.patterns import HeadMode

__all__ = ["example_request", "typical_requests"]

K = 1024


def example_request(**changes: Any) -> AttentionRequest:
    """One prompt of 4K tokens through a layer of an 8B model, but for ``changes``.

    Nothing is allocated, so it may name a device that is not there.

    Examples
    --------
    >>> from elasticore.backends.serial import SerialAttention
    >>> SerialAttention().supports(example_request(gradients=True)).ok
    True
    """
    request = AttentionRequest(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        head_dim=128,
        query_heads=32,
        kv_heads=8,
        queries=4 * K,
        keys=4 * K,
        sequences=1,
        layout="dense",
        lanes=frozenset({HeadMode.FULL, HeadMode.STREAMING}),
        block_size=128,
        gradients=False,
    )
    return dataclasses.replace(request, **changes)


def typical_requests(device: torch.device) -> dict[str, AttentionRequest]:
    """What people run, by name."""

    def request(tokens: int, **changes: Any) -> AttentionRequest:
        return example_request(**{"device": device, "queries": tokens, "keys": tokens, **changes})

    selected = frozenset({HeadMode.FULL, HeadMode.SELECTED})
    return {
        "prefill 4K": request(4 * K),
        "prefill 64K": request(64 * K),
        "prefill 64K, with a selector": request(64 * K, lanes=selected),
        "decode at 64K": request(64 * K, queries=1),
        "training 16K": request(16 * K, gradients=True),
    }
