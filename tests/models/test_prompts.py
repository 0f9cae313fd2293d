"""A decision is made from the prompt: in chunks, beside drafts, over turns, after cuts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

import elasticore
from elasticore import AllRetrieval, Pass, Routing, Segments, pool_boundary

from .tiny import CLOSE, FAMILIES, SETTINGS, cache_of, cached, elastic, small, tiny, tokens

SHORT: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
BOUNDARY = 10


class FirstLayer(nn.Module):
    """Decides by the keys that it is shown; keeps what it pooled and how much that was."""

    def __init__(self, boundary: int | None = BOUNDARY) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide."""
        self.pooled = pool_boundary(keys, segments, self.boundary)
        self.counted = segments.key_length
        return Routing((self.pooled.sum(-1) > 0).to(torch.int8))


def listening(boundary: int | None = BOUNDARY, family: str = "llama", **way: Any) -> Any:
    """An elastic model whose every layer keeps what it pooled."""
    made = dataclasses.replace(SETTINGS, **way)
    return elastic(tiny(family), lambda: FirstLayer(boundary), made)


def pooled(model: Any) -> Tensor:
    """What the first layer's policy pooled last: its keys depend on no routing."""
    return elasticore.routers(model)[0].pooled


def whole(model: Any, text: Tensor, **kwargs: Any) -> Tensor:
    """What the first layer pools of a text in one go."""
    model(text, use_cache=False, **kwargs)
    return pooled(model)


# Chunks.


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    boundary=st.sampled_from([1, 3, 10, 25, None]),
    family=st.sampled_from(FAMILIES),
)
def test_chunks_decide_what_one_prefill_does(
    lengths: list[int], boundary: int | None, family: str
) -> None:
    model, text = listening(boundary, family), tokens(2, sum(lengths))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk in text.split(lengths, 1):
            model(chunk, **cached(cache))
        chunks, counted = pooled(model), elasticore.routers(model)[0].counted
        expected = whole(model, text)
    assert torch.equal(counted, elasticore.routers(model)[0].counted)
    # The keys of few tokens and of many are the same up to the order of a sum of 64 products.
    torch.testing.assert_close(chunks, expected, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    padding=st.lists(st.integers(0, 50), min_size=3, max_size=3),
)
def test_chunks_of_padded_rows_decide_what_their_texts_do(
    lengths: list[int], padding: list[int]
) -> None:
    model, width = listening(), sum(lengths)
    ids, mask = tokens(3, width), torch.ones(3, width, dtype=torch.long)
    for row, pad in enumerate(padding):
        mask[row, : min(pad, width - 1)] = 0
    cache, seen = DynamicCache(config=model.config), 0
    with torch.no_grad():
        for chunk in ids.split(lengths, 1):
            seen += chunk.shape[1]
            model(chunk, attention_mask=mask[:, :seen], **cached(cache))
        chunks = pooled(model)
        for row in range(3):
            alone = whole(model, ids[row : row + 1, mask[row].bool()])
            torch.testing.assert_close(chunks[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [16, 24, 32])
def test_generate_in_chunks_decides_from_the_whole_prompt(size: int) -> None:
    model, prompt = listening(), tokens(2, 70)
    with elasticore.record() as one:
        model.generate(prompt, **SHORT)
    with elasticore.record() as chunked:
        model.generate(prompt, prefill_chunk_size=size, **SHORT)
    assert [p.decided for p in chunked.passes].count(True) == -(-70 // size)
    # The first layer's decision is exact; what later layers see has been touched by the routing of
    # earlier chunks.
    assert torch.equal(chunked.decisions[0], one.decisions[0])
    for later in chunked.passes[-11:]:
        assert not later.decided and torch.equal(later.decisions, chunked.decisions)


def test_a_last_chunk_of_one_token_counts_as_generated() -> None:
    """Nothing tells it from a step of decoding; a :class:`Pass` can."""
    model, prompt = listening(), tokens(2, 65)
    model.generate(prompt, prefill_chunk_size=32, **SHORT)
    last = pooled(model)
    torch.testing.assert_close(last, whole(model, prompt[:, :64]), rtol=0, atol=1e-5)


def test_with_full_attention_all_layers_of_a_chunked_prefill_decide_the_same() -> None:
    model = listening(retrieval=elasticore.Streaming(16, 128), sparse=elasticore.Full())
    prompt = tokens(2, 70)
    with elasticore.record() as one:
        model.generate(prompt, **SHORT)
    with elasticore.record() as chunked:
        model.generate(prompt, prefill_chunk_size=24, **SHORT)
    assert torch.equal(chunked.decisions, one.decisions)


# Prompts that are read in full.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["fa-ssa", "xa-ssa"])
def test_a_prompt_can_be_read_in_full_and_answered_as_routed(family: str, mode: str) -> None:
    backbone, prompt, next_token = tiny(family), tokens(2, 150), tokens(2, 1, 9)
    full = backbone(prompt).logits
    model = elastic(tiny(family), way=small(mode, prefill="full"))
    with elasticore.record() as trace:
        read = model(prompt)
    assert 0 < trace.decisions.float().mean() < 1
    torch.testing.assert_close(read.logits, full, rtol=0, atol=1e-5)
    # From here on it matters what was decided.
    answered = model(next_token, **cached(cache_of(read))).logits
    plain = elastic(tiny(family), AllRetrieval, small("fa-ssa"))
    whole = plain(next_token, **cached(cache_of(plain(prompt)))).logits
    assert not torch.allclose(answered, whole, rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, 60), seed=st.integers(0, 9))
def test_chunks_of_any_size_read_a_prompt_alike_in_full(chunk: int, seed: int) -> None:
    model, prompt = elastic(tiny(), way=small(prefill="full")), tokens(1, 100, seed)
    whole = model(prompt)
    cache: Any = DynamicCache(config=model.config)
    for start in range(0, 100, chunk):
        part = prompt[:, start : start + chunk]
        last = model(part, **cached(cache), elastic=Pass(prompt=part.shape[1]))
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], rtol=0, atol=1e-5)
    answers = [model(tokens(1, 1, 7), **cached(c)).logits for c in (cache, cache_of(whole))]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)


