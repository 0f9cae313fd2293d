"""Padding between valid tokens is served: each row is what it is without its padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import elasticore
from elasticore import AllRetrieval

from .test_padding import padded, prompts_of
from .tiny import CLOSE, FAMILIES, HALF, cached, elastic, small, tiny, tokens

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count valid tokens only, as generate() makes them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def holed(batch: int, width: int, seed: int, share: float = 0.3) -> Tensor:
    """A mask with padding anywhere, and at least one valid token a row."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, width, generator=generator) > share).long()
    mask[:, width // 2] = 1
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_full_is_the_model_itself(family: str) -> None:
    model, ids, mask = tiny(family), tokens(3, 80), holed(3, 80, 1)
    arguments = {"attention_mask": mask, "position_ids": positions_of(mask)}
    expected = model(ids, **arguments).logits
    logits = elastic(model, AllRetrieval)(ids, **arguments).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("mode", ["fa-ssa", "fa-xa", "xa-ssa"])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_what_it_is_without_its_padding(mode: str, seed: int) -> None:
    model, ids, mask = (
        elastic(tiny(), way=small(mode, HALF)),
        tokens(3, 100, seed),
        holed(3, 100, seed),
    )
    with elasticore.record() as together:
        logits = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    assert bool(logits.isfinite().all())
    for row in range(3):
        own = mask[row].bool()
        with elasticore.record() as alone:
            expected = model(ids[row : row + 1, own]).logits[0]
        assert torch.equal(together.decisions[:, row], alone.decisions[:, 0])
        assert together.esr[row].item() == pytest.approx(alone.esr[0].item(), abs=1e-12)
        torch.testing.assert_close(logits[row, own], expected, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=48, max_size=48), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_any_mask_in_any_chunks(masks: list[list[bool]], lengths: list[int]) -> None:
    model, mask = elastic(tiny(), elasticore.HeadTable([[1, 0]] * 3)), torch.tensor(masks).long()
    ids, positions = tokens(len(masks), 48), positions_of(mask)
    stops = [min(sum(lengths[: i + 1]), 48) for i in range(len(lengths))] + [48]
    cache, parts, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for stop in stops:
            if stop > start:
                chunk = slice(start, stop)
                parts.append(
                    model(
                        ids[:, chunk],
                        attention_mask=mask[:, :stop],
                        position_ids=positions[:, chunk],
                        **cached(cache),
                    ).logits
                )
                start = stop
        logits = torch.cat(parts, 1)
        assert bool(logits.isfinite().all())
        for row, own in enumerate(mask.bool()):
            if own.any():
                expected = model(ids[row : row + 1, own], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, own], expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generating_after_right_padding_is_what_the_model_does(family: str) -> None:
    model, (ids, mask) = tiny(family), padded(prompts_of(), "right")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(
        elastic(model, AllRetrieval).generate(ids, attention_mask=mask, **GREEDY), expected
    )


@pytest.mark.parametrize("cache", [None, "static"])
def test_generating_after_right_padding_goes_on_with_each_row(cache: str | None) -> None:
    """The tokens after the padding see the prompt, and not the padding."""
    model, (ids, mask) = (
        elastic(tiny(), elasticore.HeadTable([[1, 0]] * 3)),
        padded(prompts_of(), "right"),
    )
    more = {"cache_implementation": cache, "disable_compile": True}
    batch = model.generate(ids, attention_mask=mask, **GREEDY, **more)[:, ids.shape[1] :]
    for row in range(len(ids)):
        own = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **GREEDY)
        assert batch[row].tolist() == own[0, ids.shape[1] :].tolist()


def test_pad_tokens_inside_a_prompt_make_a_mask() -> None:
    """transformers infers one where none is given."""
    model, ids = tiny(), tokens(2, 40)
    ids[0, 12:15] = model.config.pad_token_id
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(elastic(model, AllRetrieval).generate(ids, **GREEDY), expected)


def test_a_cache_of_rows_of_unequal_length_goes_on() -> None:
    """Two prompts of their own lengths, padded on the right, and a question for each."""
    model = elastic(tiny(), elasticore.HeadTable([[1, 0]] * 3))
    prompts, question = [tokens(1, 40, 1), tokens(1, 25, 2)], tokens(2, 12, 3)
    ids, mask = padded(prompts, "right")
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, **cached(cache))
    longer = torch.cat([mask, torch.ones_like(question)], 1)
    places = positions_of(longer)[:, 40:]
    logits = model(question, attention_mask=longer, position_ids=places, **cached(cache)).logits
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, question[row : row + 1]], 1)
        expected = model(text).logits[0, -12:]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


def test_holes_train_as_the_texts_without_them() -> None:
    def gradients(ids: Tensor, **arguments: Any) -> list[Tensor]:
        model = elasticore.elasticize(tiny(), small())
        for seed, router in enumerate(elasticore.routers(model)):
            torch.manual_seed(seed)
            for parameter in router.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.5)
        one = elasticore.Pass()
        model.train()
        torch.manual_seed(5)
        logits = model(ids, use_cache=False, elastic=one, **arguments).logits
        own = arguments.get("attention_mask", torch.ones_like(ids)).bool()
        (
            logits[own].pow(2).mean() + torch.cat([r.sparse() for r in one.routings]).mean()
        ).backward()
        return [p.grad for r in elasticore.routers(model) for p in r.parameters()]

    ids, mask = tokens(1, 90), holed(1, 90, 4)
    with_holes = gradients(ids, attention_mask=mask, position_ids=positions_of(mask))
    without = gradients(ids[:, mask[0].bool()])
    for one, two in zip(with_holes, without, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
