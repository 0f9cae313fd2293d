"""What cannot be served is refused at the start, with what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticore import Elastic, HeadTable, Streaming
from elasticore.assets import tiny as assets

from .engines import engine, prompts  # first: without vLLM the rest is skipped

# isort: split
from elasticore.serving.vllm.startup import started

BACKBONE = assets() / "backbone"


def start(way: Any = "tiny", model: Any = BACKBONE, **settings: Any) -> None:
    with engine(model, way, **settings):
        raise AssertionError("it started")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2 is not supported"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2 is not supported"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is not supported"),
        ({"block_size": 64}, "blocks have 32 tokens.*leave out --block-size 64"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                    "prompt_lookup_max": 3}},
            "speculative decoding is not supported; leave out",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV transfer is not supported",
        ),
        ({"runner": "pooling"}, "only models that generate"),
        ({"enable_lora": True}, "merge one into the model, and leave out --enable-lora"),
        ({"enable_prompt_embeds": True}, "leave out --enable-prompt-embeds"),
        ({"elasticore": {"policy": "whole"}}, "unknown policy; there are: router"),
        ({"elasticore": {"prefill": "half"}}, "prefill must be routed or full"),
    ],
)  # fmt: skip
def test_settings_that_go_with_no_router(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)elasticore: .*{said}"):
        start(**settings)


def test_routers_that_are_nowhere() -> None:
    with pytest.raises(ValueError, match=r"(?s)elasticore: .*nowhere/at/all"):
        start("nowhere/at/all")


def test_routers_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)elasticore: .*way is for another model"):
        start("smollm2")
    with pytest.raises(ValueError, match=r"(?s)elasticore: .*table of 3 layers"):
        start(Elastic(HeadTable([[1, 0]] * 3), sparse=Streaming(32, 64)).save(tmp_path))


def other_weights(folder: Path) -> Path:
    """The tiny model with one norm changed."""
    from safetensors.torch import load_file, save_file

    for file in BACKBONE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_other_weights_than_the_routers(tmp_path: Path) -> None:
    model = other_weights(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)elasticore: .*other weights than this model's"):
        start(model=model)
    with engine(model, "tiny", elasticore={"check_base": False}) as served:
        assert served.answer(prompts((40,), 200), 2)


def test_other_releases_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    with pytest.raises(ValueError, match=r"(?s)elasticore: .*tested with vLLM 0\.\d+, and this is"):
        start()


def test_families_without_known_keys(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)elasticore: .*gpt_neox.*supported: "):
        start(model=tmp_path, skip_tokenizer_init=True)


def test_engines_that_passed_the_check_by_are_refused() -> None:
    model = SimpleNamespace(rswa_window=None, architecture="SomeForCausalLM")
    config = SimpleNamespace(
        additional_config={"elasticore": {"router": "tiny"}}, model_config=model
    )
    with pytest.raises(ValueError, match="SomeForCausalLM was not checked at the start"):
        started(config)


def test_weights_that_are_nowhere_are_said_not_to_be_checked(caplog: Any) -> None:
    # As of a model in a bucket, which vLLM streams in.
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(BACKBONE)
    model = SimpleNamespace(
        rswa_window=1, hf_text_config=text, model="s3://bucket/model", revision=None
    )
    config = SimpleNamespace(
        additional_config={"elasticore": {"router": "tiny"}}, model_config=model
    )
    with caplog.at_level("WARNING", "vllm.elasticore"):
        assert started(config)
    assert "was not checked that the routers were trained for these weights" in caplog.text


def test_what_is_set_is_said(caplog: Any) -> None:
    for prefill, said in (("full", "read in full, in chunks"), ("routed", "come whole")):
        caplog.clear()
        with (
            caplog.at_level("INFO", "vllm.elasticore"),
            engine(BACKBONE, "tiny", elasticore={"prefill": prefill}) as served,
        ):
            config = served.llm.llm_engine.vllm_config
        lines = [record.getMessage() for record in caplog.records if "layers" in record.msg]
        assert len(lines) == 1 and said in lines[0]
        assert config.cache_config.block_size == 32
        whole = prefill == "routed"
        assert config.cache_config.enable_prefix_caching != whole
        assert config.scheduler_config.enable_chunked_prefill != whole


def test_every_prompt_is_in_the_log_and_the_metrics(caplog: Any) -> None:
    from prometheus_client import REGISTRY

    def counted() -> float:
        return REGISTRY.get_sample_value("elasticore_sparse_share_count") or 0.0

    for loud in (True, False):
        caplog.clear()
        before = counted()
        with (
            caplog.at_level("INFO", "vllm.elasticore"),
            engine(BACKBONE, "tiny", elasticore={"log_requests": loud}) as served,
        ):
            served.answer(prompts((40, 77), 200), 2)
        lines = [record.getMessage() for record in caplog.records if "a prompt" in record.msg]
        assert len(lines) == 2 * loud
        assert counted() == before + 2
        assert not loud or "a prompt of 77 tokens" in "".join(lines)
