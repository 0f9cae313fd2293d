"""A padded batch is its single runs: logits, decisions and generated text, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore
from elasticore import AllSparse

from .tiny import CLOSE, FAMILIES, HALF, SETTINGS, cache_of, cached, elastic, small, tiny, tokens

LENGTHS = (100, 63, 17)


def padded(prompts: list[Tensor], side: str, filler: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids ``[1, T]`` as one padded batch: ids and attention mask."""
    longest = max(p.shape[1] for p in prompts)
    ids = torch.full((len(prompts), longest), filler)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        where = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = prompt[0], 1
    return ids, mask


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, length, seed) for seed, length in enumerate(lengths)]


def run(model: Any, ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with elasticore.record() as trace:
        logits = model(ids, **kwargs).logits
    return logits, trace.decisions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_its_single_runs(family: str, side: str) -> None:
    model, prompts = elastic(tiny(family)), prompts_of()
    ids, mask = padded(prompts, side)
    logits, decisions = run(model, ids, attention_mask=mask)
    assert not torch.equal(decisions[:, 0], decisions[:, 1])  # rows are routed apart
    for row, prompt in enumerate(prompts):
        alone, routing = run(model, prompt)
        assert torch.equal(decisions[:, row : row + 1], routing)
        torch.testing.assert_close(logits[row, mask[row].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("mode", ["fa-xa", "xa-ssa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_selected_blocks(mode: str, side: str) -> None:
    config = small(mode, selector=HALF)
    model, prompts = elastic(tiny(), way=config), prompts_of()
    ids, mask = padded(prompts, side)
    with elasticore.record() as batch:
        logits = model(ids, attention_mask=mask).logits
    for row, prompt in enumerate(prompts):
        with elasticore.record() as single:
            alone = model(prompt).logits
        assert single.esr[0] > 0.01 or prompt.shape[1] < 32
        # The blocks are the same; the ratio is a mean of float64 sums of different lengths.
        assert batch.esr[row].item() == pytest.approx(single.esr[0].item(), abs=1e-12)
        torch.testing.assert_close(logits[row, mask[row].bool()], alone[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_does_not_matter(side: str) -> None:
    model, prompts = elastic(tiny()), prompts_of()
    ids, mask = padded(prompts, side)
    other, _ = padded(prompts, side, filler=99)
    first, second = run(model, ids, attention_mask=mask), run(model, other, attention_mask=mask)
    valid = mask.bool()
    assert torch.equal(first[0][valid], second[0][valid])
    assert torch.equal(first[1], second[1])


def test_a_mask_of_ones_is_no_mask() -> None:
    model, ids = elastic(tiny()), tokens(2, 80)
    logits, decisions = run(model, ids)
    masked, same = run(model, ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(masked, logits, **CLOSE)
    assert torch.equal(decisions, same)


def test_a_row_of_nothing_but_padding_harms_no_one() -> None:
    model, ids = elastic(tiny()), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1] = 0
    logits, _ = run(model, ids, attention_mask=mask)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0], run(model, ids[:1])[0][0], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_on_a_left_padded_batch_is_the_single_generates(
    family: str, cache: str | None
) -> None:
    model, prompts = elastic(tiny(family)), prompts_of()
    ids, mask = padded(prompts, "left")
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    batch = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert batch[row].tolist() == alone[0, prompt.shape[1] :].tolist()


# Masks that are none of padding.


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_with_four_axes_are_refused(dtype: torch.dtype) -> None:
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril().to(dtype)
    with pytest.raises(ValueError, match=r"attention_mask.*\[1, 1, 40, 40\]"):
        elastic(tiny())(tokens(1, 40), attention_mask=mask)


def test_a_mask_that_leaves_out_the_cache_is_refused() -> None:
    model, ids = elastic(tiny(), AllSparse, SETTINGS), tokens(1, 50)
    cache = cache_of(model(ids))
    with pytest.raises(ValueError, match="covers 10 positions, but cache and input hold 60"):
        model(tokens(1, 10), **cached(cache), attention_mask=torch.ones(1, 10))
