"""Packed sequences are their separate runs, and packing that a model cannot see is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

import elasticore
from elasticore import ElasticoreError

from .tiny import CLOSE, FAMILIES, HALF, cache_of, cached, elastic, small, tiny, tokens

LENGTHS = (60, 1, 90, 33)


def prompts_of() -> list[Tensor]:
    return [tokens(1, length, seed) for seed, length in enumerate(LENGTHS)]


def packed(*how: str) -> dict[str, Any]:
    """The prompts in one row, told apart by cumulative lengths, by positions or by both."""
    batch: dict[str, Any] = {"input_ids": torch.cat(prompts_of(), 1)}
    if "positions" in how:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    if "lengths" in how:
        cumulative = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        batch |= {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative}
    return batch


def check(model: Any, batch: dict[str, Any]) -> None:
    """Assert that ``batch`` gives the logits and decisions of the separate runs."""
    with elasticore.record() as together:
        logits = model(**batch).logits[0].split(LENGTHS)
    heads = model.config.num_key_value_heads
    assert together.decisions.shape == (len(elasticore.routers(model)), len(LENGTHS), heads)
    assert together.prefill.queries.tolist() == list(LENGTHS)
    for index, prompt in enumerate(prompts_of()):
        with elasticore.record() as alone:
            expected = model(prompt).logits[0]
        assert torch.equal(together.decisions[:, index], alone.decisions[:, 0])
        assert together.esr[index].item() == pytest.approx(alone.esr[0].item(), abs=1e-12)
        torch.testing.assert_close(logits[index], expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_separate_runs(family: str) -> None:
    check(elastic(tiny(family)), packed("positions", "lengths") | {"use_cache": False})


@pytest.mark.parametrize("how", ["positions", "lengths"])
def test_either_of_positions_and_lengths_is_enough(how: str) -> None:
    check(elastic(tiny()), packed(how) | {"use_cache": False})


@pytest.mark.parametrize("mode", ["fa-xa", "xa-ssa"])
def test_blocks_are_selected_inside_each_packed_sequence(mode: str) -> None:
    config = small(mode, selector=HALF)
    model = elastic(tiny(), way=config)
    with elasticore.record() as trace:
        check(model, packed("positions") | {"use_cache": False})
    assert trace.passes[0].esr.max() > 0.05


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_flattening_collator_works_end_to_end(family: str) -> None:
    model = elastic(tiny(family))
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [prompt[0].tolist() for prompt in prompts_of()]
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    output = model(**batch, use_cache=False)
    # A sequence's first token is no label, so the loss is the mean over all the others.
    losses = [
        cross_entropy(model(prompt).logits[0, :-1], prompt[0, 1:], reduction="sum")
        for prompt in prompts_of()
    ]
    expected = sum(losses) / (sum(LENGTHS) - len(LENGTHS))
    torch.testing.assert_close(output.loss, expected, **CLOSE)
    check(model, {**batch, "labels": None, "use_cache": False})


# Packing that would go unseen.


def test_packing_and_padding_together_are_refused() -> None:
    model = elastic(tiny())
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask and cu_seq_lens_q were both given"):
        model(**packed("lengths"), attention_mask=mask)
    with pytest.raises(ValueError, match="position_ids start over between valid tokens"):
        model(**packed("positions"), attention_mask=mask, use_cache=False)


def test_positions_that_start_over_inside_padding_are_fine() -> None:
    model, ids = elastic(tiny()), tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate() makes them
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0, 20:], model(ids[:1, 20:]).logits[0], **CLOSE)


def test_packing_in_more_than_one_row_is_refused() -> None:
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1)
    with pytest.raises(ValueError, match="batch of 2 rows; pack sequences into one row"):
        elastic(tiny())(tokens(2, 50), position_ids=positions, use_cache=False)


@pytest.mark.parametrize(
    "batch",
    [packed("lengths") | {"use_cache": False}, packed("positions", "lengths")],
    ids=["no positions", "with a cache"],
)
def test_local_layers_that_would_mix_packed_sequences_are_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"position_ids must start over.*use_cache be False"):
        elastic(tiny("gemma3_text"))(**batch)


def test_a_packed_cache_cannot_be_continued_as_one_sequence() -> None:
    model = elastic(tiny())
    cache = cache_of(model(**packed("lengths")))
    with pytest.raises(ElasticoreError, match="prefilled with 4 sequences but now serves 1"):
        model(tokens(1, 1), **cached(cache))
