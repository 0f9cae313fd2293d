"""auto takes the fastest backend that can do a call, says why, and never looks at the device."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import elasticore
from elasticore import (
    AttentionRequest,
    HeadMode,
    HeadPlan,
    HybridHeadAttention,
    SequenceLayout,
    UnsupportedRequest,
    Verdict,
    hybrid_head_attention,
    register_backend,
)
from elasticore import choice as module
from elasticore.backends import costs
from elasticore.backends.registry import BACKENDS
from elasticore.backends.serial import SerialAttention
from elasticore.backends.typical import example_request, typical_requests
from elasticore.choice import choose, fastest

pytestmark = pytest.mark.usefixtures("clean_registry")

EVERY_LANE = frozenset(HeadMode)


class Quick(SerialAttention):
    """A backend that knows how long it takes, and counts how often it is asked."""

    ms: float | None = 3.0
    here = True
    asked = 0

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(cls.here, "it is out to lunch.")

    def supports(self, request: AttentionRequest) -> Verdict:
        type(self).asked += 1
        return Verdict(request.head_dim <= 128, "head_dim is above 128.")

    def cost(self, request: AttentionRequest) -> float | None:
        return self.ms


@pytest.fixture
def quick() -> type[Quick]:
    """A fresh class, registered as ``quick``."""
    fresh = type("Fresh", (Quick,), {})
    register_backend("quick", fresh)
    return fresh


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The serial backend has been measured here: 5 ms for everything."""
    times = {"serial": 5.0}
    monkeypatch.setattr(costs, "estimate", lambda name, request: times.get(name))


# --- Times ---------------------------------------------------------------------------------------


lengths = st.integers(1, 2**20)
tables = st.dictionaries(lengths, st.floats(1e-3, 1e4), min_size=1, max_size=8)


def test_a_power_law_is_interpolated_exactly() -> None:
    points = {n: 3e-9 * n**2 for n in (512, 4096, 65536)}
    for n in (600, 1000, 4096, 30000, 65535):
        assert costs.interpolate(points, n) == pytest.approx(3e-9 * n**2, rel=1e-12)


@given(points=tables, length=lengths)
def test_between_two_points_the_time_is_between_theirs(
    points: dict[int, float], length: int
) -> None:
    ms = costs.interpolate(points, length)
    below, above = [n for n in points if n <= length], [n for n in points if n >= length]
    if not above:
        assert ms is None, "nobody knows how it goes on"
    elif not below:
        assert ms == points[min(points)], "what is shorter takes as long as its launch"
    else:
        ends = points[max(below)], points[min(above)]
        assert ms is not None
        assert min(ends) * (1 - 1e-12) <= ms <= max(ends) * (1 + 1e-12)


@given(points=tables, pair=st.tuples(lengths, lengths))
def test_longer_calls_take_longer_if_they_did_in_the_measurements(
    points: dict[int, float], pair: tuple[int, int]
) -> None:
    rising = dict(zip(sorted(points), sorted(points.values()), strict=True))
    short, long = (costs.interpolate(rising, n) for n in sorted(pair))
    assert long is None or (short is not None and short <= long * (1 + 1e-12))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "prefill-d128"),
        ({"head_dim": 64, "dtype": torch.float16}, "prefill-d64"),
        ({"lanes": EVERY_LANE}, "selected-d128"),
        ({"queries": 1}, "decode-d128"),
        ({"queries": 4, "sequences": 4, "layout": "packed"}, "decode-d128"),
        ({"queries": 1, "lanes": EVERY_LANE}, None),
        ({"gradients": True}, None),
        ({"dtype": torch.float32}, None),
        ({"block_size": 64}, None),
    ],
)
def test_measurements_speak_for_calls_like_those_measured(
    changes: dict[str, Any], kind: str | None
) -> None:
    assert costs.kind(example_request(**changes)) == kind


def length(**changes: Any) -> float:
    return costs._length(example_request(**changes))


def test_a_call_is_looked_up_at_the_length_that_makes_as_much_work() -> None:
    assert length() == pytest.approx(4096)
    assert length(sequences=4, layout="padded") == pytest.approx(2 * 4096)
    assert length(query_heads=8, kv_heads=2) == pytest.approx(2048)
    packed = length(sequences=4, layout="packed", queries=4 * 4096, keys=4 * 4096)
    assert packed == pytest.approx(2 * 4096)
    # The last quarter of a prompt has 7/16 of its pairs.
    assert length(queries=1024) == pytest.approx(4096 * (7 / 16) ** 0.5)
    # Decoding reads the cache: twice the sequences, twice the work.
    assert length(queries=1) == 4096
    assert length(queries=1, sequences=2) == 8192
    assert length(queries=2, keys=8192, sequences=2, layout="packed") == 8192


def test_there_are_no_times_for_a_device_that_was_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert costs.estimate("serial", example_request()) is None  # on a CPU
    monkeypatch.setattr(costs, "capability", lambda device: "1.0")
    assert costs.estimate("triton", example_request()) is None
    monkeypatch.setattr(costs, "capability", lambda device: "9.0")
    assert costs.estimate("nobody", example_request()) is None
    assert costs.estimate("triton", example_request(queries=2**21, keys=2**21)) is None


