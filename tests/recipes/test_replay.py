"""Routing that is given again, and routing that is given to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore.assets import tiny
from elasticore.eval.methods import Method
from recipes.study.replay import between_tasks, packed, replayed, unpacked, within_tasks
from recipes.study.scores import Scorer, streaming

LENGTH, SAMPLES, TASKS = 384, 3, ["multikey", "code"]
ROUTERS = Method("routers", "router", {"path": str(tiny() / "router")})


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_decisions_are_packed_without_loss(
    samples: int, layers: int, heads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(2, (samples, layers, heads), generator=generator, dtype=torch.int8)
    assert torch.equal(unpacked(packed(made), (layers, heads)), made)


def numbered() -> dict[str, torch.Tensor]:
    """Ten samples of three tasks, each with a number of its own in the place of decisions."""
    return {f"t{i}": torch.arange(10 * i, 10 * i + 10)[:, None, None] for i in range(3)}


@pytest.mark.parametrize("seed", range(3))
def test_nobody_keeps_its_own_and_nothing_is_lost(seed: int) -> None:
    within, between = within_tasks(numbered(), seed), between_tasks(numbered(), seed)
    every = torch.arange(30)
    for given_to in (within, between):
        assert torch.equal(torch.cat(list(given_to.values())).flatten().sort()[0], every)
    for place, task in enumerate(numbered()):
        own = numbered()[task]
        assert torch.equal(within[task].flatten().sort()[0], own.flatten())
        assert not bool((within[task] == own).any())
        assert not bool((between[task].flatten() // 10 == place).any())
        assert set((between[task].flatten() // 10).tolist()) == {0, 1, 2} - {place}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(tmp_path_factory.mktemp("scores"), batch_tokens=2 * LENGTH)


def test_routers_and_their_decisions_given_again_score_alike(scorer: Scorer) -> None:
    found = scorer.score(ROUTERS, LENGTH, SAMPLES, TASKS)
    way: Any = ROUTERS.way(scorer.model)
    decisions = {task: unpacked(found[task]["decisions"], scorer.shape) for task in TASKS}
    samples = {task: scorer.samples(task, LENGTH, SAMPLES) for task in TASKS}
    again = scorer.score(
        replayed("again", samples, decisions, streaming(way)), LENGTH, SAMPLES, TASKS
    )
    for task in TASKS:
        for name in ("each", "loss", "msr", "esr"):
            assert again[task][name] == found[task][name], (task, name)
        assert decisions[task].double().mean(0).tolist() == found[task]["sparse"]


def test_too_few_decisions_are_refused(scorer: Scorer) -> None:
    streams = streaming(Method("routers", "router", {"path": "tiny"}).way(scorer.model))  # type: ignore[arg-type]
    samples = {"code": scorer.samples("code", LENGTH, 1)}
    few = replayed(
        "few", samples, {"code": torch.zeros(1, *scorer.shape, dtype=torch.int8)}, streams
    )
    with pytest.raises(ValueError, match="decisions are for 1 samples; there are more"):
        scorer.score(few, LENGTH, 3, ["code"])
