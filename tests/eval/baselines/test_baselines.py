"""The methods beyond the three lanes, against their definitions and inside models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from elasticore import SequenceLayout, UnsupportedModel
from elasticore.eval.baselines import NativeSparseAttention, PerQuery, attend_with, load_nsa
from elasticore.eval.baselines.attach import Call
from elasticore.models.versions import CACHE
from elasticore.patterns import InfLLMV2, MoBA, NSASelected

EVERYTHING = MoBA(16, 1000)
SELECTION = NSASelected(16, 3, kernel=8, stride=4, sink=16, local=16)


def tiny(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "initializer_range": 0.2,  # far from uniform attention
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).double().eval()


def nsa_modules(seed: int = 1, window: int = 12) -> nn.ModuleList:
    torch.manual_seed(seed)
    made = nn.ModuleList(NativeSparseAttention(4, 2, 8, 32, SELECTION, window) for _ in range(2))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(3))


# --- In a model ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_selector_that_keeps_everything_is_the_backbone() -> None:
    model, ids = tiny(), tokens(2, 70)
    plain, keys = model(ids).logits, list(model.state_dict())
    with attend_with(model, [PerQuery(EVERYTHING)] * 2):
        assert torch.allclose(model(ids).logits, plain, atol=1e-9)
        assert list(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, plain)
    assert model.config._attn_implementation != "elasticore-baseline"


MODULES = {
    "everything": lambda: [PerQuery(EVERYTHING)] * 2,
    "moba": lambda: [PerQuery(MoBA(16, 2))] * 2,
    "infllm": lambda: [PerQuery(InfLLMV2(16, 2, 8, 4, sink=16, local=16, dense=0))] * 2,
    "nsa": nsa_modules,
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_decoding_goes_on_where_the_prefill_ended(name: str) -> None:
    """Every query chooses for itself, so no chunk or step changes anything."""
    model, ids = tiny(), tokens(1, 75)
    with attend_with(model, MODULES[name]()):
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :50], use_cache=True)
        second = model(ids[:, 50:74], **{CACHE: getattr(first, CACHE)}, use_cache=True)
        third = model(ids[:, 74:], **{CACHE: getattr(second, CACHE)}, use_cache=True)
    parts = torch.cat([first.logits, second.logits, third.logits], 1)
    assert torch.allclose(parts, whole, atol=1e-9)
    assert not torch.allclose(whole, model(ids).logits, atol=1e-3) or name == "everything"


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shifted", [False, True], ids=["counted", "shifted"])
def test_padding_changes_nothing(name: str, shifted: bool) -> None:
    """Whether positions count from the first token or from the padding before it."""
    model, ids = tiny(), tokens(1, 60)
    mask = torch.ones(1, 71, dtype=torch.long)
    mask[:, :11] = 0
    positions = None if shifted else (mask.cumsum(1) - 1).clamp(min=0)
    longer = torch.cat([tokens(1, 11), ids], 1)
    with attend_with(model, MODULES[name]()):
        alone = model(ids).logits
        padded = model(longer, attention_mask=mask, position_ids=positions).logits[:, 11:]
    # Angles are float32: shifted by 11, those of up to 71 radians round otherwise.
    assert torch.allclose(padded, alone, atol=1e-4 if shifted else 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_padding_between_tokens_changes_nothing(name: str) -> None:
    model, ids = tiny(), tokens(1, 60)
    mask = torch.ones(2, 71, dtype=torch.long)
    mask[1, 20:31] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    other = tokens(1, 71)
    both = torch.cat([other, torch.cat([ids[:, :20], other[:, :11], ids[:, 20:]], 1)])
    with attend_with(model, MODULES[name]()):
        alone = model(ids).logits[0]
        first = model(both[:, :50], attention_mask=mask[:, :50], position_ids=positions[:, :50])
        rest = model(
            both[:, 50:],
            attention_mask=mask,
            position_ids=positions[:, 50:],
            **{CACHE: getattr(first, CACHE)},
        )
        whole = model(other).logits[0]
    found = torch.cat([first.logits, rest.logits], 1)
    assert torch.allclose(found[0], whole, atol=1e-9)
    assert torch.allclose(found[1][mask[1].bool()], alone, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_a_preallocated_cache_changes_nothing(name: str) -> None:
    model, ids = tiny(), tokens(1, 40)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with attend_with(model, MODULES[name]()):
        plain, static = (
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **settings,
                **({"cache_implementation": kind} if kind else {}),
            )
            for kind in (None, "static")
        )
    assert torch.equal(static, plain)


@torch.no_grad()
def test_packed_sequences_are_each_their_own() -> None:
    model, one, two = tiny(), tokens(1, 40), tokens(1, 33)
    positions = torch.cat([torch.arange(40), torch.arange(33)])[None]
    with attend_with(model, nsa_modules()):
        expected = torch.cat([model(one).logits, model(two).logits], 1)
        packed = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    assert torch.allclose(packed, expected, atol=1e-9)


def test_the_model_is_as_before_also_after_an_error() -> None:
    model, ids = tiny(), tokens(1, 20)
    plain = model(ids).logits
    with pytest.raises(KeyError), attend_with(model, [PerQuery(EVERYTHING)] * 2):
        raise KeyError
    assert torch.equal(model(ids).logits, plain)


def test_what_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"modules must be one per layer \(2\), got 1"):
        attend_with(tiny(), [PerQuery(EVERYTHING)]).__enter__()
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    local = MistralForCausalLM(
        MistralConfig(
            **sizes, num_hidden_layers=1, vocab_size=64, intermediate_size=48, sliding_window=8
        )
    )
    with pytest.raises(UnsupportedModel, match=r"mistral.*sliding window"):
        attend_with(local, [PerQuery(EVERYTHING)]).__enter__()


# --- Each query for itself -----------------------------------------------------------------------


def slow_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: list[int]) -> Tensor:
    weights = (k[seen] @ q * scale).softmax(0)
    return weights @ v[seen]


def draw(seed: int, queries: int, keys: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotary = tiny().model.rotary_emb
    return Call(
        normal(1, 4, queries, 8),
        normal(1, 2, keys, 8),
        normal(1, 2, keys, 8),
        normal(queries, 32),
        5,
        0.6,
        rotary,
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), keys=st.integers(1, 140), past=st.integers(0, 139))
def test_moba_as_published(seed: int, keys: int, past: int) -> None:
    call = draw(seed, keys - min(past, keys - 1), keys)
    past = keys - call.q.shape[2]
    out = PerQuery(MoBA(16, 3))(call)
    for head in range(4):
        k = call.k[0, head // 2]
        for index in range(call.q.shape[2]):
            position, query = past + index, call.q[0, head, index]
            own = position // 16
            score = {b: float(query @ k[b * 16 : b * 16 + 16].mean(0)) for b in range(own)}
            best = {own, *sorted(score, key=lambda b: -score[b])[:2]}
            seen = [t for t in range(position + 1) if t // 16 in best]
            expected = slow_attention(query, k, call.v[0, head // 2], call.scale, seen)
            assert torch.allclose(out[0, head, index], expected, atol=1e-12)


def test_infllm_chooses_as_its_selector_does_for_a_row_of_one_query() -> None:
    call, selector = draw(2, 90, 90), InfLLMV2(16, 2, 8, 4, sink=16, local=16, dense=0)
    chosen = selector.choose(
        call.q, call.k, SequenceLayout.dense().segments(1, 90, 90, call.q.device), 1, call.scale
    )
    out = PerQuery(selector)(call)
    for head, index in [(0, 0), (1, 40), (3, 89)]:
        blocks = chosen[0, head // 2, index].nonzero().flatten().tolist()
        seen = [t for t in range(index + 1) if t // 16 in blocks]
        k, v = call.k[0, head // 2], call.v[0, head // 2]
        expected = slow_attention(call.q[0, head, index], k, v, call.scale, seen)
        assert torch.allclose(out[0, head, index], expected, atol=1e-12)


def test_per_query_takes_selectors_that_score() -> None:
    with pytest.raises(TypeError, match="selector must be MoBA or InfLLMV2, got 'moba'"):
        PerQuery("moba")  # type: ignore[arg-type]


# --- NSA -----------------------------------------------------------------------------------------


def rotated(x: Tensor, position: int, back: bool) -> Tensor:
    """Rotary embedding of one vector, as complex numbers."""
    half = x.shape[0] // 2
    # The model's angles are those of float32 frequencies.
    frequency = 1.0 / (10000.0 ** (torch.arange(0, 2 * half, 2).float() / (2 * half)))
    angle = (position * frequency).double() * (-1 if back else 1)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), keys=st.integers(1, 90), past=st.integers(0, 89))
def test_nsa_as_published(seed: int, keys: int, past: int) -> None:
    call = draw(seed, keys - min(past, keys - 1), keys)
    past = keys - call.q.shape[2]
    module = nsa_modules(seed)[0]
    with torch.no_grad():
        out = module(call)
        gates = (call.hidden @ module.gate.T).sigmoid().reshape(-1, 4, 3)
        for kv in range(2):
            k, v = call.k[0, kv], call.v[0, kv]
            raw = [rotated(k[t], call.first + t, back=True) for t in range(keys)]
            cells = range(0, keys - 7, 4)
            small_k, small_v = [], []
            for start in cells:
                window = torch.cat([raw[start + i] + module.place[kv, i] for i in range(8)])
                compressed = window @ module.compress_key[kv]
                small_k.append(rotated(compressed, call.first + start, back=False))
                small_v.append(v[start : start + 8].flatten() @ module.compress_value[kv])
            for index in range(call.q.shape[2]):
                position = past + index
                behind = [c for c, start in enumerate(cells) if start + 8 <= position + 1]
                weights = {}
                for head in (2 * kv, 2 * kv + 1):
                    query = call.q[0, head, index]
                    exponent = [math.exp(float(query @ small_k[c]) * 0.6) for c in behind]
                    weights[head] = [e / sum(exponent) for e in exponent]
                own = position // 16
                score = dict.fromkeys(range(1, own), 0.0)
                for b in score:
                    for stride in range(4 * b, 4 * b + 4):
                        for c in behind:
                            if c <= stride < c + 2:
                                score[b] += sum(w[c] for w in weights.values())
                best = sorted(score, key=lambda b: (-np.float32(score[b]), b))
                read = {0, own, *best[: max(3 - len({0, own}), 0)]}
                for head, weight in weights.items():
                    query = call.q[0, head, index]
                    parts = [
                        sum((w * small_v[c] for w, c in zip(weight, behind)), torch.zeros(8)),  # noqa: B905
                        slow_attention(
                            query, k, v, 0.6, [t for t in range(position + 1) if t // 16 in read]
                        ),
                        slow_attention(
                            query, k, v, 0.6, list(range(max(0, position - 11), position + 1))
                        ),
                    ]
                    expected = sum(gates[index, head, b] * parts[b] for b in range(3))
                    assert torch.allclose(out[0, head, index], expected, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_a_gpu_computes_the_same(name: str) -> None:
    model, ids, modules = tiny(), tokens(1, 60), nn.ModuleList(MODULES[name]())
    with attend_with(model, modules):
        expected = model(ids).logits
    with attend_with(model.cuda(), modules.cuda()):
        assert torch.allclose(model(ids.cuda()).logits.cpu(), expected, atol=1e-5)


def test_gradients_reach_every_learned_part() -> None:
    module = nsa_modules()[0]
    module(draw(4, 60, 60)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@torch.no_grad()
def test_weights_load_from_safetensors(tmp_path: Path) -> None:
    model, trained, ids = tiny(), nsa_modules(7), tokens(1, 60)
    save_file(trained.state_dict(), tmp_path / "nsa.safetensors")
    loaded = load_nsa(model, tmp_path / "nsa.safetensors", SELECTION, 12).double()
    for name, tensor in trained.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor)
    with attend_with(model, loaded):
        logits = model(ids).logits
    with attend_with(model, trained):
        assert torch.allclose(model(ids).logits, logits, atol=1e-4)  # stored in float32


def test_embeddings_that_change_with_the_length_are_refused(tmp_path: Path) -> None:
    """Keys in the cache were rotated at another length: they could not be turned back."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModel, match="'dynamic', which changes with the length"):
        load_nsa(tiny(rope_parameters=scaling), tmp_path / "nsa.safetensors", SELECTION)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = nsa_modules().state_dict()
    del weights["1.gate"]
    save_file(weights, tmp_path / "nsa.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not hold the weights.*1\.gate"):
        load_nsa(tiny(), tmp_path / "nsa.safetensors", SELECTION)
    save_file(nsa_modules().state_dict(), tmp_path / "nsa.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not hold the weights.*0\.compress_key"):
        load_nsa(tiny(), tmp_path / "nsa.safetensors")