def told(text: Tensor, prompts: list[int], model: Any, layout: str) -> Tensor:
    """Logits ``[B, T, vocabulary]`` of texts in one pass that is told their prompts, unpadded."""
    rows, length = text.shape
    known = torch.tensor(prompts)
    if layout == "packed":
        positions = torch.arange(length).repeat(rows)[None]
        packed = model(
            text.view(1, -1), position_ids=positions, elastic=Pass(prompt=known), use_cache=False
        )
        return packed.logits.view(rows, length, -1)
    if layout == "dense":
        return model(text, elastic=Pass(prompt=known)).logits
    at = {"left": slice(7, None), "right": slice(0, length)}[layout]
    padded, mask = (torch.zeros(rows, length + 7, dtype=torch.long) for _ in range(2))
    padded[:, at], mask[:, at] = text, 1
    logits = model(padded, attention_mask=mask, elastic=Pass(prompt=known)).logits
    return logits[:, at]


@pytest.mark.parametrize("mode", ["fa-ssa", "xa-ssa"])
@pytest.mark.parametrize("layout", ["dense", "left", "right", "packed"])
def test_answers_beside_a_prompt_are_read_as_if_they_came_one_by_one(
    layout: str, mode: str
) -> None:
    model = elastic(tiny(), way=small(mode, prefill="full"))
    text, prompts = tokens(2, 130), [100, 90]
    together = told(text, prompts, model, layout)
    for row, prompt in enumerate(prompts):
        own = text[row : row + 1]
        cache = cache_of(model(own[:, :prompt]))
        for place in range(prompt, 130):
            alone = model(own[:, place : place + 1], **cached(cache)).logits[0, 0]
            torch.testing.assert_close(together[row, place], alone, **CLOSE)


