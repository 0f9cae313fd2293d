"""vLLM gives what transformers gives: the same decisions, and token for token the same answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import elasticore
from elasticore import AllRetrieval, Elastic, HeadTable, Router, Streaming, XAttention
from elasticore.assets import tiny as assets
from tests.models.tiny import FAMILIES, spread
from tests.models.tiny import tiny as random_model

from .engines import Engine, answers, engine, prompts

BACKBONE, ROUTER = assets() / "backbone", assets() / "router"
LENGTHS = (1, 31, 32, 33, 500, 700, 433, 64, 210, 1200, 150, 2, 350, 300)
TOKENS = 33


@pytest.fixture(scope="module")
def backbone() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def asked() -> list[list[int]]:
    """Pieces of text, of which the tiny model's routers think differently."""
    from transformers import AutoTokenizer

    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    ids = AutoTokenizer.from_pretrained(BACKBONE)(text)["input_ids"]
    return [ids[2000 * i : 2000 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=["full", "routed"])
def reference(request: Any, backbone: Any, asked: Any) -> tuple[str, Any, Any]:
    """How prompts are read, the answers, and the decisions."""
    way = dataclasses.replace(Elastic.load(ROUTER), prefill=request.param)
    with way.on(backbone) as model:
        return request.param, *answers(model, asked, TOKENS)


def same_decisions(served: Engine, asked: list[list[int]], expected: list[Any]) -> None:
    """Every prompt was decided as in transformers, as often as it came."""
    by_length = {len(prompt): own for prompt, own in zip(asked, expected, strict=True)}
    assert len(by_length) == len(asked)
    decided = {(length, layer) for length, own in served.decided for layer in own}
    assert decided == {(length, layer) for length, own in by_length.items() for layer in own}
    for length, own in served.decided:
        for layer, decisions in own.items():
            assert torch.equal(decisions, by_length[length][layer])


def test_the_routers_part_the_prompts(reference: Any) -> None:
    _, _, decided = reference
    assert len({str(own) for own in decided}) > 2


def test_fourteen_requests_in_four_slots(reference: Any, asked: Any) -> None:
    prefill, expected, decided = reference
    with engine(BACKBONE, "tiny", elasticore={"prefill": prefill}) as served:
        assert served.answer(asked, TOKENS) == expected
        same_decisions(served, asked, decided)


def test_preempted_requests_are_decided_as_before(reference: Any, asked: Any) -> None:
    prefill, expected, decided = reference
    few = [i for i, n in enumerate(LENGTHS) if n <= 300]
    texts = [asked[i] for i in few]
    settings = {"num_gpu_blocks_override": 24, "max_model_len": 512, "max_num_seqs": 9}
    with engine(BACKBONE, "tiny", elasticore={"prefill": prefill}, **settings) as served:
        assert served.answer(texts, TOKENS) == [expected[i] for i in few]
        assert served.counter("vllm:num_preemptions") > 0
        assert len(served.decided) > len(few)
        same_decisions(served, texts, [decided[i] for i in few])


@pytest.mark.parametrize("reference", ["full"], indirect=True)
@pytest.mark.parametrize("budget", [64, 256])
def test_chunks_and_shared_prefixes(reference: Any, asked: Any, budget: int) -> None:
    _, expected, decided = reference
    longer = [prompt + prompt[: len(prompt) // 2] for prompt in asked]
    with engine(BACKBONE, "tiny", max_num_batched_tokens=budget) as served:
        assert served.answer(asked, TOKENS) == expected
        served.answer(longer, 1)
        assert served.answer(asked[::-1], TOKENS) == expected[::-1]
        assert served.counter("vllm:prefix_cache_hits") > 0
        served.decided = [own for own in served.decided if own[0] in LENGTHS]
        same_decisions(served, asked, decided)


@pytest.mark.slow
def test_compiled(reference: Any, asked: Any) -> None:
    prefill, expected, decided = reference
    with engine(BACKBONE, "tiny", elasticore={"prefill": prefill}, enforce_eager=False) as served:
        assert served.answer(asked, TOKENS) == expected
        same_decisions(served, asked, decided)


def test_tables_of_heads_keep_chunks_and_shared_prefixes(
    backbone: Any, asked: Any, tmp_path: Path
) -> None:
    way = Elastic(HeadTable.random(8, 4, 0.7, seed=1), sparse=Streaming(32, 128), block_size=32)
    some = asked[4:9]
    with way.on(backbone) as model:
        expected, decided = answers(model, some, TOKENS)
    with engine(BACKBONE, way.save(tmp_path), max_num_batched_tokens=96) as served:
        assert served.answer(some, TOKENS) == expected
        assert served.answer(some, TOKENS) == expected
        assert served.counter("vllm:prefix_cache_hits") > 0
        same_decisions(served, some, decided)


@pytest.mark.parametrize("decode", ["routed", "full"])
def test_selectors_read_prompts(decode: Any, backbone: Any, asked: Any, tmp_path: Path) -> None:
    way = dataclasses.replace(Elastic.load(ROUTER), retrieval=XAttention(8, 0.7), decode=decode)
    some = asked[2:9]
    with way.on(backbone) as model:
        expected, decided = answers(model, some, TOKENS)
    settings = {
        "elasticore": {"prefill": "routed"},
        "num_gpu_blocks_override": 66,
        "max_model_len": 2048,
    }
    with engine(BACKBONE, way.save(tmp_path), **settings) as served:
        assert served.answer(some, TOKENS) == expected
        same_decisions(served, some, decided)


def test_routing_that_finds_nothing_sparse_is_vllm_itself(
    backbone: Any, asked: Any, tmp_path: Path
) -> None:
    asked = asked[:9]
    expected, _ = answers(backbone, asked, TOKENS)
    way = Elastic(AllRetrieval(), sparse=Streaming(32, 128), block_size=32)
    with engine(BACKBONE, way.save(tmp_path)) as served:
        assert served.answer(asked, TOKENS) == expected


def test_without_settings_it_is_vllm_itself(backbone: Any, asked: Any) -> None:
    from elasticore.serving.vllm import cpu

    asked = asked[:9]
    expected, _ = answers(backbone, asked, TOKENS)
    with pytest.MonkeyPatch.context() as patch, engine(BACKBONE, None) as served:
        patch.setattr(cpu, "Step", None)  # whoever asks for one fails
        assert served.answer(asked, TOKENS) == expected
        assert not served.decided


OTHERS = ("mistral", "qwen2", "qwen3", "olmo2")  # as llama, phi3 or the tiny model


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if f in OTHERS else ()) for f in FAMILIES],
)
def test_every_family(family: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 256, "max_position_embeddings": 1024,
    }  # fmt: skip
    if family == "gemma3_text":
        settings["query_pre_attn_scalar"] = 32
    model = random_model(family, **settings)
    model.save_pretrained(tmp_path / "model")
    way = Elastic(Router(boundary=20), sparse=Streaming(32, 64), block_size=32)
    spread(elasticore.elasticize(model, way))
    elasticore.way_of(model).save(tmp_path / "router")
    elasticore.restore(model)
    asked, known = prompts((5, 150, 333, 64), 256), {}
    # vLLM has no class of its own for olmo2 and changes transformers' in its process: once only.
    for prefill in ("full",) if family == "olmo2" else ("full", "routed"):
        way = dataclasses.replace(Elastic.load(tmp_path / "router"), prefill=prefill)
        with way.on(model):
            known[prefill] = answers(model, asked, 12)
    for prefill, (expected, decided) in known.items():
        ours, own = {"prefill": prefill}, tmp_path / "router"
        with engine(tmp_path / "model", own, elasticore=ours, skip_tokenizer_init=True) as served:
            assert served.answer(asked, 12) == expected
            same_decisions(served, asked, decided)
