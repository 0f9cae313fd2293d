"""ElasticConfig: every valid setting survives JSON, every invalid one is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore import BlockSelector, ElasticConfig, HeadMode, XAttention, register_selector

MODES = [f"{a}-{b}" for a in ("fa", "ssa", "xa") for b in ("fa", "ssa", "xa") if a != b]


@st.composite
def configs(draw: st.DrawFn) -> ElasticConfig:
    block = draw(st.sampled_from([16, 32, 64, 128]))
    strides = [stride for stride in (1, 2, 4, 8, 16, 32, 64, 128) if stride <= block]
    selectors = st.builds(
        XAttention,
        stride=st.sampled_from(strides),
        threshold=st.floats(0, 1, exclude_min=True),
        official_quirk=st.booleans(),
        chunk=st.integers(7, 20).map(lambda power: 2**power),
    )
    return ElasticConfig(
        mode=draw(st.sampled_from(MODES)),
        sink=block * draw(st.integers(0, 50)),
        local=block * draw(st.integers(1, 50)),
        block_size=block,
        # The default selector has a stride of 16, which every block size takes.
        selector=draw(st.none() | selectors),
        boundary=draw(st.none() | st.integers(1, 10**6)),
        hidden_multiplier=draw(st.integers(1, 64)),
        sampler=draw(st.sampled_from(["gumbel-softmax", "gumbel-sigmoid"])),
        decode=draw(st.sampled_from(["routed", "full"])),
    )


@given(configs())
def test_every_setting_survives_json(config: ElasticConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert ElasticConfig.from_dict(json.loads(text)) == config


def test_settings_survive_a_file(tmp_path: Path) -> None:
    config = ElasticConfig(mode="xa-ssa", boundary=None, selector=XAttention(threshold=0.8))
    config.save(tmp_path / "elastic.json")
    assert ElasticConfig.load(tmp_path / "elastic.json") == config
    assert ElasticConfig.from_dict({}) == ElasticConfig()  # a file may give what differs only


def test_defaults_are_the_papers() -> None:
    config = ElasticConfig()
    assert (config.retrieval, config.sparse) == (HeadMode.FULL, HeadMode.STREAMING)
    assert (config.sink, config.local, config.block_size, config.boundary) == (128, 2048, 128, 100)
    assert config.selector is None
    assert ElasticConfig(mode="fa-xa").selector == XAttention()


def test_modes_can_be_given_as_head_modes() -> None:
    config = ElasticConfig(mode=(HeadMode.SELECTED, HeadMode.STREAMING))  # type: ignore[arg-type]
    assert config == ElasticConfig(mode="xa-ssa")
    assert (config.retrieval, config.sparse) == (HeadMode.SELECTED, HeadMode.STREAMING)


def test_plans_carry_every_setting() -> None:
    config = ElasticConfig(mode="xa-ssa", sink=32, local=64, block_size=32)
    gate = torch.tensor([[0.0, 1.0]], requires_grad=True)
    modes = torch.tensor([[2, 1]], dtype=torch.int8)
    for plan in (config.plan(modes), config.gated_plan(gate)):
        assert torch.equal(plan.modes, modes)
        assert (plan.retrieval, plan.sparse) == (HeadMode.SELECTED, HeadMode.STREAMING)
        assert (plan.streaming.sink, plan.streaming.local, plan.block_size) == (32, 64, 32)
        assert plan.selector == XAttention()
    assert plan.gate is gate


INVALID: list[tuple[str, Any, type[Exception]]] = [
    ("mode", "fa", ValueError),
    ("mode", "fa-fa", ValueError),
    ("mode", "fa-moba", ValueError),
    ("mode", "fa-ssa-xa", ValueError),
    ("mode", ("fa", "ssa"), ValueError),
    ("mode", (HeadMode.FULL,), ValueError),
    ("mode", None, ValueError),
    ("sink", -128, ValueError),
    ("sink", 100, ValueError),
    ("sink", 128.0, TypeError),
    ("sink", True, TypeError),
    ("local", 0, ValueError),
    ("local", 2000, ValueError),
    ("local", "2048", TypeError),
    ("block_size", 256, ValueError),
    ("block_size", 48, ValueError),
    ("block_size", 128.0, TypeError),
    ("selector", "xattention", TypeError),
    ("selector", XAttention, TypeError),
    ("boundary", 0, ValueError),
    ("boundary", 1.5, TypeError),
    ("boundary", False, TypeError),
    ("hidden_multiplier", 0, ValueError),
    ("hidden_multiplier", None, TypeError),
    ("sampler", "softmax", ValueError),
    ("sampler", None, ValueError),
    ("decode", "sparse", ValueError),
    ("decode", True, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), INVALID)
def test_every_invalid_setting_is_named(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        ElasticConfig(**{name: value})
    if not isinstance(value, (tuple, type)):  # what JSON can hold
        with pytest.raises(error, match=name):
            ElasticConfig.from_dict({name: value})


def test_a_selector_that_does_not_fit_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stride=32 must divide block_size=16"):
        ElasticConfig(mode="fa-xa", sink=16, local=32, block_size=16, selector=XAttention(32))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"wings": 2, "sink": 128}, ValueError, "unknown settings wings; there are: block_size"),
        ([], TypeError, "dict of settings, got list"),
        ({"selector": {"name": "mamba"}}, ValueError, "selector 'mamba' is unknown"),
        ({"selector": {}}, ValueError, "selector None is unknown"),
        (
            {"selector": {"name": "xattention", "wings": 2}},
            ValueError,
            "'xattention' does not take.*wings",
        ),
        ({"selector": {"name": "xattention", "stride": 3}}, ValueError, "stride"),
    ],
)
def test_foreign_data_is_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ElasticConfig.from_dict(data)


def test_selectors_without_a_name_cannot_be_saved_until_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from elasticore.patterns import registry

    @dataclasses.dataclass(frozen=True)
    class Nearest(XAttention):
        reach: int = 4

    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))
    config = ElasticConfig(mode="fa-xa", selector=Nearest(reach=7))
    with pytest.raises(ValueError, match=r"Nearest has no name.*register_selector"):
        config.to_dict()
    register_selector("nearest", Nearest)
    assert issubclass(Nearest, BlockSelector)
    assert ElasticConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
