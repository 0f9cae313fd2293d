"""torch.compile of an elastic model: the same results, with one graph break at each attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import elasticore

from .tiny import CLOSE, MIXED, cache_of, cached, elastic, first_head_sparse, tiny, tokens


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def test_prompts_of_any_shape() -> None:
    model = elastic(tiny(num_hidden_layers=1))
    compiled = torch.compile(model, backend="aot_eager")
    for prompt in (tokens(2, 70), tokens(2, 70, 1), tokens(1, 40)):
        torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits, **CLOSE)


def test_layers_that_the_model_keeps_local() -> None:
    model = elastic(tiny("gemma3_text", num_hidden_layers=2, layer_types=MIXED[:2]))
    prompt = tokens(2, 70)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(prompt).logits, model(prompt).logits, **CLOSE)


def test_decoding() -> None:
    model, text = elastic(tiny(num_hidden_layers=1), first_head_sparse), tokens(1, 60)
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(text, use_cache=False).logits
    cache = cache_of(compiled(text[:, :57]))
    for step in range(57, 60):
        logits = compiled(text[:, step : step + 1], **cached(cache)).logits
        torch.testing.assert_close(logits[:, 0], expected[:, step], **CLOSE)


def test_restoring_a_compiled_model_is_seen() -> None:
    model, prompt = tiny(num_hidden_layers=1), tokens(1, 70)
    dense = model(prompt).logits
    compiled = torch.compile(elastic(model, first_head_sparse), backend="aot_eager")
    assert (compiled(prompt).logits - dense).abs().max() > 1e-3
    elasticore.restore(model)
    torch.testing.assert_close(compiled(prompt).logits, dense, **CLOSE)
