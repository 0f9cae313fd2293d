"""Settings of the plug-in: what is wrong is said before anything starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import elasticore
from elasticore import Elastic, HeadTable, Streaming
from elasticore.serving.vllm.settings import Settings


def test_there_are_none_unless_asked_for() -> None:
    assert Settings.of({}) is None
    assert Settings.of({"other": {"router": "tiny"}}) is None
    assert Settings.of(None) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tiny", "must be settings"),
        ({}, "lacks router.*there are: router, prefill"),
        ({"router": "tiny", "policy": "whole"}, "unknown policy"),
        ({"router": 7}, "router must be a name"),
        ({"router": ""}, "router must be a name"),
        ({"router": "tiny", "prefill": "whole"}, "prefill must be routed or full, got 'whole'"),
        ({"router": "tiny", "check_base": "no"}, "check_base must be true or false"),
        ({"router": "tiny", "log_requests": 1}, "log_requests must be true or false"),
    ],
)
def test_wrong_settings_are_named(given: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        Settings.of({"elasticore": given})


def test_prompts_are_read_in_full_where_they_are_decided_from(tmp_path: Any) -> None:
    assert Settings("tiny").way().prefill == "full"
    assert Settings("tiny", prefill="routed").way().prefill == "routed"
    Elastic(HeadTable([[1, 0]] * 8), sparse=Streaming(32, 64)).save(tmp_path)
    assert Settings(str(tmp_path)).way().prefill == "routed"
    assert Settings(str(tmp_path), prefill="full").way().prefill == "full"


def test_routers_that_read_answers_in_full_are_routed_in_prompts(tmp_path: Any) -> None:
    way = dataclasses.replace(Elastic.load("tiny"), decode="full")
    way.save(tmp_path / "router")
    assert Settings(str(tmp_path / "router")).way().prefill == "routed"
    with pytest.raises(ValueError, match="nothing would be sparse; leave prefill out"):
        Settings(str(tmp_path / "router"), prefill="full").way()


def test_routers_that_are_not_trained_are_refused() -> None:
    with pytest.raises(ValueError, match="router fa-ssa has no trained weights"):
        Settings("fa-ssa").way()


def test_a_router_that_is_nowhere_is_named() -> None:
    with pytest.raises(elasticore.RouterNotFound, match="nowhere"):
        Settings("nowhere/at-all/here").way()
