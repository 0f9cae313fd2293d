"""Decoding one step ahead of the device: it writes what ``generate`` writes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

import elasticore as ec
from elasticore.models.versions import CACHE

from .test_elastic_cache import prompts, ways
from .test_steps import Compiler
from .tiny import FAMILIES, ByContent, cached, elastic, tiny, tokens

PLAIN = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}


def ends_of(model: Any, rows: Tensor, at: list[int]) -> list[int]:
    """Tokens that the rows write at these steps: as ends, they let rows finish there or before."""
    written = model.generate(rows, eos_token_id=None, **PLAIN)[:, rows.shape[1] :]
    return [int(written[row, step]) for row, step in enumerate(at)]


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.clone())

    def end(self) -> None:
        self.ended = True


class Enough(StoppingCriteria):
    """Stops all rows at a length, and counts how often it was asked."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked += 1
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_where_they_end_without_it(family: str) -> None:
    for kind in ways() if family == "llama" else ways()[1:]:
        model = elastic(tiny(family), ByContent, kind)
        rows = prompts()
        mask = torch.ones_like(rows)
        mask[1, :60] = 0
        for at in ([3, 5, 8], [0, 0, 0], [11, 11, 11]) if family == "llama" else ([3, 5, 8],):
            given = {**PLAIN, "eos_token_id": ends_of(model, rows, at), "attention_mask": mask}
            for cache in ({}, {"cache_implementation": "static"}):
                expected = model.generate(rows, **given, **cache)
                assert torch.equal(ec.generate(model, rows, **given, **cache), expected)
        ec.restore(model)


def test_samples_scores_and_logits_are_the_same() -> None:
    model = elastic(tiny())
    rows = prompts(2)
    ends = ends_of(model, rows, [4, 7])
    given = {
        **PLAIN,
        **{"do_sample": True, "top_k": 5, "num_return_sequences": 2, "repetition_penalty": 1.3},
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    }
    for end in (None, ends):
        found = []
        for write in (model.generate, partial(ec.generate, model)):
            torch.manual_seed(5)
            found.append(write(rows, eos_token_id=end, **given))
        expected, ahead = found
        assert torch.equal(ahead.sequences, expected.sequences)
        for name in ("scores", "logits"):
            for one, other in zip(ahead[name], expected[name], strict=True):
                assert torch.equal(one, other)
        assert (ahead[CACHE].get_seq_length() - expected[CACHE].get_seq_length()) in (0, 1)


def test_a_streamer_gets_every_token_once() -> None:
    model = elastic(tiny())
    row = prompts(1)
    for end in (None, ends_of(model, row, [6])):
        ours, theirs = Streamer(), Streamer()
        model.generate(row, streamer=theirs, eos_token_id=end, **PLAIN)
        ec.generate(model, row, streamer=ours, eos_token_id=end, **PLAIN)
        assert ours.ended
        assert [x.tolist() for x in ours.seen] == [x.tolist() for x in theirs.seen]


def test_the_step_after_the_last_is_dropped_and_the_longest_text_takes_none() -> None:
    model = elastic(tiny())
    row = prompts(1)
    length = row.shape[1]
    stop = Enough(length + 6)
    given = {**PLAIN, "eos_token_id": None, "stopping_criteria": StoppingCriteriaList([stop])}
    assert ec.generate(model, row, **given).shape[1] == length + 6
    assert stop.asked == 7
    # A cache with room for the text and no token more.
    cache = StaticCache(config=model.config, max_cache_len=length + PLAIN["max_new_tokens"] - 1)
    written = ec.generate(model, row, eos_token_id=None, **cached(cache), **PLAIN)
    assert torch.equal(written, model.generate(row, eos_token_id=None, **PLAIN))


@pytest.mark.parametrize("whole", [True, False])
def test_a_further_turn_on_a_cache_that_was_returned(whole: bool) -> None:
    """The cache holds the token that ended the first turn, and nothing of the dropped one."""
    model = elastic(tiny(), ByContent, ways(turn="keep")[0])
    row, more = prompts(1), tokens(1, 20, 9)
    end = ends_of(model, row, [6])
    new = cached(DynamicCache(config=model.config))
    first = ec.generate(model, row, eos_token_id=end, return_dict_in_generate=True, **PLAIN, **new)
    text = torch.cat((first.sequences, more), 1)
    cache = first[CACHE]
    assert cache.get_seq_length() == first.sequences.shape[1]
    given = {**PLAIN, "eos_token_id": None, "attention_mask": torch.ones_like(text)}
    expected = ec.generate(
        model,
        text if whole else more,
        **given,
        **cached(copy.deepcopy(cache)),
    )
    without = model.generate(text, **given, **cached(copy.deepcopy(cache)))
    assert torch.equal(expected[:, -12:], without[:, -12:])


def test_a_compiled_step_is_one_graph() -> None:
    torch.compiler.reset()
    model = elastic(tiny(), ByContent, ways()[1])
    compiler = Compiler()
    ends = ends_of(model, prompts(), [3, 6, 9])
    given = {**PLAIN, "eos_token_id": ends, "cache_implementation": "static"}
    expected = model.generate(prompts(), **given)
    written = ec.generate(model, prompts(), compile_config=compiler.config(), **given)
    assert torch.equal(written, expected)
    assert len(compiler.graphs) == 1
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_on_a_gpu_rows_end_where_they_end_without_it(cache: str) -> None:
    """Tokens and flags come over late there, and a compiled step is a CUDA graph."""
    torch.compiler.reset()
    model = elastic(tiny(), ByContent, ways()[1]).cuda()
    rows = prompts().cuda()
    for at in ([3, 5, 8], [0, 0, 0]):
        given = {**PLAIN, "eos_token_id": ends_of(model, rows, at), "cache_implementation": cache}
        ours, theirs = Streamer(), Streamer()
        expected = model.generate(rows, **given)
        assert torch.equal(ec.generate(model, rows, **given), expected)
        model.generate(rows[:1], streamer=theirs, **given)
        ec.generate(model, rows[:1], streamer=ours, **given)
        assert [x.tolist() for x in ours.seen] == [x.tolist() for x in theirs.seen]
    torch.compiler.reset()


def test_a_model_that_is_not_elastic_can_too() -> None:
    model = tiny()
    expected = model.generate(prompts(), eos_token_id=None, **PLAIN)
    assert torch.equal(ec.generate(model, prompts(), eos_token_id=None, **PLAIN), expected)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"num_beams": 2}, "beam"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"prefill_chunk_size": 64}, "prefill_chunk_size"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"use_cache": False}, "use_cache"),
        ({"custom_generate": "a/b"}, "custom_generate"),
        ({"synced_gpus": True}, "several processes"),
    ],
)
def test_what_it_does_not_do_is_said(setting: dict[str, Any], named: str) -> None:
    model = elastic(tiny())
    with pytest.raises(ValueError, match=rf"{named}.*; call model.generate"):
        ec.generate(model, prompts(1), **PLAIN, **setting)
