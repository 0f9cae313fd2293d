"""Patterns by name: what is written is read back, and what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from elasticore import (
    Full,
    InfLLMV2,
    MoBA,
    NSASelected,
    Pattern,
    Streaming,
    TriangleMix,
    XAttention,
    pattern_from_dict,
    pattern_to_dict,
    register_pattern,
)
from elasticore.patterns.registry import PATTERNS

pytestmark = pytest.mark.usefixtures("clean_registry")

EVERY = {
    "full": Full(),
    "streaming": Streaming(64, 256),
    "infllm-v2": InfLLMV2(top_k=3),
    "moba": MoBA(512, 4),
    "nsa-selected": NSASelected(top_k=9),
    "trianglemix": TriangleMix(last=64),
    "xattention": XAttention(threshold=0.8),
}


def test_every_pattern_of_ours_has_a_name() -> None:
    assert list(EVERY) == list(PATTERNS.built_in)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_written_is_read_back(name: str) -> None:
    data = json.loads(json.dumps(pattern_to_dict(EVERY[name])))
    assert data["name"] == name
    assert pattern_from_dict(data) == EVERY[name]
    assert type(pattern_from_dict({"name": name})) is type(EVERY[name])


@dataclass(frozen=True)
class Wide(Streaming):
    """A pattern of somebody else's."""


class Bare(Pattern):
    """No dataclass."""


def test_a_pattern_without_a_name_can_be_written_once_it_has_one() -> None:
    with pytest.raises(ValueError, match=r"Wide has no name; call elasticore\.register_pattern"):
        pattern_to_dict(Wide(0, 128))
    register_pattern("wide", Wide)
    assert pattern_to_dict(Wide(0, 128)) == {"name": "wide", "sink": 0, "local": 128}
    assert pattern_from_dict({"name": "wide", "local": 256}) == Wide(128, 256)


@pytest.mark.parametrize(
    ("name", "cls", "error", "message"),
    [
        (3, Wide, TypeError, "name must be a str"),
        ("streaming", Wide, ValueError, "name 'streaming' is taken"),
        ("mine", dict, TypeError, "pattern dict must be a dataclass"),
        ("mine", Bare, TypeError, "pattern Bare must be a dataclass"),
        ("mine", Full(), TypeError, r"pattern must be a subclass of elasticore\.Pattern"),
    ],
)
def test_what_is_no_pattern_is_not_registered(
    name: Any, cls: Any, error: type[Exception], message: str
) -> None:
    before = PATTERNS.names()
    with pytest.raises(error, match=message):
        register_pattern(name, cls)
    assert PATTERNS.names() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "pattern None is unknown; there are: full, streaming, .*xattention"),
        ({"name": "mamba"}, "pattern 'mamba' is unknown"),
        ({"name": "full", "sink": 4}, "pattern 'full' does not take these settings.*sink"),
        ({"name": "streaming", "sink": "4"}, "pattern 'streaming' does not take .*sink must be"),
        ({"name": "streaming", "sink": -4}, "sink must be at least 0 tokens, got -4"),
    ],
)
def test_what_names_no_pattern_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern_from_dict(data)
