"""Every family: exact where all heads are full, keys tapped before RoPE, the rest refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear

import elasticore
from elasticore import AllRetrieval, AllSparse, ElasticoreError, UnsupportedModel
from elasticore.models.families import attention_layers, is_local

from .tiny import CLOSE, FAMILIES, MIXED, SETTINGS, SIZES, Listening, elastic, tiny, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_full_is_the_model_itself(family: str) -> None:
    model, prompt = tiny(family), tokens(2, 100)
    expected = model(prompt).logits
    assert torch.equal(elastic(model, AllRetrieval)(prompt).logits, expected)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_kv_heads(family: str, kv_heads: int) -> None:
    model, prompt = tiny(family, num_key_value_heads=kv_heads), tokens(2, 60)
    expected = model(prompt).logits
    elastic(model, AllRetrieval)
    with elasticore.record() as trace:
        assert torch.equal(model(prompt).logits, expected)
    assert trace.decisions.shape[1:] == (2, kv_heads)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral"])
def test_heads_need_not_divide_the_hidden_size(family: str) -> None:
    model, prompt = tiny(family, head_dim=32), tokens(2, 60)
    expected = model(prompt).logits
    assert torch.equal(elastic(model, AllRetrieval)(prompt).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_streaming_is_another_model_only_beyond_the_window(family: str) -> None:
    model, prompt = tiny(family), tokens(2, 100)
    expected = model(prompt).logits
    logits = elastic(model, AllSparse)(prompt).logits
    reach = 48  # sink and window
    torch.testing.assert_close(logits[:, :reach], expected[:, :reach], **CLOSE)
    assert (logits[:, reach:] - expected[:, reach:]).abs().amax(-1).min() > 1e-3


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def keys_of(family: str, attention: Any, hidden: Tensor) -> Tensor:
    """A family's keys before RoPE ``[B, T, 2, 16]``, from its weights alone."""
    if family == "phi3":  # q: 4 heads of 16, then k: 2 heads of 16, then v
        return linear(hidden, attention.qkv_proj.weight[64:96]).unflatten(-1, (2, 16))
    projected = linear(hidden, attention.k_proj.weight, attention.k_proj.bias)
    if family == "olmo2":  # one norm over all heads
        norm = attention.k_norm
        projected = rms(projected, norm.weight, norm.variance_epsilon)
    heads = projected.unflatten(-1, (2, 16))
    if family == "qwen3":
        return rms(heads, attention.k_norm.weight, attention.k_norm.variance_epsilon)
    if family == "gemma3_text":
        return rms(heads, 1 + attention.k_norm.weight, attention.k_norm.eps)
    return heads


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_sees_keys_before_rope_and_after_the_norm(family: str) -> None:
    model, hidden = elastic(tiny(family), Listening), {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden[module] = args[0] if args else kwargs["hidden_states"]

    layers = [layer for layer in attention_layers(model) if not is_local(layer)]
    for layer in layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    model(tokens(2, 30))
    for layer, policy in zip(layers, elasticore.routers(model), strict=True):
        expected = keys_of(family, layer, hidden[layer])
        # Two dozen operations of 6e-8 on values of order one.
        torch.testing.assert_close(policy.seen, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_one_token_do_not_depend_on_its_position(family: str) -> None:
    model = elastic(tiny(family), Listening)
    model(torch.full((1, 40), 7))
    keys = elasticore.routers(model)[0].seen  # the first layer: nothing but the token is in there
    assert torch.equal(keys, keys[:, :1].expand_as(keys))


@pytest.mark.parametrize(
    ("head", "output"),
    [("LlamaModel", "last_hidden_state"), ("LlamaForSequenceClassification", "logits")],
)
def test_models_without_a_language_head_can_be_elastic(head: str, output: str) -> None:
    model = getattr(transformers, head)(tiny().config).eval()
    prompt = tokens(1, 60)
    expected = model(prompt)[output]
    elastic(model, AllSparse)
    assert not torch.equal(model(prompt)[output], expected)
    assert torch.equal(elasticore.restore(model)(prompt)[output], expected)


# What is refused.

SMALL: dict[str, Any] = {**SIZES, "head_dim": 16}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 3,
}
REFUSED = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**{**SMALL, "attn_implementation": "eager"})
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SMALL, **EXPERTS)
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**SIZES, **LATENT, "num_key_value_heads": 4})
    ),
    "llama4_text": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SMALL, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=64
        )
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            vocab_size=128,
        )
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family: str) -> None:
    model = REFUSED[family]()
    with pytest.raises(UnsupportedModel, match=f"family '{family}'.*supported: .*llama"):
        elasticore.elasticize(model)
    assert not elasticore.is_elastic(model)