def test_the_table_in_the_package_holds_positive_times() -> None:
    text = importlib.resources.files("elasticore.backends").joinpath("costs.json").read_text()
    table = json.loads(text)
    assert {"what", "command", "measured"} <= set(table)
    assert "9.0" in table["milliseconds"]
    for kinds in table["milliseconds"].values():
        for engines in kinds.values():
            assert set(engines) <= set(BACKENDS.built_in)
            for points in engines.values():
                assert points
                assert all(int(n) > 0 and ms > 0 for n, ms in points.items())


def test_long_prompts_on_a_hopper_gpu_go_to_the_fused_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "capability", lambda device: "9.0")
    request = typical_requests(torch.device("cuda"))["prefill 64K"]
    estimates = {name: costs.estimate(name, request) for name in BACKENDS.built_in}
    assert estimates["triton"] is not None
    assert fastest(estimates) == "triton"


# --- Which one -----------------------------------------------------------------------------------


known = st.floats(1e-3, 1e4)
choices = st.lists(st.none() | known, min_size=1, max_size=6).map(
    lambda values: {f"backend{i}": value for i, value in enumerate(values)}
)


@given(choices)
def test_the_first_wins_unless_another_is_known_to_be_faster(
    estimates: dict[str, float | None],
) -> None:
    best = fastest(estimates)
    first = next(iter(estimates))
    if estimates[first] is None:
        assert best == first
    else:
        assert estimates[best] == min(ms for ms in estimates.values() if ms is not None)
        assert best == next(name for name, ms in estimates.items() if ms == estimates[best])


@given(estimates=choices, share=st.floats(0.01, 1), extra=st.none() | known)
def test_the_choice_is_monotone(
    estimates: dict[str, float | None], share: float, extra: float | None
) -> None:
    """Who becomes faster stays chosen, and who joins at the end is taken only if it is faster."""
    best = fastest(estimates)
    ms = estimates[best]
    if ms is not None:
        assert fastest({**estimates, best: ms * share}) == best
    joined = fastest({**estimates, "late": extra})
    faster = ms is not None and extra is not None and extra < ms
    assert joined == ("late" if faster else best)


@pytest.mark.usefixtures("measured")
def test_a_registered_backend_is_taken_if_it_says_that_it_is_faster(quick: type[Quick]) -> None:
    choice = choose(None, example_request())
    assert choice == ("quick", choice.engine, "estimated at 3 ms; serial 5")
    assert isinstance(choice.engine, quick)
    assert choose("auto", example_request(head_dim=256)).name == "serial", "quick refuses it"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("ms", [None, 5.0, 7.0])
def test_it_is_not_taken_without_an_estimate_or_with_a_slower_one(
    quick: type[Quick], ms: float | None
) -> None:
    quick.ms = ms
    assert choose(None, example_request()).name == "serial"
    assert choose("quick", example_request()).name == "quick"


def test_where_nothing_was_measured_the_default_order_decides(quick: type[Quick]) -> None:
    choice = choose(None, example_request())
    assert choice.name == "serial"
    assert choice.reason.startswith("the first in the default order")
    assert quick.asked == 0, "nobody could take its place"


def test_the_order_of_the_built_in_backends_is_that_of_the_documentation() -> None:
    assert tuple(BACKENDS.built_in) == ("triton", "flashinfer", "flex", "serial")


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("method", ["supports", "cost", "__init__"])
def test_a_registered_backend_that_fails_to_answer_breaks_nothing(
    quick: type[Quick], method: str
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("its licence server")

    setattr(quick, method, fail)
    assert choose(None, example_request()).name == "serial"


def test_a_named_backend_needs_no_reason() -> None:
    assert choose("serial", example_request()).reason == ""
    with elasticore.use_backend("serial"):
        assert choose(None, example_request()).reason == ""


# --- What is remembered --------------------------------------------------------------------------


@pytest.mark.usefixtures("measured")
def test_a_request_is_resolved_once(quick: type[Quick]) -> None:
    first = choose(None, example_request())
    assert choose(None, example_request()) is first
    assert quick.asked == 1
    choose(None, example_request(keys=8192))
    assert quick.asked == 2


@pytest.mark.usefixtures("measured")
def test_no_field_of_a_request_is_overlooked(quick: type[Quick]) -> None:
    """Two requests that differ anywhere may be refused and supported: each is asked about."""
    base = example_request(queries=64, keys=64)
    other = example_request(
        device=torch.device("cpu", 0),  # on another kind of device other backends come first
        dtype=torch.float32,
        head_dim=64,
        query_heads=16,
        kv_heads=4,
        queries=32,
        keys=128,
        sequences=2,
        layout="padded",
        lanes=EVERY_LANE,
        block_size=64,
        gradients=True,
    )
    choose(None, base)
    for number, field in enumerate(dataclasses.fields(AttentionRequest), 2):
        choose(None, dataclasses.replace(base, **{field.name: getattr(other, field.name)}))
        assert quick.asked == number, field.name


@pytest.mark.usefixtures("measured")
def test_what_changes_is_noticed(quick: type[Quick]) -> None:
    quick.here = False
    assert choose(None, example_request()).name == "serial"
    quick.here = True
    elasticore.list_backends()  # asks afresh
    assert choose(None, example_request()).name == "quick"
    quick.here = False
    elasticore.list_backends()
    assert choose(None, example_request()).name == "serial"
    register_backend("quick", type("Better", (Quick,), {"ms": 1.0}), replace=True)
    assert choose(None, example_request()).reason == "estimated at 1 ms; serial 5"


def test_a_refusal_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SerialAttention, "supports", lambda self, request: Verdict(False, "no."))
        with pytest.raises(UnsupportedRequest, match="serial: no"):
            choose(None, example_request())
    assert choose(None, example_request()).name == "serial"


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 8)
    for keys in range(1, 100):  # as a long generation does
        choose(None, example_request(queries=1, keys=keys))
        assert len(module._chosen) <= 8