def test_routers_do_not_train_where_prompts_are_read_in_full() -> None:
    model = elasticore.elasticize(tiny(), small(prefill="full")).train()
    with pytest.raises(ValueError, match="prefill must be 'routed' while routers train"):
        model(tokens(1, 70), use_cache=False)


# Drafts.


@pytest.mark.parametrize("decode", ["routed", "full"])
@pytest.mark.parametrize("seed", range(4))
def test_prompt_lookup_is_routed_as_greedy_decoding_is(decode: Any, seed: int) -> None:
    model = elastic(tiny(), way=small(decode=decode))
    prompt = tokens(1, 30, seed).repeat(1, 4)  # so that drafts are found in the first pass
    with elasticore.record() as greedy:
        expected = model.generate(prompt, **SHORT)
    with elasticore.record() as lookup:
        found = model.generate(prompt, prompt_lookup_num_tokens=10, **SHORT)
    assert lookup.prefill.queries.item() > 120  # they were
    assert torch.equal(lookup.decisions, greedy.decisions)
    assert [one.decided for one in lookup.passes].count(True) == 1
    if decode == "routed":  # a draft is checked in a prefill, which full decoding is not in
        assert torch.equal(found, expected)


@pytest.mark.parametrize("drafts", [3, 40])  # fewer than a block, and more
def test_drafts_are_no_prompt_to_read_in_full(drafts: int) -> None:
    model = elastic(tiny(), way=small(prefill="full"))
    prompt = tokens(1, 30).repeat(1, 4)
    expected = model.generate(prompt, **SHORT | {"max_new_tokens": 60})
    found = model.generate(
        prompt, prompt_lookup_num_tokens=drafts, **SHORT | {"max_new_tokens": 60}
    )
    assert torch.equal(found, expected)


def test_assisted_decoding_is_routed_as_greedy_decoding_is() -> None:
    model, assistant = elastic(tiny()), elastic(tiny(seed=1, num_hidden_layers=1))
    prompt = tokens(1, 70)
    with elasticore.record() as greedy:
        expected = model.generate(prompt, **SHORT)
    with elasticore.record() as assisted:
        assert torch.equal(model.generate(prompt, assistant_model=assistant, **SHORT), expected)
    own = [one for one in assisted.passes if one.decisions.shape[0] == 3]
    assert torch.equal(own[0].decisions, greedy.decisions)
    assert [one.decided for one in own] == [True] + [False] * (len(own) - 1)


@pytest.mark.parametrize("kept", [1, 2, 30])
@pytest.mark.parametrize("cache", [True, False])
def test_tokens_whose_logits_are_asked_for_are_no_prompt(kept: int, cache: bool) -> None:
    model, text = listening(), tokens(2, 70)
    model(text, logits_to_keep=kept, use_cache=cache)
    prompt = 70 - (kept - 1)
    torch.testing.assert_close(pooled(model), whole(model, text[:, :prompt]), rtol=0, atol=1e-5)


def test_a_pass_can_be_told_its_prompt() -> None:
    model, text = listening(), tokens(2, 70)
    model(text, elastic=Pass(prompt=torch.tensor([30, 50])), use_cache=False)
    told = pooled(model)
    for row, length in enumerate((30, 50)):
        alone = whole(model, text[row : row + 1, :length])
        torch.testing.assert_close(told[row : row + 1], alone, rtol=0, atol=1e-5)


def test_packed_sequences_can_be_told_their_prompts() -> None:
    model, text = listening(), tokens(1, 70)
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    prompts = torch.tensor([20, 35])
    model(text, position_ids=positions, elastic=Pass(prompt=prompts), use_cache=False)
    told = pooled(model)
    for sequence, own in enumerate((text[:, :20], text[:, 30:65])):
        alone = whole(model, own)
        torch.testing.assert_close(told[sequence : sequence + 1], alone, rtol=0, atol=1e-5)


def test_one_token_can_be_told_to_be_prompt() -> None:
    model, text = listening(), tokens(1, 33)
    cache = cache_of(model(text[:, :32]))
    model(text[:, 32:], **cached(cache), elastic=Pass(prompt=1))
    last = pooled(model)
    torch.testing.assert_close(last, whole(model, text), rtol=0, atol=1e-5)


