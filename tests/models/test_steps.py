"""Decoding on a static cache, compiled: one graph for all lengths, and what a model writes without.

Which tokens are written, what is decided afterwards, and what is said where a graph cannot be had.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

import elasticore as ec
from elasticore.models.paged_cache import PagedLayer

from .test_elastic_cache import paged, prompts, ways
from .test_prompts import BOUNDARY, listening, pooled, whole
from .tiny import CLOSE, FAMILIES, ByContent, cached, elastic, tiny, tokens

SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Compiler:
    """A backend of torch.compile that counts its graphs and the attention calls in them."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Compiler:
        return self  # generate copies its config

    def config(self, **changes: Any) -> CompileConfig:
        """For ``generate``, on a CPU too."""
        made = CompileConfig(fullgraph=True, dynamic=None, backend=self, mode=None, **changes)
        made._compile_all_devices = True
        return made


def static(model: Any, room: int = 260) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=room)


@pytest.mark.parametrize("kind", ["dense", "elastic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_compiles_one_graph_and_writes_the_same(family: str, kind: str) -> None:
    model = elastic(tiny(family), ByContent, ways()[kind == "elastic"])
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[1, :60] = 0
    compiler = Compiler()
    given = {**SETTINGS, "max_new_tokens": 40, "attention_mask": mask}
    expected = model.generate(prompts(), **given)
    written = model.generate(
        prompts(), cache_implementation="static", compile_config=compiler.config(), **given
    )
    assert torch.equal(written, expected)
    # What a model keeps inside a window is counted on the host by transformers: one more graph.
    assert len(compiler.graphs) == (2 if family == "gemma3_text" else 1)
    call = "paged_attention" if kind == "elastic" else "hybrid_head_attention"
    layers = sum(1 for layer in model.modules() if hasattr(layer, "attention_router"))
    assert sum(call in target for target in compiler.graphs[-1]) == layers


def test_the_whole_compiler_writes_the_same() -> None:
    model = elastic(tiny(num_hidden_layers=2), ByContent, ways()[1])
    config = CompileConfig(fullgraph=True, mode=None)
    config._compile_all_devices = True
    given = {**SETTINGS, "max_new_tokens": 20}
    expected = model.generate(prompts(2), **given)
    compiled = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(model.generate(prompts(2), **given, **compiled), expected)


def step(model: Any, cache: Any, count: int, compiler: Any = "eager", seed: int = 0) -> Tensor:
    """Logits of some tokens, one after the other, in compiled steps."""
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    rows = len(cache.layers[0].memory.decisions)
    new = [tokens(rows, 1, seed + number) for number in range(count)]
    return torch.cat([compiled(ids, **cached(cache)).logits for ids in new], 1)


@pytest.mark.parametrize("length", [5, 60])
@pytest.mark.parametrize("steps", [3, 2 * BOUNDARY, 50])
def test_a_further_turn_is_decided_from_compiled_tokens_too(steps: int, length: int) -> None:
    model, cache = listening(), static(listening())
    prompt, more = tokens(1, 70), tokens(1, length, 99)
    model(prompt, **cached(cache))
    step(model, cache, steps)
    model(more, **cached(cache))
    last = pooled(model)
    text = torch.cat([prompt, *(tokens(1, 1, number) for number in range(steps)), more], 1)
    torch.testing.assert_close(last, whole(model, text), rtol=0, atol=1e-5)


def test_turns_between_compiled_and_plain_steps() -> None:
    model, cache = listening(), static(listening())
    parts = [tokens(2, 70)]
    model(parts[0], **cached(cache))
    for turn in range(3):
        step(model, cache, 12, seed=turn)
        parts += [tokens(2, 1, turn + number) for number in range(12)]
        parts.append(tokens(2, 1, 50 + turn))
        model(parts[-1], **cached(cache))
        parts.append(tokens(2, 9, 70 + turn))
        model(parts[-1], **cached(cache))
        last = pooled(model)
        torch.testing.assert_close(last, whole(model, torch.cat(parts, 1)), rtol=0, atol=1e-5)


def test_what_was_not_kept_is_said() -> None:
    model, cache = listening(), static(listening())
    model(tokens(1, BOUNDARY - 3), **cached(cache))  # generated tokens belong to its first keys
    step(model, cache, 2 * BOUNDARY + 1)
    with pytest.raises(ec.ElasticoreError, match="compiled model generated, of which not enough"):
        model(tokens(1, 5, 1), **cached(cache))


@pytest.mark.parametrize("kind", ["dense", "elastic"])
def test_a_further_turn_can_keep_its_routing(kind: str) -> None:
    found = []
    for made in (DynamicCache, static):
        way = dataclasses.replace(ways(turn="keep")[kind == "elastic"])
        model = elastic(tiny(), ByContent, way)
        cache = made(model) if made is static else DynamicCache(config=model.config)
        model(prompts(), **cached(cache))
        ids = [tokens(3, 1, number) for number in range(30)]
        if made is static:
            out = [step(model, cache, 30)]
        else:
            out = [model(one, **cached(cache)).logits for one in ids]
        out.append(model(tokens(3, 40, 5), **cached(cache)).logits)
        out.append(model(tokens(3, 1, 6), **cached(cache)).logits)
        found.append(torch.cat(out, 1))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 4)),
    st.tuples(st.just("crop"), st.integers(1, 6)),
    st.tuples(st.just("reorder"), st.permutations(range(3))),
    st.tuples(st.just("copy"), st.sampled_from(["copy", "pickle"])),
    st.tuples(st.just("turn"), st.integers(2, 40)),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=8))
