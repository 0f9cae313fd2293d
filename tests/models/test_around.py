"""Whatever stands around, inside or beside an elastic model: the routing is the same."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from transformers import DynamicCache, TextIteratorStreamer

import elasticore
from elasticore import AllRetrieval, AllSparse, Elastic, ElasticoreError, HeadTable, Router
from elasticore.backends.serial import SerialAttention
from elasticore.models.families import attention_layers
from elasticore.router import FixedPolicy

from .tiny import (
    CLOSE,
    FAMILIES,
    SETTINGS,
    ByContent,
    Listening,
    cache_of,
    cached,
    elastic,
    small,
    spread,
    tiny,
    tokens,
)

PROMPT = tokens(2, 80)
SHORT: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}


def seen(model: Any, prompt: Tensor = PROMPT) -> tuple[Tensor, Tensor]:
    """Decisions and logits of a prompt."""
    with torch.no_grad(), elasticore.record() as trace:
        logits = model(prompt).logits
    return trace.decisions, logits


def assert_same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[1], two[1], **CLOSE)


# Adapters.

PROJECTIONS = {
    family: ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    for family in FAMILIES
}


def lora(model: Any, family: str = "llama", **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": PROJECTIONS[family], "init_lora_weights": False, **settings}
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_before_or_after_is_the_same(family: str) -> None:
    before, after = lora(tiny(family), family), tiny(family)
    plain = before(PROMPT).logits
    assert_same(seen(elastic(before)), seen(lora(elastic(after), family)))
    full = lora(elastic(tiny(family), AllRetrieval), family)
    torch.testing.assert_close(full(PROMPT).logits, plain, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_the_same(family: str) -> None:
    apart = seen(elastic(lora(tiny(family), family)))
    merged = lora(elastic(tiny(family)), family).merge_and_unload()
    assert elasticore.is_elastic(merged)
    assert_same(seen(merged), apart)


def test_an_adapter_that_is_switched_off_is_not_seen() -> None:
    model = lora(elastic(tiny()))
    with model.disable_adapter():
        assert_same(seen(model), seen(elastic(tiny())))


def test_lora_on_every_linear_layer_leaves_a_working_router() -> None:
    """Also on those of the routers."""
    model = lora(spread(elasticore.elasticize(tiny(), SETTINGS)), target_modules="all-linear")
    decisions, logits = seen(model)
    assert decisions.shape == (3, 2, 2) and bool(logits.isfinite().all())


def test_a_peft_model_is_made_elastic_as_the_model_inside() -> None:
    model = lora(tiny())
    assert elasticore.elasticize(model, SETTINGS) is model
    assert elasticore.is_elastic(model) and elasticore.is_elastic(model.get_base_model())
    assert len(elasticore.routers(model)) == 3
    elasticore.restore(model)
    assert not elasticore.is_elastic(model)


def test_a_compiled_model_is_made_elastic_as_the_model_inside() -> None:
    model = torch.compile(tiny(), backend="eager")
    elasticore.elasticize(model, SETTINGS)
    assert elasticore.is_elastic(model)
    elasticore.restore(model)


# Weights that are somewhere else.


class QuantizedLinear(nn.Module):
    """A layer whose weights are in buffers, as GPTQ and AWQ keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weights", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = x @ (self.weights * self.scales).T
        return out if self.bias is None else out + self.bias