def test_an_answer_that_is_scored_on_a_cache_decides_nothing() -> None:
    model, text = listening(), tokens(1, 80)
    cache = cache_of(model(text[:, :60]))
    with elasticore.record() as trace:
        logits = model(text[:, 60:], **cached(cache), logits_to_keep=20).logits
    assert logits.shape[1] == 20 and not trace.passes[0].decided


@pytest.mark.parametrize("steps", [[400], [1] * 50, [7] * 30])
def test_what_is_put_off_is_bounded_in_tokens(steps: list[int]) -> None:
    """Inputs of passes that decide nothing are not kept alive without end."""
    model, cache = listening(), DynamicCache(config=tiny().config)
    model(tokens(2, 40), **cached(cache))
    for step, length in enumerate(steps):
        model(tokens(2, length, step), **cached(cache), logits_to_keep=length)
        cache.reorder_cache(torch.tensor([1, 0]))
        waiting = [x for x in cache.layers[0].memory.pending if not isinstance(x, Tensor)]
        assert sum(hidden.shape[1] for hidden, _ in waiting) < 2 * BOUNDARY
        assert len(cache.layers[0].memory.pending) <= 2 * BOUNDARY


# Turns.


@pytest.mark.parametrize("length", [5, 60])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_further_turn_is_decided_as_the_whole_text_is(length: int, family: str) -> None:
    model, prompt = listening(family=family), tokens(1, 70)
    said = model.generate(prompt, return_dict_in_generate=True, **SHORT)
    more = torch.cat([said.sequences, tokens(1, length, 1)], 1)
    with elasticore.record() as trace:
        model.generate(more, **cached(cache_of(said)), **SHORT)
    assert [one.decided for one in trace.passes] == [True] + [False] * 11
    renewed = trace.decisions[0]
    last = pooled(model)
    torch.testing.assert_close(last, whole(model, more), rtol=0, atol=1e-5)
    assert torch.equal(trace.passes[-1].decisions[0], renewed)
    assert trace.msr.shape == (1,)


@pytest.mark.parametrize("length", [5, 60])
def test_a_further_turn_can_keep_the_routing_of_the_first(length: int) -> None:
    model, prompt = elastic(tiny(), way=small(turn="keep")), tokens(1, 70)
    with elasticore.record() as first:
        said = model.generate(prompt, return_dict_in_generate=True, **SHORT)
    more = torch.cat([said.sequences, tokens(1, length, 1)], 1)
    with elasticore.record() as trace:
        model.generate(more, **cached(cache_of(said)), **SHORT)
    assert not any(one.decided for one in trace.passes)
    for one in trace.passes:
        assert torch.equal(one.decisions, first.decisions)
    assert torch.equal(trace.msr, first.msr)  # of the decisions in force


@pytest.mark.parametrize("turn", ["renew", "keep"])
def test_static_policies_answer_a_further_turn_as_a_new_prompt(turn: Any) -> None:
    model = elastic(tiny(), elasticore.HeadTable([[1, 0]] * 3), small(turn=turn))
    prompt = tokens(1, 70)
    said = model.generate(prompt, return_dict_in_generate=True, **SHORT)
    more = torch.cat([said.sequences, tokens(1, 40, 1)], 1)
    again = model.generate(more, **cached(cache_of(said)), **SHORT)
    assert torch.equal(again, model.generate(more, **SHORT))


# Cuts.


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_below_the_prompt_forgets_its_decision(seed: int) -> None:
    model = listening()
    context, first, second = (tokens(1, n, seed + i) for i, n in enumerate((60, 40, 40)))
    cache = cache_of(model(torch.cat([context, first], 1)))
    cache.crop(-40)
    with elasticore.record() as trace:
        model(second, **cached(cache))
    assert trace.passes[0].decided
    last = pooled(model)
    torch.testing.assert_close(
        last, whole(model, torch.cat([context, second], 1)), rtol=0, atol=1e-5
    )


