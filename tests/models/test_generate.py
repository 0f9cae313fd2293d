"""generate(): every decoding strategy and cache, with the routing of the prompt kept throughout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import elasticore
from elasticore import AllRetrieval, AllSparse, ElasticoreError, HeadMode

from .tiny import (
    CLOSE,
    HALF,
    SETTINGS,
    ByContent,
    cache_of,
    cached,
    elastic,
    first_head_sparse,
    small,
    tiny,
    tokens,
)

FULL, STREAMING, SELECTED = (int(mode) for mode in HeadMode)
SHORT = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
GREEDY: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prefill in chunks": {"prefill_chunk_size": 32},
    "prefill in ragged chunks": {"prefill_chunk_size": 23},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
OTHERS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


def generate(model: Any, prompt: Tensor, **settings: Any) -> Any:
    """New tokens only; seeded."""
    torch.manual_seed(0)
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, **{**SHORT, **settings})
    return output[:, prompt.shape[1] :]


def prompt_of(strategy: str) -> Tensor:
    return tokens(1 if strategy == "prompt lookup" else 2, 70)  # lookup wants one row


# Against the model itself, and against the definition.


@pytest.mark.parametrize("strategy", [*GREEDY, *OTHERS])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_all_heads_full_generate_what_the_model_does(family: str, strategy: str) -> None:
    model, prompt = tiny(family), prompt_of(strategy)
    settings = {**GREEDY, **OTHERS}[strategy]
    expected = generate(model, prompt, **settings)
    assert torch.equal(generate(elastic(model, AllRetrieval), prompt, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_decoding_is_a_full_forward_with_the_same_modes(family: str) -> None:
    model, text = elastic(tiny(family), first_head_sparse), tokens(2, 100)
    expected = model(text, use_cache=False).logits
    cache = cache_of(model(text[:, :60]))
    for step in range(60, 100):
        logits = model(text[:, step : step + 1], **cached(cache)).logits
        torch.testing.assert_close(logits[:, 0], expected[:, step], **CLOSE)


@pytest.mark.parametrize("strategy", GREEDY)
def test_every_greedy_strategy_writes_the_same_text(strategy: str) -> None:
    model, prompt = elastic(tiny(), first_head_sparse), prompt_of(strategy)
    text = prompt
    for _ in range(SHORT["max_new_tokens"]):  # the definition: no cache, the whole text each time
        logits = model(text, use_cache=False).logits[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, prompt, **GREEDY[strategy]), text[:, 70:])


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("mode", ["fa-xa", "xa-ssa"])
def test_selected_heads_choose_the_same_blocks_in_chunks(mode: str, chunk: int) -> None:
    config = small(mode, selector=HALF)
    model, prompt = elastic(tiny(), first_head_sparse, config), tokens(1, 128)
    with elasticore.record() as trace:
        whole = model(prompt).logits
    assert trace.esr[0] > 0.05
    cache = DynamicCache(config=model.config)
    parts = [model(part, **cached(cache)).logits for part in prompt.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("mode", ["fa-xa", "xa-ssa"])
def test_a_static_cache_selects_what_a_dynamic_one_does(mode: str) -> None:
    config = small(mode, selector=HALF)
    model, prompt = elastic(tiny(), way=config), tokens(2, 70)
    with elasticore.record() as dynamic:
        expected = generate(model, prompt)
    with elasticore.record() as static:
        assert torch.equal(generate(model, prompt, **GREEDY["static cache"]), expected)
    for one, two in zip(dynamic.passes, static.passes, strict=True):
        assert torch.equal(one.esr, two.esr) and torch.equal(one.keys, two.keys)


def test_a_prompt_of_one_token() -> None:
    model, prompt = elastic(tiny(), first_head_sparse), tokens(2, 1)
    written = generate(model, prompt, max_new_tokens=60)
    logits = model(torch.cat([prompt, written], 1), use_cache=False).logits
    assert torch.equal(logits[:, :-1].argmax(-1), written)


def test_prompts_given_as_embeddings() -> None:
    model, prompt = elastic(tiny()), tokens(2, 70)
    embedded = model.get_input_embeddings()(prompt)
    mask = torch.ones_like(prompt)
    written = model.generate(inputs_embeds=embedded, attention_mask=mask, **SHORT)
    assert torch.equal(written, generate(model, prompt))


def test_assisted_decoding_with_an_elastic_assistant() -> None:
    model, prompt = elastic(tiny(), first_head_sparse), tokens(1, 70)
    assistant = elastic(tiny(seed=1, num_hidden_layers=1), AllSparse)
    expected = generate(model, prompt)
    assert torch.equal(generate(model, prompt, assistant_model=assistant), expected)


@pytest.mark.parametrize("settings", [{}, OTHERS["beams"]], ids=["greedy", "beams"])
def test_a_batch_writes_what_its_rows_write_alone(settings: dict[str, Any]) -> None:
    model, prompt = elastic(tiny()), tokens(2, 70)
    together = generate(model, prompt, **settings)
    alone = [generate(model, row[None], **settings) for row in prompt]
    assert torch.equal(together, torch.cat(alone))


# The routing of a prompt holds for its whole generation.


@pytest.mark.parametrize("strategy", ["greedy", "static cache", "beams"])
def test_routing_is_decided_once(strategy: str) -> None:
    model, prompt = elastic(tiny()), tokens(2, 70)
    with elasticore.record() as trace:
        generate(model, prompt, **{**GREEDY, **OTHERS}[strategy])
    first = trace.passes[0]
    assert [one.decided for one in trace.passes] == [True] + [False] * (len(trace.passes) - 1)
    assert len(trace.passes) >= 12
    assert 0 < first.decisions.float().mean() < 1  # both kinds
    for later in trace.passes[1:]:
        assert torch.equal(later.decisions, first.decisions)
        assert torch.equal(later.modes, first.modes)


def test_without_a_cache_every_pass_is_a_prompt_of_its_own() -> None:
    model, prompt = elastic(tiny()), tokens(1, 70)
    with elasticore.record() as trace:
        written = generate(model, prompt, use_cache=False)
    assert all(one.decided for one in trace.passes)
    for index, one in enumerate(trace.passes):
        with elasticore.record() as alone:
            model(torch.cat([prompt, written[:, :index]], 1), use_cache=False)
        assert torch.equal(one.decisions, alone.decisions)


def test_a_prefilled_cache_can_be_copied_and_continued() -> None:
    model, prefix = elastic(tiny()), tokens(1, 60)
    cache = cache_of(model(prefix))
    for seed in (1, 2):
        text = torch.cat([prefix, tokens(1, 20, seed)], 1)
        again = generate(model, text, **cached(copy.deepcopy(cache)))
        fresh = generate(model, text, **cached(cache_of(model(prefix))))
        assert torch.equal(again, fresh)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_is_routed_anew(kind: str) -> None:
    model = elastic(tiny())
    prompts = [tokens(2, 60, seed) for seed in (0, 1)]
    new: Callable[[], Any] = lambda: (  # noqa: E731
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=100)
    )
    cache, seen = new(), []
    for prompt in prompts:
        with elasticore.record() as trace:
            reused = generate(model, prompt, **cached(cache))
        cache.reset()
        if int(cache.get_seq_length()) > 0:
            pytest.skip("this transformers keeps the length of a dynamic cache that is reset")
        assert torch.equal(reused, generate(model, prompt, **cached(new())))
        seen.append(trace.decisions)
    assert not torch.equal(*seen)


# What heads do once the prompt is in.


def test_decode_full_reads_everything_after_the_prompt() -> None:
    config = small(decode="full")
    model, prompt = elastic(tiny(), AllSparse, config), tokens(2, 80)
    cache = cache_of(model(prompt))
    plain = copy.deepcopy(cache)
    token = tokens(2, 1, 1)
    with elasticore.record() as trace:
        logits = model(token, **cached(cache)).logits
    assert trace.passes[0].modes.unique().tolist() == [FULL]
    assert trace.passes[0].decisions.unique().tolist() == [1]  # what was decided stays on record
    assert trace.passes[0].esr.tolist() == [0.0, 0.0]
    expected = elasticore.restore(model)(token, **cached(plain)).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_all_steps_of_decoding_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend prepares for a plan is prepared once, and never used for another prompt."""
    model = elastic(tiny(), ByContent)
    plans = []

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: Any, **settings: Any) -> Tensor:
        plans.append(plan)
        return elasticore.hybrid_head_attention(q, k, v, plan, **settings)

    monkeypatch.setattr("elasticore.models.attend.hybrid_head_attention", attend)
    layers = model.config.num_hidden_layers
    one, other = (cache_of(model(tokens(1, 80, seed))) for seed in (1, 2))
    for cache in (one, one, other, one):
        model(tokens(1, 1, 1), **cached(cache))
    first, second, third, fourth = (plans[n * layers :][:layers] for n in (2, 3, 4, 5))
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert all(a is not b for a, b in zip(second, third, strict=True))
    for a, b in zip(first, fourth, strict=True):
        assert torch.equal(a.modes, b.modes)


