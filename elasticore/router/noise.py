"""Gumbel noise, and how a private generator lives with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["checkpoint_contexts", "gumbel", "sample_gumbel", "seed_noise"]

_replaying: list[torch.Generator] = []


def gumbel(uniform: Tensor, eps: float) -> Tensor:
    """Gumbel noise of uniform noise: ``-log(-log(u + eps) + eps)`` (Eq. 12).

    Finite for every u from 0 to 1, both included.

    Parameters
    ----------
    uniform
        float32, any shape, values in [0, 1].
    eps
        The equation's ε; at least the smallest normal float32.
    """
    # u + eps may round above 1, whose -log is negative; the inner logarithm is kept at 0 there.
    return -torch.log((-torch.log(uniform + eps)).clamp(min=0) + eps)


def sample_gumbel(like: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw float32 Gumbel noise of the shape and on the device of ``like``.

    Parameters
    ----------
    like
        Any tensor; its values are not read.
    eps
        ε of Eq. 12.
    generator
        None draws from PyTorch's global generator, whose state gradient checkpointing restores by
        itself before it recomputes. A private generator lies outside its care; see
        :func:`checkpoint_contexts`.

    Raises
    ------
    ValueError
        If the generator is on another device.
    RuntimeError
        If a private generator is asked for noise during a backward pass that does not replay it:
        the recomputed decisions would differ from those that made the loss.
    """
    if generator is not None:
        if generator.device.type != like.device.type:
            raise ValueError(
                f"generator is on {generator.device} but the logits are on {like.device}; make it "
                f"with torch.Generator({like.device.type!r})."
            )
        # Checkpointing recomputes inside the backward pass, where no other forward runs.
        if torch._C._current_graph_task_id() != -1 and generator not in _replaying:
            raise RuntimeError(
                "gradient checkpointing recomputes a router and cannot rewind its private noise "
                "generator; pass context_fn=checkpoint_contexts(generator) to the checkpoint, or "
                "use generator=None and seed each rank with torch.manual_seed."
            )
    uniform = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return gumbel(uniform, eps)


def seed_noise(seed: int, rank: int) -> None:
    """Seed PyTorch's global generators for one of several processes.

    Each rank draws its own noise: with the same on all of them, samples at the same place of every
    rank's batch would be sampled alike, and a large batch would explore no more than a small one.
    Rank 0 draws what a single process with this seed does.

    Parameters
    ----------
    seed
        The run's.
    rank
        Of the process, from 0.
    """
    torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)


def checkpoint_contexts(generator: torch.Generator) -> Callable[[], tuple[_Region, _Region]]:
    """The ``context_fn`` that makes checkpointing replay a private generator.

    Give it to ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...)``, or
    to Hugging Face's ``gradient_checkpointing_enable`` among its keyword arguments. The recompute
    then sees the noise of the forward, and leaves the generator where it was.
    """

    def context_fn() -> tuple[_Region, _Region]:
        forward = _Region(generator)
        return forward, _Region(generator, replay=forward)

    return context_fn


class _Region:
    """A checkpointed region's forward, which notes the generator's state, or its recompute."""

    def __init__(self, generator: torch.Generator, replay: _Region | None = None) -> None:
        self.generator = generator
        self.replay = replay
        self.state: Tensor | None = None

    def __enter__(self) -> None:
        self.state = self.generator.get_state()
        if self.replay is not None:
            assert self.replay.state is not None, "the forward runs before its recompute"
            self.generator.set_state(self.replay.state)
            _replaying.append(self.generator)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.replay is not None:
            assert self.state is not None
            self.generator.set_state(self.state)
            _replaying.remove(self.generator)
