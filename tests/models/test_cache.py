"""The routing of a prompt follows its rows through everything that is done to a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from elasticore import record

from .tiny import CLOSE, SETTINGS, ByContent, cache_of, cached, elastic, tiny, tokens


def prompts() -> Tensor:
    """Three prompts that ByContent routes differently."""
    return torch.cat([tokens(1, 70, seed) for seed in range(3)])


def prefilled(model: Any, rows: Tensor) -> Any:
    return cache_of(model(rows, **cached(DynamicCache(config=model.config))))


@pytest.fixture
def model() -> Any:
    return elastic(tiny(), ByContent, SETTINGS)


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("copied", [False, True])
def test_rows_that_move_keep_their_routing(model: Any, method: str, copied: bool) -> None:
    order = torch.tensor([2, 0]) if method == "batch_select_indices" else torch.tensor([2, 0, 1])
    with record() as trace:
        cache = prefilled(model, prompts())
    assert len({tuple(d.flatten().tolist()) for d in trace.decisions.unbind(1)}) > 1
    if copied:
        kept, cache = cache, copy.deepcopy(cache)
    getattr(cache, method)(order)
    expected = prefilled(model, prompts()[order])
    step = tokens(len(order), 1, 9)
    ours = model(step, **cached(cache)).logits
    torch.testing.assert_close(ours, model(step, **cached(expected)).logits, **CLOSE)
    if copied:  # the copy moved alone
        step = tokens(3, 1, 9)
        alone = model(step, **cached(prefilled(model, prompts()))).logits
        torch.testing.assert_close(model(step, **cached(kept)).logits, alone, **CLOSE)


def test_rows_that_multiply_keep_their_routing(model: Any) -> None:
    cache = prefilled(model, prompts())
    cache.batch_repeat_interleave(2)
    expected = prefilled(model, prompts().repeat_interleave(2, 0))
    step = tokens(6, 1, 9)
    ours = model(step, **cached(cache)).logits
    torch.testing.assert_close(ours, model(step, **cached(expected)).logits, **CLOSE)


def test_a_prompt_that_begins_in_a_later_chunk_is_routed_there(model: Any) -> None:
    short, long = tokens(1, 40, 1), tokens(1, 100, 2)
    padded = torch.cat([torch.cat([torch.zeros(1, 60).long(), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :60] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with record() as trace:
        for start, stop in ((0, 48), (48, 100)):
            model(
                padded[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position_ids[:, start:stop],
                **cached(cache),
            )
        # The same prompt in one go, where all of it is there at once.
        model(short)
    late, alone = trace.passes[1], trace.passes[2]
    assert torch.equal(late.decisions[:, 0], alone.decisions[:, 0])