def test_static_pages_hold_what_a_dynamic_cache_does(steps: list[tuple[str, Any]]) -> None:
    found = []
    for kind in ("dense", "elastic"):
        model = elastic(tiny(), ByContent, ways(turn="keep")[kind == "elastic"])
        cache: Any = static(model, 600) if kind == "elastic" else DynamicCache(config=model.config)
        model(prompts(), **cached(cache))
        written, out = 0, []
        for number, (name, value) in enumerate([("write", 1), *steps, ("write", 1)]):
            if name == "write":
                ids = tokens(3, value, 100 + number)
                out.append(model(ids, logits_to_keep=value, **cached(cache)).logits)
                written += value
            elif name == "turn":
                out.append(model(tokens(3, value, number), **cached(cache)).logits)
                written = 0
            elif name == "crop":
                for layer in cache.layers:
                    if min(value, written):
                        layer.crop(-min(value, written))
                written -= min(value, written)
            elif name == "reorder":
                cache.reorder_cache(torch.tensor(value))
            elif value == "copy":
                cache = copy.deepcopy(cache)
            else:
                cache = pickle.loads(pickle.dumps(cache))
        found.append(torch.cat(out, 1))
        if kind == "elastic":
            assert len(paged(cache)) == 3
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_static_cache_gives_memory_back_and_starts_over() -> None:
    model = elastic(tiny(), ec.AllSparse, ways()[1])
    cache = static(model, 1000)
    model(prompts(2, 400), **cached(cache))
    layers = paged(cache)
    assert len(layers) == 3 and isinstance(layers[0], PagedLayer)
    # A sink of 16, a window of 32 and a spare block of 16, of 1,000 tokens.
    assert layers[0].pool.nbytes <= 2 * 4 * 2 * 2 * 1000 * layers[0].dim * (64 + 8) / 1000
    assert cache.is_compileable and cache.get_max_length() == 1000
    cache.reset()
    again = model(prompts(2, 90), **cached(cache)).logits
    torch.testing.assert_close(again, model(prompts(2, 90)).logits, **CLOSE)


def test_a_prompt_in_chunks_needs_all_of_a_static_cache() -> None:
    model = elastic(tiny(), ByContent, ways()[1])
    cache = static(model)
    model(prompts()[:, :100], **cached(cache))
    with pytest.raises(ec.ElasticoreError, match="prefill it whole, or attend with cache='dense'"):
        model(prompts()[:, 100:], **cached(cache))


@pytest.mark.parametrize("kind", ["dense", "elastic"])
def test_padding_between_tokens(kind: str) -> None:
    model = elastic(tiny(num_hidden_layers=2), ByContent, ways()[kind == "elastic"])
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[0, 100:] = 0  # on the right: between tokens, once some are generated
    mask[1, 40:50] = 0
    given = {**SETTINGS, "max_new_tokens": 12, "attention_mask": mask}
    compiled = {"cache_implementation": "static", "compile_config": Compiler().config()}
    expected = model.generate(prompts(), **given)
    assert torch.equal(model.generate(prompts(), **given, **compiled), expected)


def test_recording_sees_compiled_steps() -> None:
    model, cache = elastic(tiny(num_hidden_layers=2), ByContent), None
    compiled, cache = torch.compile(model, backend="eager"), static(model)
    model(prompts(), **cached(cache))
    compiled(tokens(3, 1), **cached(cache))
    with ec.record() as trace:
        compiled(tokens(3, 1, 1), **cached(cache))
    assert trace.passes[0].keys.tolist() == [152] * 3


def test_padding_between_what_is_generated_is_no_number() -> None:
    model, compiler = elastic(tiny(num_hidden_layers=2), ByContent), Compiler()
    compiled, cache = torch.compile(model, backend=compiler, fullgraph=True), static(model)
    model(prompts(), **cached(cache))
    mask = torch.ones(3, 260, dtype=torch.bool)
    mask[1, 149] = False
    logits = compiled(tokens(3, 1), attention_mask=mask, **cached(cache)).logits
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


def test_a_compiled_model_refuses_the_cache_of_another() -> None:
    one, other = (elastic(tiny(seed=seed), ByContent) for seed in (0, 1))
    cache = static(one)
    one(prompts(), **cached(cache))
    with pytest.raises(Exception, match="filled by another model"):
        torch.compile(other, backend="eager", fullgraph=True)(tokens(3, 1), **cached(cache))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dense", "elastic"])
def test_a_step_is_a_cuda_graph(kind: str, padded: bool) -> None:
    model = tiny(head_dim=64, hidden_size=256).cuda()
    elastic(model, ByContent, ways()[kind == "elastic"])
    mask = torch.ones(3, 150, dtype=torch.long, device="cuda")
    mask[1, : 60 * padded] = 0
    given = {**SETTINGS, "max_new_tokens": 60, "attention_mask": mask}
    config = CompileConfig(fullgraph=True)  # for CUDA graphs by default
    compiled = {"cache_implementation": "static", "compile_config": config}
    # A second prompt of the same size is decided and written anew.
    for rows in (prompts().cuda(), tokens(3, 150, 9).cuda()):
        expected = model.generate(rows, **given)
        assert torch.equal(model.generate(rows, **given, **compiled), expected)