def test_streaming_heads_go_on_streaming() -> None:
    model, prompt = elastic(tiny(), AllSparse), tokens(1, 80)
    cache = cache_of(model(prompt))
    with elasticore.record() as trace:
        model(tokens(1, 1, 1), **cached(cache))
    # Token 81 is the first of row block 5: it reads the sink, block 4 and itself.
    assert trace.passes[0].modes.unique().tolist() == [STREAMING]
    assert trace.passes[0].esr.tolist() == pytest.approx([1 - (16 + 16 + 1) / 81])


@pytest.mark.parametrize(
    ("length", "decode", "mode"),
    [(1, "routed", FULL), (15, "routed", FULL), (16, "routed", SELECTED), (1, "full", FULL)],
)
def test_selected_heads_run_full_until_there_is_a_block_to_score(
    length: int, decode: Any, mode: int
) -> None:
    config = small("fa-xa", decode=decode)
    model = elastic(tiny(), AllSparse, config)
    cache = cache_of(model(tokens(1, 80)))
    with elasticore.record() as trace:
        model(tokens(1, length, 1), **cached(cache))
    assert trace.passes[0].modes.unique().tolist() == [mode]


# Caches whose routing nobody knows.


def test_a_cache_from_before_is_refused() -> None:
    model = tiny()
    cache = cache_of(model(tokens(1, 20)))
    elastic(model)
    with pytest.raises(ElasticoreError, match="filled before this model was elastic"):
        model(tokens(1, 1), **cached(cache))


def test_a_cache_that_was_given_more_rows_is_refused() -> None:
    model = elastic(tiny(), ByContent, SETTINGS)
    cache = cache_of(model(tokens(1, 20)))
    with pytest.raises(ElasticoreError, match="prefilled with 1 sequences but now serves 3"):
        model(tokens(3, 1), **cached(cache))
