"""Plans from the modes that a test wants its heads to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elasticore import BlockSelector, Full, HeadMode, HeadPlan, Pattern, Streaming
from elasticore.testing import Problem, ScatteredBlocks


def pattern_of(
    mode: int,
    streaming: Streaming = Streaming(),
    selector: BlockSelector = ScatteredBlocks(),
) -> Pattern:
    """The pattern that runs in a lane."""
    by_lane: dict[int, Pattern] = {0: Full(), 1: streaming, 2: selector}
    return by_lane[int(mode)]


def plan_of(
    modes: Tensor | Sequence[Sequence[int]],
    streaming: Streaming = Streaming(),
    selector: BlockSelector = ScatteredBlocks(),
    block_size: int = 128,
) -> HeadPlan:
    """The plan in which every head runs the mode that is given, out of two at most."""
    modes = torch.as_tensor(modes, dtype=torch.int8)
    lanes = sorted(set(modes.flatten().tolist()))
    assert len(lanes) <= 2, "a plan has two patterns"
    pair = [pattern_of(lane, streaming, selector) for lane in (lanes[0], lanes[-1])]
    return HeadPlan((modes != lanes[0]).to(torch.int8), *pair, block_size=block_size)


def pair_of(
    lanes: tuple[HeadMode, HeadMode],
    streaming: Streaming = Streaming(),
    selector: BlockSelector = ScatteredBlocks(),
) -> tuple[Pattern, Pattern]:
    """The patterns (retrieval, sparse) that run in two lanes."""
    retrieval, sparse = (pattern_of(lane, streaming, selector) for lane in lanes)
    return retrieval, sparse


@dataclass(frozen=True, eq=False)
class Mixed:
    """What a kernel is told, for tests of kernels: they run any mode in any head of one call.

    It stands for a plan, which has two patterns, in a :class:`~elasticore.testing.Problem`.
    """

    modes: Tensor
    streaming: Streaming
    selector: BlockSelector = ScatteredBlocks()
    block_size: int = 128
    gate = None
    lanes = frozenset(HeadMode)

    def with_modes(self, modes: Tensor) -> Mixed:
        return dataclasses.replace(self, modes=modes)


def mixed(problem: Problem) -> Problem:
    """A problem of the suite for a kernel: every sequence in two of the three modes."""
    modes = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int8, device=problem.q.device)
    plan: Any = Mixed(modes, problem.plan.streaming, block_size=problem.plan.block_size)
    return problem._replace(plan=plan)
