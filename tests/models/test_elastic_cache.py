"""A cache that gives memory back writes what a dense one writes, whatever is done to it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import elasticore as ec
from elasticore.models.paged_cache import PagedLayer

from .tiny import (
    CLOSE,
    HALF,
    MODELS,
    SETTINGS,
    ByContent,
    cache_of,
    cached,
    elastic,
    small,
    tiny,
    tokens,
)

LENGTH = 150
"""Of a prompt; a streaming head reads 48 tokens and keeps 64."""
Session = Callable[[Any], list[Tensor]]


def ways(**changes: Any) -> list[ec.Elastic]:
    return [dataclasses.replace(SETTINGS, cache=kind, **changes) for kind in ("dense", "elastic")]


def both(session: Session, model: Any = None, **changes: Any) -> None:
    """What a session returns is the same with both caches."""
    model = tiny() if model is None else model
    found = []
    for way in ways(**changes):
        elastic(model, ByContent, way)
        try:
            found.append(session(model))
        finally:
            ec.restore(model)
    for dense, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense, **CLOSE)


def prompts(rows: int = 3, length: int = LENGTH) -> Tensor:
    """Prompts that ByContent routes differently."""
    return torch.cat([tokens(1, length, seed) for seed in range(rows)])


def prefilled(model: Any, rows: Tensor, **kwargs: Any) -> Any:
    return cache_of(model(rows, **cached(DynamicCache(config=model.config)), **kwargs))


def paged(cache: Any) -> list[PagedLayer]:
    return [
        one.inner for one in cache.layers if isinstance(getattr(one, "inner", None), PagedLayer)
    ]


@pytest.mark.parametrize("family", MODELS)
def test_every_family_writes_the_same(family: str) -> None:
    def session(model: Any) -> list[Tensor]:
        cache = prefilled(model, prompts())
        return [model(tokens(3, 1, step), **cached(cache)).logits for step in range(70)]

    both(session, tiny(family))


def test_generate_writes_the_same_with_beams_and_with_drafts() -> None:
    def session(model: Any) -> list[Tensor]:
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        repeated = tokens(1, 30, 5).repeat(1, 5)  # so that prompt lookup finds drafts
        return [
            model.generate(prompts(2), num_beams=3, **settings),
            model.generate(repeated, prompt_lookup_num_tokens=5, **settings),
            model.generate(prompts(2), **settings),
        ]

    both(session)


def test_rows_with_padding_on_either_side() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :60], mask[1, 90:] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def session(model: Any) -> list[Tensor]:
        cache = prefilled(model, prompts(), attention_mask=mask, position_ids=places)
        whole, last, found = mask, places.amax(1, keepdim=True), []
        for step in range(40):
            new = torch.ones(3, 1 + step % 3, dtype=torch.long)
            if new.shape[1] == 2:
                new[2, 0] = 0  # padding between what is generated
            whole, own = torch.cat([whole, new], 1), last + new.cumsum(1)
            last = own.amax(1, keepdim=True)
            out = model(
                tokens(3, new.shape[1], step),
                attention_mask=whole,
                position_ids=own.clamp(min=0),
                logits_to_keep=new.shape[1],
                **cached(cache),
            )
            found.append(out.logits * new[:, :, None])
        return found

    both(session)


STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 5)),
    st.tuples(st.just("crop"), st.integers(1, 6)),
    st.tuples(st.just("reorder"), st.permutations(range(3))),
    st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)),
    st.tuples(st.just("repeat"), st.integers(2, 2)),
    st.tuples(st.just("copy"), st.sampled_from(["copy", "pickle"])),
    st.tuples(st.just("turn"), st.integers(2, 90)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=10))
def test_whatever_is_done_to_it(steps: list[tuple[str, Any]]) -> None:
    """Sequences of operations; a crop takes no more than was written, nor than is kept."""

    def session(model: Any) -> list[Tensor]:
        cache = prefilled(model, prompts())
        rows, written, found = 3, 0, []
        for number, (name, value) in enumerate([("write", 1), *steps, ("write", 1)]):
            if name == "write":
                ids = tokens(rows, value, 100 + number)
                found.append(model(ids, logits_to_keep=value, **cached(cache)).logits)
                written += value
            elif name == "turn":
                found.append(model(tokens(rows, value, number), **cached(cache)).logits)
                written = 0
            elif name == "crop":
                cache.crop(-min(value, written))
                written -= min(value, written)
            elif name == "copy":
                copied = pickle.loads(pickle.dumps(cache))
                cache = copy.deepcopy(cache) if value == "copy" else copied
            elif name == "repeat":
                if rows <= 3:
                    cache.batch_repeat_interleave(value)
                    rows *= value
            elif name == "reorder":
                cache.reorder_cache(torch.tensor([x % rows for x in range(rows)][::-1]))
            else:
                chosen = sorted({x % rows for x in value})
                cache.batch_select_indices(torch.tensor(chosen))
                rows = len(chosen)
        return found

    both(session, turn="keep")


def test_memory_is_given_back_once_tokens_are_generated() -> None:
    dense, ours = (elastic(tiny(), ec.AllSparse, way) for way in ways())
    ids = prompts(2, 400)
    caches = [prefilled(model, ids) for model in (dense, ours)]
    assert not paged(caches[1]), "later chunks of a prompt may still be routed otherwise"
    for model, cache in zip((dense, ours), caches, strict=True):
        model(tokens(2, 1, 0), **cached(cache))
    layers = paged(caches[1])
    assert len(layers) == 3 and not paged(caches[0])
    whole = sum(x.nbytes for x in (caches[0].layers[0].keys, caches[0].layers[0].values))
    # A sink of 16, a window of 32 and a spare block of 16, of 401 tokens; and a table.
    assert layers[0].pool.nbytes <= whole * (64 + 8) / 401
    assert layers[0].nbytes() < whole / 4


def test_a_prompt_that_is_no_longer_than_what_is_kept_stays_dense() -> None:
    model = elastic(tiny(), ByContent, ways()[1])
    cache = prefilled(model, prompts(1, 40))
    for step in range(30):
        assert bool(paged(cache)) == (40 + step > 65)
        model(tokens(1, 1, step), **cached(cache))


def test_what_is_gone_is_said() -> None:
    model = elastic(tiny(), ByContent, ways()[1])
    cache = prefilled(model, prompts())
    for step in range(30):
        model(tokens(3, 1, step), **cached(cache))
    kept = copy.deepcopy(cache)
    with pytest.raises(ec.ElasticoreError, match="streaming heads have kept 16 behind"):
        cache.crop(-17)
    with pytest.raises(ec.ElasticoreError, match="into the prompt of 150"):
        cache.crop(-31)
    with pytest.raises(ec.ElasticoreError, match="attend with turn='keep'"):
        model(tokens(3, 8, 1), **cached(cache))
    # Nothing was lost by asking.
    step = tokens(3, 1, 77)
    ours = model(step, **cached(cache)).logits
    assert torch.equal(ours, model(step, **cached(kept)).logits)


def test_a_cache_starts_over() -> None:
    model = elastic(tiny(), ByContent, ways()[1])
    cache = prefilled(model, prompts())
    model(tokens(3, 1, 0), **cached(cache))
    assert paged(cache)
    cache.reset()
    again = model(prompts(), **cached(cache)).logits
    torch.testing.assert_close(again, model(prompts()).logits, **CLOSE)


def test_an_offloaded_cache_stays_dense() -> None:
    model = elastic(tiny(), ByContent, ways()[1])
    cache = prefilled(model, prompts())
    cache.offloading = True  # what transformers would do with it needs a GPU
    cache.update = lambda k, v, index, *args, **kwargs: cache.layers[index].update(k, v)
    model(tokens(3, 1, 0), **cached(cache))
    assert not paged(cache)


def test_pages_move_to_the_cpu_and_back() -> None:
    model = elastic(tiny(), ByContent, ways()[1])
    cache = prefilled(model, prompts())
    model(tokens(3, 1, 0), **cached(cache))
    kept = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    step = tokens(3, 1, 1)
    assert torch.equal(model(step, **cached(cache)).logits, model(step, **cached(kept)).logits)


def test_heads_that_select_keep_all() -> None:
    for way in (
        small("fa-xa", HALF),
        small("xa-ssa", HALF),
        dataclasses.replace(SETTINGS, decode="full"),
    ):
        model = elastic(tiny(), ByContent, dataclasses.replace(way, cache="elastic"))
        cache = prefilled(model, prompts())
        model(tokens(3, 1, 0), **cached(cache))
        # Selectors read everything while decoding, beside heads that stream.
        assert bool(paged(cache)) == (way.retrieval != ec.Full() and way.decode == "routed")


def test_a_pass_over_pages_is_recorded() -> None:
    records = []
    for way in ways():
        model = elastic(tiny(), ByContent, way)
        cache = prefilled(model, prompts())
        model(tokens(3, 1, 0), **cached(cache))
        with ec.record() as trace:
            model(tokens(3, 1, 1), **cached(cache))
        records.append(trace.passes[0])
    dense, ours = records
    assert torch.equal(dense.decisions, ours.decisions)
    assert torch.equal(dense.esr, ours.esr) and torch.equal(dense.keys, ours.keys)
    assert ours.backend == "serial"


def test_a_way_says_what_its_cache_is(tmp_path: Any) -> None:
    way = ec.Elastic(ec.AllSparse(), cache="elastic", turn="keep")
    assert ec.Elastic.load(way.save(tmp_path)).cache == "elastic"
    with pytest.raises(ValueError, match="cache must be one of dense, elastic, got 'small'"):
        ec.Elastic(cache="small")  # type: ignore[arg-type]
