"""``generate`` with a host that is one step ahead of the device.

After every token transformers waits until the device has said whether all rows are finished, and
prepares the next step only then. Here the answer is read one step later, while the device is busy
with the next token; when it says that all are finished, that token is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from elasticore.models.versions import CACHE

__all__ = ["generate"]

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def generate(model: Any, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
    """As ``model.generate(...)``, with a host that is one step ahead of the device.

    It writes the same tokens, of any decoder, elastic or not. A streamer gets each token one step
    later. A cache that outlives the call also holds the token at which the last row ended.

    Parameters
    ----------
    model
        The model.
    streamer
        Gets the prompt and every token, as in ``model.generate``.
    *args, **kwargs
        What ``model.generate`` takes. Not beams, drafts and other ways to search, prefill in
        chunks, and attentions or hidden states in the output.

    Returns
    -------
    Tensor or GenerateDecoderOnlyOutput
        What ``model.generate`` returns.

    Raises
    ------
    ValueError
        If it is asked for what it does not do; it names ``model.generate`` then.
    """
    if kwargs.get("custom_generate") is not None:
        raise ValueError(_NOT.format("custom_generate"))
    if kwargs.get("synced_gpus") or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        raise ValueError(_NOT.format("several processes that hold parts of one model"))
    # A function of the caller's own is not given the streamer.
    loop = partial(_decode, streamer=streamer)
    return model.generate(*args, streamer=streamer, custom_generate=loop, **kwargs)


_NOT = "elasticore.generate does not do {}; call model.generate."


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy or sampled tokens after a prompt; the arguments are those of transformers' loops."""
    config = generation_config
    _check(model, config, model_kwargs)
    compiled = _compiles(model, config, model_kwargs.get(CACHE))
    step: Callable[..., Any] = (
        model.get_compiled_call(config.compile_config) if compiled else model.__call__
    )
    all_scores: list[Tensor] = []
    all_logits: list[Tensor] = []
    wanted = bool(config.return_dict_in_generate)
    keeps_scores, keeps_logits = wanted and config.output_scores, wanted and config.output_logits
    pad = _padding(config, stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    before: _News | None = None
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=_new(input_ids, model_kwargs),
        is_first_iteration=True,
        **model_kwargs,
    )
    outputs = model(**inputs, return_dict=True)
    while True:
        model_kwargs[CACHE] = getattr(outputs, CACHE)
        # A copy, as the next step may write to the same place; and a prompt's logits are large.
        logits = outputs.logits[:, -1].to(torch.float32, copy=True)
        del outputs
        scores = logits_processor(cast(Any, input_ids), cast(Any, logits))
        if keeps_scores:
            all_scores.append(scores)
        if keeps_logits:
            all_logits.append(logits)
        if config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat((input_ids, tokens[:, None]), 1)
        told = tuple(all_scores) if keeps_scores else None
        unfinished = unfinished & ~stopping_criteria(cast(Any, input_ids), cast(Any, told))
        news = _News(tokens, unfinished)
        if before is not None and before.all_finished():
            input_ids = input_ids[:, :-1]
            del all_scores[-1:], all_logits[-1:]
            break
        if streamer is not None and before is not None:
            streamer.put(before.tokens())
        before = news
        longest = stopping_criteria.max_length
        if longest is not None and input_ids.shape[1] >= longest:
            break
        _one_more(model_kwargs)
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, **model_kwargs
        )
        outputs = step(**inputs, return_dict=True)
    if streamer is not None:
        streamer.put(before.tokens())
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    outcome: dict[str, Any] = {"sequences": input_ids, CACHE: model_kwargs[CACHE]}
    outcome["scores"] = tuple(all_scores) if keeps_scores else None
    outcome["logits"] = tuple(all_logits) if keeps_logits else None
    return GenerateDecoderOnlyOutput(**outcome)


class _News:
    """Tokens of a step and which rows go on, on their way to the host."""

    def __init__(self, tokens: Tensor, unfinished: Tensor) -> None:
        both = torch.stack((tokens, unfinished.to(tokens.dtype)))
        self._there = torch.empty(both.shape, dtype=both.dtype, pin_memory=both.is_cuda)
        self._there.copy_(both, non_blocking=True)
        self._copied = None
        if both.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(both.device))

    def _wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def all_finished(self) -> bool:
        self._wait()
        return not bool(self._there[1].any())

    def tokens(self) -> Tensor:
        self._wait()
        return self._there[0]


def _check(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    refused = {
        f"a model with an encoder ({model.config.model_type})": model.config.is_encoder_decoder,
        str(mode.value): mode not in _MODES,
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "use_cache=False": not model_kwargs.get("use_cache", config.use_cache),
    }
    for what, there in refused.items():
        if there:
            raise ValueError(_NOT.format(what))


def _compiles(model: Any, config: GenerationConfig, cache: Any) -> bool:
    """Whether ``generate`` compiles a step: what it asks of cache, device and model."""
    if config.disable_compile or isinstance(cache, DynamicCache):
        return False
    if not getattr(cache, "is_compileable", False):
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return False
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):  # parts of it are offloaded
        return False
    return model.device.type == "cuda" or config.compile_config is not None


def _padding(config: GenerationConfig, stopping: StoppingCriteriaList) -> int | None:
    """What finished rows go on with; None if no row finishes before the others."""
    if not any(hasattr(one, "eos_token_id") for one in stopping):
        return None
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends: Any = config.eos_token_id
    return int(ends[0] if isinstance(ends, list) else ends)


def _new(input_ids: Tensor, model_kwargs: dict[str, Any]) -> int | None:
    """How many tokens are to be read of ``input_ids``, where it holds those in the cache, too."""
    cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
    there = 0 if cache is None else int(cache.get_seq_length())
    whole = input_ids.shape[1]
    if mask is not None:
        known = mask.shape[1] == whole
    else:  # dropped, as it masks nothing; positions are those of the whole text, or the caller's
        positions = model_kwargs.get("position_ids")
        known = positions is not None and positions.shape[-1] == whole
        if positions is not None and known:
            known = not bool(positions[..., 0].any())
    return whole - there if there and known else None


def _one_more(model_kwargs: dict[str, Any]) -> None:
    """Mask and positions for one more token."""
    mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    if mask is not None:
        model_kwargs["attention_mask"] = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    if positions is not None:
        model_kwargs["position_ids"] = torch.cat((positions, positions[..., -1:] + 1), -1)