def quantized(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name and "router" not in name:
            model.set_submodule(name, QuantizedLinear(module))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_buffers(family: str) -> None:
    model = quantized(tiny(family))
    plain = model(PROMPT).logits
    torch.testing.assert_close(elastic(model, AllRetrieval)(PROMPT).logits, plain, **CLOSE)
    elasticore.restore(model)
    assert_same(seen(elastic(model)), seen(quantized(elastic(tiny(family)))))


def test_dynamic_quantization_leaves_a_working_router() -> None:
    model = spread(elasticore.elasticize(tiny(), SETTINGS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smaller = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    decisions, logits = seen(smaller)
    assert decisions.shape == (3, 2, 2) and bool(logits.isfinite().all())


WAYS: dict[str, Callable[[], Elastic]] = {
    "new routers": lambda: SETTINGS,
    "trained routers": lambda: elasticore.way_of(spread(elasticore.elasticize(tiny(), SETTINGS))),
    "head table": lambda: small(policy=HeadTable([[1, 0]] * 3)),
    "all full": lambda: small(policy=AllRetrieval()),
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_on_disk(way: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tiny().save_pretrained(tmp_path)
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    where |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={**where, "model.layers.2": "disk"}, offload_folder=tempfile.mkdtemp()
    )
    made, on = WAYS[way](), tiny()
    for model in (loaded, on):
        torch.manual_seed(0)
        elasticore.elasticize(model, made)
    off = loaded
    assert_same(seen(off), seen(on))
    assert torch.equal(off.generate(PROMPT, **SHORT), on.generate(PROMPT, **SHORT))


def test_a_model_of_shapes_only_gets_routers_of_shapes_only() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny().config)
    elasticore.elasticize(model, SETTINGS)
    assert all(p.is_meta for router in elasticore.routers(model) for p in router.parameters())


# What runs in the place of parts of a model.


def test_a_rotary_embedding_that_works_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.llama.modeling_llama
    original = module.apply_rotary_pos_emb

    def in_place(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        turned = original(q, k, *args, **kwargs)
        return q.copy_(turned[0]), k.copy_(turned[1])

    model = elastic(tiny(), Listening)
    _, expected = seen(model)
    keys = [policy.seen for policy in elasticore.routers(model)]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", in_place)
    _, logits = seen(model)
    assert torch.equal(logits, expected)
    for policy, before in zip(elasticore.routers(model), keys, strict=True):
        assert torch.equal(policy.seen, before)


def test_a_projection_that_is_replaced_later_is_the_one_that_routes() -> None:
    early, late = tiny(), elastic(tiny())
    for model in (early, late):
        for layer in attention_layers(model):
            other = nn.Linear(64, 32, bias=False).requires_grad_(False)
            torch.manual_seed(int(layer.layer_idx))
            nn.init.normal_(other.weight, 0.0, 0.1)
            layer.k_proj = other
    assert_same(seen(late), seen(elastic(early)))


def test_a_hook_on_the_projection_is_seen_by_the_router() -> None:
    early, late = tiny(), elastic(tiny())
    for model in (early, late):
        for layer in attention_layers(model):
            layer.k_proj.register_forward_hook(lambda module, args, output: output * -1.5)
    assert_same(seen(late), seen(elastic(early)))


# Models inside of models.


def test_the_base_and_the_model_around_it_are_not_both_elastic() -> None:
    model = tiny()
    base = model.model
    elastic(base, AllSparse)
    expected = base(PROMPT).last_hidden_state
    with pytest.raises(ValueError, match="elastic in a part of it"):
        elastic(model, AllRetrieval)
    assert not elasticore.is_elastic(model) and elasticore.is_elastic(base)
    assert torch.equal(base(PROMPT).last_hidden_state, expected)
    elasticore.restore(base)
    elastic(model, AllRetrieval)
    with pytest.raises(ValueError, match="elastic"):
        elastic(base, AllSparse)
    elasticore.restore(model)


def test_two_heads_on_one_base() -> None:
    first, second = tiny(), tiny(seed=1)
    second.model = first.model
    elastic(first)
    with pytest.raises(ValueError, match="elastic in a part of it"):
        elastic(second)


def test_one_policy_module_for_all_layers_is_refused_where_it_could_not_be_saved() -> None:
    with pytest.raises(ValueError, match=r"one FixedPolicy for the layers 0 and 1.*HeadTable"):
        Elastic([FixedPolicy([1, 0])] * 3)
    model = elasticore.elasticize(tiny(), Elastic([ByContent()] * 3, sparse=SETTINGS.sparse))
    assert_same(seen(model), seen(elastic(tiny())))


def test_an_elastic_model_is_saved_by_transformers(tmp_path: Path) -> None:
    model = elastic(tiny(), HeadTable([[1, 0], [0, 1], [1, 1]]))
    model.save_pretrained(tmp_path / "model")
    elasticore.way_of(model).save(tmp_path / "way")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(seen(elasticore.elasticize(again, tmp_path / "way")), seen(model))


# What a pass leaves behind: nothing.


@pytest.mark.parametrize("training", [False, True])
def test_a_model_can_be_copied_after_any_pass(training: bool) -> None:
    model = elasticore.elasticize(tiny(), SETTINGS).train(training)
    model(PROMPT, labels=PROMPT, use_cache=False).loss.backward() if training else seen(model)
    twin = copy.deepcopy(model.eval())
    assert_same(seen(twin), seen(model))


def test_an_output_that_is_dropped_takes_its_graph_along() -> None:
    model, hidden = elasticore.elasticize(tiny(), SETTINGS).train(), []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        hidden.append(weakref.ref(output))

    for layer in attention_layers(model):
        layer.o_proj.register_forward_hook(note)
    output = model(PROMPT, labels=PROMPT, use_cache=False)
    assert output.loss.requires_grad
    del output
    gc.collect()
    assert len(hidden) == 3 and all(kept() is None for kept in hidden)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_given_back_as_by_the_plain_model() -> None:
    def given_back(model: Any) -> int:
        ids = tokens(4, 512)
        for _ in range(2):  # the first pass warms up
            output = model(ids, labels=ids, use_cache=False)
            before = int(Path("/proc/self/statm").read_text().split()[1])
            del output
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            after = int(Path("/proc/self/statm").read_text().split()[1])
        return before - after

    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 1024}
    plain = given_back(tiny(**sizes).requires_grad_(True).train())
    model = elasticore.elasticize(tiny(**sizes).requires_grad_(True), SETTINGS).train()
    assert given_back(model) > 0.8 * plain > 0


def test_a_failed_pass_leaves_nothing_for_the_next() -> None:
    model, cache = elastic(tiny()), DynamicCache(config=tiny().config)
    broken = attention_layers(model)[1].o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(PROMPT, **cached(cache))
    broken.remove()
    assert_same(seen(model), seen(elastic(tiny())))
    # Two layers of this cache are filled and one is not.
    with pytest.raises(ElasticoreError, match="holds 80 tokens in some layers and 0 in layer 2"):
        model(PROMPT, **cached(cache))


# Threads and the backend that is named.


class Mine(SerialAttention):
    name = "mine"
    calls = 0

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        Mine.calls += 1
        return super().attend(*args, **kwargs)


@pytest.mark.usefixtures("clean_registry")
def test_a_thread_runs_the_named_backend_and_is_recorded() -> None:
    elasticore.register_backend("mine", Mine)
    Mine.calls = 0
    model = elastic(tiny())
    elasticore.use_backend("mine")
    with elasticore.record() as trace:
        thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=SHORT)
        thread.start()
        thread.join()
    assert Mine.calls == 3 * 8 and len(trace.passes) == 8
    assert trace.passes[0].backend == "mine" and trace.msr.shape == (2,)


class Words:
    """A tokenizer for streams: numbers for tokens."""

    def decode(self, ids: Any, **settings: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


def test_a_streamed_answer_is_the_answer() -> None:
    model, prompt = elastic(tiny()), tokens(1, 70)
    expected = model.generate(prompt, **SHORT)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    thread = threading.Thread(
        target=model.generate, args=(prompt,), kwargs={"streamer": streamer, **SHORT}
    )
    with elasticore.record() as trace:
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split() == [str(int(i)) for i in expected[0, 70:]]
    assert len(trace.passes) == 8


def test_a_thread_that_ran_before_is_not_recorded() -> None:
    model, go, done = elastic(tiny()), threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        model(tokens(1, 30))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with elasticore.record() as trace:
        go.set()
        done.wait()
    thread.join()
    assert trace.passes == []


def test_two_threads_generate_from_caches_of_their_own() -> None:
    model = elastic(tiny())
    prompts = [tokens(1, 60 + seed, seed) for seed in range(2)]
    expected = [model.generate(prompt, **SHORT) for prompt in prompts]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        found[index] = model.generate(prompts[index], **SHORT)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))


# Arguments of transformers.


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("positions", ["jump", "stride"])
def test_positions_that_rise_are_of_one_sequence(positions: str, mask: bool) -> None:
    ids = tokens(1, 80)
    places = {
        "jump": torch.cat([torch.arange(40), torch.arange(100, 140)]),
        "stride": 2 * torch.arange(80),
    }[positions][None]
    arguments = {"position_ids": places}
    if mask:
        arguments["attention_mask"] = torch.ones_like(ids)
    expected = tiny()(ids, **arguments).logits
    logits = elastic(tiny(), AllRetrieval)(ids, **arguments).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    with elasticore.record() as trace:
        elastic(tiny())(ids, **arguments, use_cache=False)
    assert trace.prefill.keys.tolist() == [80]


def test_positions_that_fall_on_a_cache_are_of_one_sequence() -> None:
    ids, places = tokens(1, 80), torch.arange(80)[None] % 40
    expected = tiny()(ids, position_ids=places).logits
    logits = elastic(tiny(), AllRetrieval)(ids, position_ids=places).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_the_mask_of_a_whole_prompt_may_be_given_to_each_chunk() -> None:
    ids, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[0, :20] = 0

    def run(model: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        chunks = (slice(0, 50), slice(50, 100))
        return torch.cat(
            [model(ids[:, c], attention_mask=mask, **cached(cache)).logits for c in chunks], 1
        )

    own = mask.bool()
    torch.testing.assert_close(run(elastic(tiny(), AllRetrieval))[own], run(tiny())[own], **CLOSE)


def test_keys_that_do_not_add_up_are_refused() -> None:
    """As where a cache comes under a name that nobody knows."""
    model, text = elastic(tiny(), AllRetrieval), tokens(1, 40)
    cache = cache_of(model(text))
    inner = cache.layers[1].inner
    inner.keys, inner.values = inner.keys[:, :, 3:], inner.values[:, :, 3:]
    inner.get_mask_sizes = lambda queries: (40 + queries, 0)
    with pytest.raises(ElasticoreError, match=r"layer 1 attends to 38 keys, where 41"):
        model(text[:, :1], **cached(cache))


def test_a_version_that_names_its_arguments_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("elasticore.models.attach.CACHE", "memory")
    model = tiny()
    with pytest.raises(elasticore.UnsupportedModel, match=r"LlamaAttention.forward.*not memory"):
        elastic(model)
    assert not elasticore.is_elastic(model)


# Gradient checkpointing that is none of transformers'.


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_torch(reentrant: bool) -> None:
    def gradients(wrap: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model = spread(elasticore.elasticize(tiny(), SETTINGS).train())
        if wrap:
            kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
            layers = (checkpoint_wrapper(x, checkpoint_impl=kind) for x in model.model.layers)
            model.model.layers = nn.ModuleList(layers)
        model.enable_input_require_grads()
        torch.manual_seed(0)
        one = elasticore.Pass()
        loss = model(PROMPT, labels=PROMPT, use_cache=False, elastic=one).loss
        share = torch.cat([routing.sparse() for routing in one.routings], 1).mean()
        (loss + (share - 0.5) ** 2).backward()
        return [p.grad for r in elasticore.routers(model) for p in r.parameters()]

    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant must be False"):
            gradients(True)
    else:
        assert all(map(torch.equal, gradients(True), gradients(False)))


# Caches have owners, and travel.


def travelled(cache: Any, how: str) -> Any:
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    if how == "deepcopy":
        return copy.deepcopy(cache)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_travels_with_its_routing(how: str, kind: str) -> None:
    model, prompt, step = elastic(tiny()), tokens(2, 70), tokens(2, 1, 5)
    new = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=90)
    )
    with torch.no_grad():
        cache = cache_of(model(prompt, **cached(new)))
        again = travelled(cache, how)
        with elasticore.record() as trace:
            theirs = elastic(tiny())(step, **cached(again)).logits  # another process's model
            mine = model(step, **cached(cache)).logits
    assert torch.equal(theirs, mine)
    assert torch.equal(trace.passes[0].decisions, trace.passes[1].decisions)


@pytest.mark.parametrize(
    "other",
    [
        lambda: elastic(tiny(), AllRetrieval),
        lambda: elastic(tiny(), AllSparse, small("fa-xa")),
        lambda: elastic(tiny(seed=1), AllSparse),
        lambda: elastic(tiny(), AllSparse, Elastic(sparse=elasticore.Streaming(16, 48))),
    ],
    ids=["policy", "patterns", "weights", "window"],
)
def test_a_cache_of_another_model_or_way_is_refused(other: Callable[[], Any]) -> None:
    cache = cache_of(elastic(tiny(), AllSparse)(tokens(1, 70)))
    with pytest.raises(ElasticoreError, match="filled by another model, or by this one while"):
        other()(tokens(1, 1), **cached(cache))


def test_a_plain_model_goes_on_with_an_elastic_cache_and_the_elastic_one_says_so() -> None:
    model = elastic(tiny(), AllRetrieval)
    cache = cache_of(model(tokens(1, 70)))
    plain = tiny()
    expected = plain(tokens(1, 1, 1), **cached(cache_of(plain(tokens(1, 70))))).logits
    torch.testing.assert_close(plain(tokens(1, 1, 1), **cached(cache)).logits, expected, **CLOSE)
    with pytest.raises(ElasticoreError, match="holds 71 tokens, but this model knows how 70"):
        model(tokens(1, 1), **cached(cache))


def test_a_cache_without_layers_is_refused() -> None:
    class Old:
        def get_seq_length(self, layer: int = 0) -> int:
            return 0

        def get_mask_sizes(self, queries: int, layer: int) -> tuple[int, int]:
            return queries, 0

        get_query_offset = get_seq_length
        is_compileable = False
        is_sliding = is_linear = is_dummy = (False,)

    with pytest.raises(ElasticoreError, match="Old, which has no list of layers"):
        elastic(tiny())(tokens(1, 20), **cached(Old()))


@pytest.mark.parametrize("keep", [[True, True, True], [True, False, True], [False, True, False]])
def test_rows_that_are_chosen_by_a_mask(keep: list[bool]) -> None:
    model, rows = elastic(tiny()), torch.cat([tokens(1, 70, seed) for seed in range(3)])
    mask, step = torch.tensor(keep), tokens(3, 1, 9)
    cache = cache_of(model(rows))
    cache.batch_select_indices(mask)
    expected = model(step[mask], **cached(cache_of(model(rows[mask])))).logits
    torch.testing.assert_close(model(step[mask], **cached(cache)).logits, expected, **CLOSE)


def test_a_quantized_cache() -> None:
    from transformers.cache_utils import QuantizedLayer

    class Rounding(QuantizedLayer):
        """Quantization to float16, which needs no package."""

        def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
            return tensor.half()

        def _dequantize(self, quantized: Tensor) -> Tensor:
            return quantized.float()

    def run(model: Any) -> Tensor:
        cache = transformers.Cache(layers=[Rounding(residual_length=8) for _ in range(3)])
        return model.generate(PROMPT, **cached(cache), **SHORT)

    assert torch.equal(run(elastic(tiny(), AllRetrieval)), run(tiny()))
    with elasticore.record() as trace:
        run(elastic(tiny()))
    assert [one.decided for one in trace.passes] == [True] + [False] * 7


def test_the_router_of_a_new_way_has_its_settings() -> None:
    model = elasticore.elasticize(tiny(), small(policy=Router(boundary=7, hidden_multiplier=2)))
    router = elasticore.routers(model)[0]
    assert (router.boundary, router.hidden_multiplier) == (7, 2)