# --- The device is not read ----------------------------------------------------------------------


class NothingIsRead(TorchDispatchMode):
    """Fails on whatever brings a value to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy")
        assert not any(name in str(func) for name in reads), func
        return func(*args, **(kwargs or {}))


def test_a_request_is_made_and_resolved_without_reading_a_tensor() -> None:
    q, k = torch.empty(2, 4, 64, 32), torch.empty(2, 2, 64, 32)
    ends = torch.tensor([0, 3]), torch.tensor([63, 60])
    decisions = torch.zeros(2, 2, dtype=torch.int8)
    padded = SequenceLayout.padded(*ends)
    plan = HeadPlan(decisions, check=False)
    with NothingIsRead():
        request = AttentionRequest.of(q, k, k, plan, padded)
        assert choose(None, request).name == "serial"


@pytest.mark.parametrize("values", [0, 1, 77, None])
def test_the_choice_is_the_same_whatever_the_decisions_are(values: int | None) -> None:
    """Even values that are no decision, and a tensor that has none."""
    device = "meta" if values is None else "cpu"
    decisions = torch.full((1, 2), values or 0, dtype=torch.int8, device=device)
    q, k = torch.empty(1, 4, 64, 32), torch.empty(1, 2, 64, 32)
    plan = HeadPlan(decisions, check=False)
    request = AttentionRequest.of(q, k, k, plan, SequenceLayout.dense())
    all_full = HeadPlan(torch.zeros(1, 2, dtype=torch.int8))
    same = AttentionRequest.of(q, k, k, all_full, SequenceLayout.dense())
    assert request == same
    assert choose(None, request) is choose(None, same)


# --- It says what it picked ----------------------------------------------------------------------


class Renamed(SerialAttention):
    """Registered under another name than its own."""


def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
    )
    return elasticore.elasticize(transformers.LlamaForCausalLM(config))


PROMPT = torch.arange(3, 20)[None]


def test_a_pass_says_which_backend_ran_by_the_name_that_users_type() -> None:
    model = tiny().eval()
    register_backend("renamed", Renamed)
    with elasticore.record() as trace:
        with elasticore.use_backend("renamed"):
            model(PROMPT)
        model(PROMPT)
    named, chosen = trace.passes
    assert (named.backend, named.backend_reason) == ("renamed", "")
    assert chosen.backend == "serial"
    assert "default order" in chosen.backend_reason


@pytest.mark.usefixtures("measured")
def test_a_pass_with_gradients_says_what_ran_with_gradients(quick: type[Quick]) -> None:
    quick.supports = lambda self, request: Verdict(not request.gradients, "inference only.")  # type: ignore[method-assign]
    model = tiny().train()
    with elasticore.record() as trace:
        model(PROMPT)
        with torch.no_grad():
            model.eval()(PROMPT)
    assert [one.backend for one in trace.passes] == ["serial", "quick"]
    assert trace.passes[0].backend_reason == "no other backend can do it"


def test_doctor_says_what_auto_runs_and_why() -> None:
    from elasticore.cli import app

    result = CliRunner().invoke(app, ["doctor", "--json"])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    picks = json.loads(result.stdout)["auto"]
    requests = typical_requests(device)
    assert set(picks) == set(requests)
    for name, request in requests.items():
        choice = choose("auto", request)
        assert picks[name] == {"backend": choice.name, "reason": choice.reason}
        assert choice.reason
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).stdout
    assert all(name in shown for name in requests)


# --- Whatever it picks is right ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float64, 48), (torch.float32, 64), (torch.bfloat16, 20)]
)
def test_auto_runs_what_it_says(dtype: torch.dtype, head_dim: int) -> None:
    q = torch.randn(1, 2, 40, head_dim, dtype=dtype)
    plan = HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8))
    request = AttentionRequest.of(q, q, q, plan, SequenceLayout.dense())
    choice = choose("auto", request)
    assert isinstance(choice.engine, HybridHeadAttention)
    out: Tensor = hybrid_head_attention(q, q, q, plan)
    assert torch.equal(out, hybrid_head_attention(q, q, q, plan, backend=choice.name))