def test_after_a_cut_a_single_token_decides_from_all_there_is() -> None:
    model, text = listening(), tokens(1, 60)
    cache = cache_of(model(text))
    cache.crop(-BOUNDARY)
    model(text[:, 50:51], **cached(cache))
    last = pooled(model)
    torch.testing.assert_close(last, whole(model, text[:, :51]), rtol=0, atol=1e-5)


def test_a_cut_deeper_than_what_is_kept_decides_from_what_is_left() -> None:
    model, text = listening(), tokens(1, 60)
    cache = cache_of(model(text))
    cache.crop(-30)
    model(text[:, 30:35], **cached(cache))
    # The first ten, and the five new ones; those before them are no longer known.
    assert elasticore.routers(model)[0].counted.item() == 15
    last, ends = pooled(model), torch.cat([text[:, :10], text[:, 30:35]], 1)
    torch.testing.assert_close(last, whole(model, ends), rtol=0, atol=1e-5)


def test_a_cut_of_generated_tokens_keeps_the_decision() -> None:
    model, text = elastic(tiny()), tokens(1, 66)
    cache = cache_of(model(text[:, :60]))
    for step in range(60, 66):
        model(text[:, step : step + 1], **cached(cache))
    cache.crop(-4)
    with elasticore.record() as trace:
        model(text[:, 62:63], **cached(cache))
    assert not trace.passes[0].decided and trace.passes[0].keys.item() == 63


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_of_passes_and_cuts_pools_what_the_text_has(data: st.DataObject) -> None:
    """Prompts, generated tokens and cuts in any order, on rows that also move."""
    model, text = listening(boundary=5), tokens(3, 0)
    cache, vocabulary = DynamicCache(config=model.config), 7
    with torch.no_grad():
        for _ in range(data.draw(st.integers(1, 8))):
            kind = data.draw(st.sampled_from(["prompt", "generate", "cut", "rows"]))
            vocabulary += 1
            if kind == "cut" and text.shape[1] > 1:
                # As many tokens as the end of a prompt holds beyond what is pooled.
                removed = data.draw(st.integers(1, min(5, text.shape[1] - 1)))
                cache.crop(-removed)
                text = text[:, :-removed]
            elif kind == "rows" and text.shape[1]:
                rows = torch.tensor(data.draw(st.permutations([0, 1, 2])))
                cache.reorder_cache(rows)
                text = text[rows]
            elif kind == "generate" and text.shape[1]:
                for step in range(data.draw(st.integers(1, 14))):
                    token = tokens(3, 1, 100 * vocabulary + step)
                    model(token, **cached(cache))
                    text = torch.cat([text, token], 1)
            elif kind == "prompt":
                chunk = tokens(3, data.draw(st.integers(2, 30)), vocabulary)
                model(chunk, **cached(cache))
                text = torch.cat([text, chunk], 1)
        chunk = tokens(3, 6, 1)  # ends with a prompt, more tokens than a cut may have lost
        model(chunk, **cached(cache))
        text = torch.cat([text, chunk], 1)
        last = pooled(model)
        torch.testing.assert_close(last, whole(model, text), rtol=0, atol=1e-5)


# What a pass holds.


def test_a_pass_serves_one_forward() -> None:
    model, one = elastic(tiny()), Pass()
    model(tokens(1, 20), elastic=one)
    assert len(one.routings) == 3
    with pytest.raises(ValueError, match="make a Pass for each"):
        model(tokens(1, 20), elastic=one)


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(TypeError, match=r"elastic must be an elasticore.Pass, got True"):
        elastic(tiny())(tokens(1, 20), elastic=True)
    with pytest.raises(TypeError, match="prompt must be an int, a tensor or None"):
        Pass(prompt="all")


def test_a_pass_can_name_its_backend() -> None:
    model = elastic(tiny(), AllRetrieval)
    with elasticore.record() as trace:
        model(tokens(1, 20), elastic=Pass(backend="serial"))
    assert trace.passes[0].backend == "serial" and trace.passes[0].backend_reason == ""