@pytest.mark.parametrize("model", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_a_type_error(model: Any) -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        elasticore.elasticize(model)


def test_a_model_with_nothing_but_local_layers_is_refused() -> None:
    model = tiny("mistral", sliding_window=16)
    with pytest.raises(UnsupportedModel, match=r"mistral.*all of its 3 layers.*sliding window"):
        elasticore.elasticize(model)


def test_a_window_that_no_input_outgrows_is_no_window() -> None:
    model, prompt = tiny("mistral", sliding_window=512), tokens(2, 100)
    expected = model(prompt).logits
    with elasticore.record() as trace:
        logits = elastic(model, AllRetrieval)(prompt).logits
    assert torch.equal(logits, expected)
    assert trace.prefill.local_layers == 0 and len(trace.decisions) == 3


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})],
)
def test_attention_in_both_directions_is_refused(family: str, settings: dict[str, Any]) -> None:
    model = tiny(family, **settings)
    with pytest.raises(UnsupportedModel, match=rf"{family}.*both directions"):
        elasticore.elasticize(model)


def test_attention_in_both_directions_is_refused_in_a_call_too() -> None:
    with pytest.raises(ValueError, match="is_causal"):
        elastic(tiny())(tokens(1, 20), is_causal=False)


def test_the_implementation_alone_does_not_make_a_model_elastic() -> None:
    elastic(tiny())  # registers the name
    model = tiny(attn_implementation="elasticore")
    with pytest.raises(ElasticoreError, match=r"elasticore.elasticize\(model\)"):
        model(tokens(1, 20))


# Layers that the model keeps local.


@pytest.mark.parametrize("padded", [False, True])
def test_local_layers_stay_bit_identical(padded: bool) -> None:
    model, calls = tiny("gemma3_text"), []
    local = attention_layers(model)[1]
    local.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])),
        with_kwargs=True,
    )
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :25] = not padded
    elastic(model, AllSparse)
    model(tokens(2, 60), attention_mask=mask, use_cache=False)
    elasticore.restore(model)
    args, kwargs, output = calls[0]
    assert torch.equal(local(*args, **kwargs)[0], output)  # the same input, without elasticore
    model(tokens(2, 60), attention_mask=mask, use_cache=False)
    own = calls[-1][1]["attention_mask"]  # and the same mask as the model makes by itself
    assert own.shape == (2, 1, 60, 60)
    assert torch.equal(kwargs["attention_mask"], own)


def test_local_layers_keep_their_attention_implementation() -> None:
    model = tiny("gemma3_text", attn_implementation="eager")
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :25] = 0
    expected = model(ids, attention_mask=mask).logits
    logits = elastic(model, AllRetrieval)(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3_text", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": MIXED}),
    ],
)
def test_local_layers_are_counted_apart(family: str, settings: dict[str, Any]) -> None:
    model = elastic(tiny(family, **settings), AllSparse)
    with elasticore.record() as trace:
        model(tokens(2, 100))
    assert trace.prefill.local_layers == 1
    assert trace.decisions.shape == (2, 2, 2)
    assert trace.msr.tolist() == [1.0, 1.0]
    assert len(elasticore.routers(model)) == 2
    routed = {name.split(".")[2] for name, _ in model.named_modules() if "attention_router" in name}
    assert routed == {"0", "2"}


# Other dtypes.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_runs_attention_in_its_dtype(family: str, use_cache: bool) -> None:
    model, prompt = tiny(family), tokens(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(prompt, use_cache=use_cache).logits
        logits = elastic(model, AllRetrieval)(prompt, use_cache=use_cache).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_of_a_half_precision_model_stay_in_float32(dtype: torch.dtype) -> None:
    model = elasticore.elasticize(tiny().to(dtype), SETTINGS)
    logits = model(tokens(2, 60)).logits
    assert logits.dtype == dtype and bool(logits.isfinite().all())
    assert {p.dtype for r in elasticore.routers(model) for p in r.parameters()} == {torch.float32}
