"""What is checked and set before vLLM makes its scheduler; whatever cannot be done is refused here.

An exception in the middle of a step would end the engine, and everybody's requests with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform

from elasticore.models.elastic import Elastic
from elasticore.models.fingerprint import check_base_model, fingerprint, fingerprint_of
from elasticore.serving.vllm.backbone import Backbone
from elasticore.serving.vllm.settings import Settings, reads_prompts

__all__ = ["VERSIONS", "configure", "started"]

logger = init_logger("vllm.elasticore")

VERSIONS = ("0.32",)
"""The releases of vLLM that were tested."""


@dataclass(frozen=True)
class Started:
    """How the served model attends."""

    settings: Settings
    way: Elastic
    backbone: Backbone


def configure(vllm_config: Any) -> None:
    """Check the settings for elasticore, if there are any, and set what they need of vLLM.

    Raises
    ------
    ValueError
        If something cannot be served; the message says what to do.
    """
    try:
        settings = Settings.of(vllm_config.additional_config)
        if settings is None:
            return
        wrong = list(_refusals(vllm_config))
        if wrong:
            raise ValueError("; ".join(wrong) + ".")
        found = _start(vllm_config, settings)
        _check_pages(vllm_config.cache_config, found.way)
        model = Path(vllm_config.model_config.model)
        if model.is_dir():
            _check_weights(found, model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"elasticore: {error}") from error
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    cache.block_size, cache.user_specified_block_size = found.way.block_size, True
    # So that attention is told how long prompts are; this backend has no window of that kind.
    architecture = vllm_config.model_config.model_arch_config
    architecture.rswa_window = vllm_config.model_config.max_model_len
    if found.way.prefill == "routed" and reads_prompts(found.way):
        cache.enable_prefix_caching = scheduler.enable_chunked_prefill = False
        longest = vllm_config.model_config.max_model_len + scheduler.max_num_seqs
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest)
        how = "prompts come whole and are not shared: chunked prefill and prefix caching are off"
    elif found.way.prefill == "routed":
        how = "its heads are the same for every prompt: chunks and cached prefixes stay as they are"
    else:
        how = "prompts are read in full, in chunks, with prefixes shared; answers are routed"
    logger.info(
        "elasticore: %s on %d layers, pages of %d tokens; %s.",
        settings.router,
        len(found.backbone.elastic),
        cache.block_size,
        how,
    )


def started(vllm_config: Any) -> Started | None:
    """How the served model attends, as :func:`configure` found it; None without settings.

    Raises
    ------
    ValueError
        If the engine was started in a way that passed :func:`configure` by, or the weights are of
        another model than the routers.
    """
    settings = Settings.of(vllm_config.additional_config)
    if settings is None:
        return None
    if vllm_config.model_config.rswa_window is None:
        raise ValueError(
            f"elasticore: the architecture {vllm_config.model_config.architecture} was not checked "
            "at the start, as vLLM runs it by other means than its own classes; it cannot be "
            "served with routers."
        )
    found = _start(vllm_config, settings)
    model = vllm_config.model_config
    if not Path(model.model).is_dir():  # of a hub, and loaded by now
        _check_weights(found, _downloaded(model.model, model.revision))
    return found


def _downloaded(name: str, revision: str | None) -> Path | None:
    """Where the files of a hub's model are; None if it is no such model, as one in a bucket."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _start(vllm_config: Any, settings: Settings) -> Started:
    backbone = Backbone(vllm_config.model_config.hf_text_config)
    way = settings.way()
    if way.base is not None:
        check_base_model(way.base, fingerprint(backbone.skeleton), weights=False)
    way.policy.modules(backbone.shapes)  # fits, or raises
    return Started(settings, way, backbone)


def _check_weights(found: Started, folder: Path | None) -> None:
    if found.way.base is None or not found.settings.check_base:
        return
    skeleton = found.backbone.skeleton
    own = fingerprint(skeleton) if folder is None else fingerprint_of(skeleton, folder)
    if own["weights"] is None:
        logger.warning(
            "elasticore: there are no safetensors of the whole model%s, so it was not checked that "
            "the routers were trained for these weights.",
            "" if folder is None else f" in {folder}",
        )
    check_base_model(found.way.base, own, weights=True)


def _refusals(vllm_config: Any) -> Iterator[str]:
    """What is asked of vLLM that goes with no router."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if not vllm.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        yield (
            f"it was tested with vLLM {', '.join(VERSIONS)}, and this is {vllm.__version__}; "
            "install one that was tested, or a newer elasticore"
        )
    if not current_platform.is_cpu():
        yield "it serves on vLLM's CPU engine only, so far; start vLLM with that"
    if vllm_config.use_v2_model_runner:
        yield "the second model runner is not supported; set VLLM_USE_V2_MODEL_RUNNER=0"
    if vllm_config.model_config.runner_type != "generate":
        yield "only models that generate are supported; leave out --runner"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported; leave out --speculative-config"
    if vllm_config.lora_config is not None:
        yield "adapters are not supported; merge one into the model, and leave out --enable-lora"
    if vllm_config.model_config.enable_prompt_embeds:
        yield "prompts of embeddings are not supported; leave out --enable-prompt-embeds"
    if vllm_config.kv_transfer_config is not None:
        yield "KV transfer is not supported; leave out --kv-transfer-config"
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            yield (
                f"--{name.replace('_', '-')} {getattr(parallel, name)} is not supported; leave it "
                "out, and use --data-parallel-size for more devices"
            )
    if cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        yield f"--kv-cache-dtype {cache.cache_dtype} is not supported; leave it out"


def _check_pages(cache: Any, way: Elastic) -> None:
    if cache.user_specified_block_size and cache.block_size != way.block_size:
        raise ValueError(
            f"the routers' blocks have {way.block_size} tokens, and pages must have as many; leave "
            f"out --block-size {cache.block_size}."
        )
