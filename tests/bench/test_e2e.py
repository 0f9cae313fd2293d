"""The suite e2e: a fair baseline, routers that run, sparsity as stated, speed-ups as drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import elasticore as ec
from elasticore import HeadTable, elasticize, is_elastic
from elasticore.backends.serial import SerialAttention
from elasticore.bench.cases import Ready, cases_of
from elasticore.bench.e2e import E2eCase, E2eWork, Elastic, FirstToken, Unchanged
from elasticore.bench.report import read_json, write_json
from elasticore.bench.run import Record, Session
from elasticore.bench.speedups import FULL, lines, speedups
from elasticore.bench.timing import Clock
from elasticore.bench.topics import ROPE_THETA, plant_topics, topic_prompt
from elasticore.models.elastic import routers
from elasticore.patterns import BlockLists, XAttention

CPU = torch.device("cpu")
SMALL = {
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "hidden": 128,
    "intermediate": 128,
    "vocabulary": 300,
    "sink": 32,
    "local": 64,
    "block_size": 32,
    "dtype": "float32",
}
CASE = E2eCase("e2e", 1024, None, **SMALL)


@pytest.fixture(scope="module")
def work() -> E2eWork:
    return CASE.build(CPU)


def test_the_baseline_makes_no_mask_and_repeats_no_heads(work, monkeypatch):
    seen = []

    def spy(q, k, v, attn_mask=None, **arguments):
        seen.append((attn_mask, k.shape[1], arguments["is_causal"], arguments["enable_gqa"]))
        return scaled_dot_product_attention(q, k, v, **arguments)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    Unchanged("sdpa", None).prepare(work).call()
    assert seen == [(None, CASE.kv_heads, True, True)] * CASE.layers


def test_elastic_models_share_the_weights_and_leave_the_unchanged_one_alone(work):
    twin = work.twin()
    before = work.prefill(work.model)
    ready = Elastic("fa-ssa", 0.5).prepare(work)
    assert torch.equal(work.prefill(work.model), before)
    assert not torch.equal(ready.call().logits, before)
    assert not is_elastic(work.model)
    for own, other in zip(work.model.parameters(), twin.parameters(), strict=True):
        assert own is other


def test_every_prefill_runs_the_real_routers_and_obeys_the_table(work, monkeypatch):
    made = []
    monkeypatch.setattr(
        "elasticore.models.elastic.elasticize",
        lambda model, *args, **kwargs: made.append(elasticize(model, *args, **kwargs)),
    )
    ready = Elastic("fa-ssa", 0.5).prepare(work)
    ran = []
    for policy in routers(made[0]):
        policy.router.register_forward_hook(lambda *args: ran.append(args[2].logits))
    with ec.record() as trace:
        ready.call()
    assert len(ran) == CASE.layers
    table = HeadTable.random(CASE.layers, CASE.kv_heads, 0.5, seed=0).sparse
    assert torch.equal(trace.passes[0].decisions[:, 0].bool(), table)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 0.9])
def test_the_shares_of_the_default_model_are_exact(share):
    case = E2eCase("e2e", 8192, None)
    heads = case.layers * case.kv_heads
    table = HeadTable.random(case.layers, case.kv_heads, share, seed=0).sparse
    assert int(table.sum()) * 10 == round(share * 10) * heads


@dataclass(frozen=True)
class Seen(XAttention):
    """Keeps its lists."""

    lists: list[BlockLists] = field(default_factory=list, compare=False)

    def select(self, q, k, segments, **arguments):
        self.lists.append(super().select(q, k, segments, **arguments))
        return self.lists[-1]


@pytest.mark.parametrize("topics", [2, 5])
def test_a_selected_head_reads_the_blocks_on_one_topic(topics):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        )
    )
    plant_topics(model, topics)
    prompt = topic_prompt(1024, block_size=32, topics=topics, vocabulary=300)
    selector = Seen()
    elasticize(model, ec.Elastic(ec.AllRetrieval(), selector, ec.Streaming(32, 64)))
    with torch.no_grad():
        model(prompt)
    topic = prompt[0, ::32] % topics
    assert len(selector.lists) == 2
    for lists in selector.lists:
        for head in lists.to_mask(32)[0]:
            wanted = {}  # by the topic of the row block
            for row in range(16, 32):
                read = topic[1:row][head[row, 1:row]].unique().tolist()
                assert wanted.setdefault(int(topic[row]), read) == read
                assert len(read) == 1
            assert len({tuple(read) for read in wanted.values()}) == len(wanted)  # a permutation


def test_too_many_topics_are_refused(work):
    with pytest.raises(ValueError, match="topics must be from 1 to head_dim / 2 = 32, got 33"):
        plant_topics(work.model, 33)


def test_the_density_is_what_the_topics_say(work):
    details = Elastic("xa-ssa", 0.5).prepare(work).details
    rows = torch.arange(1, 33)
    # 0.9 of the blocks on the topic, up to one more, with the sink and the diagonal.
    most = float((rows * 0.9 / CASE.topics + 3).clamp(max=rows).sum() / rows.sum())
    assert 0.9 / CASE.topics - 0.15 < details["selected"] < most + 0.15
    assert details["msr"] == 0.5
    streaming = float(Elastic("fa-ssa", 0.5).prepare(work).details["esr"]) / 0.5
    assert details["esr"] == pytest.approx(0.5 * streaming + 0.5 * (1 - details["selected"]))


class Careless(SerialAttention):
    """A hundred times too much: layers as small as here hardly change what they are given."""

    def attend(self, q, k, v, plan, *, layout, scale):
        return 100 * super().attend(q, k, v, plan, layout=layout, scale=scale)


@pytest.mark.usefixtures("clean_registry")
def test_a_wrong_backend_gets_no_time():
    ec.register_backend("careless", Careless)
    session = Session([CASE], Clock(CPU, budget_ms=1), ["sdpa", "fa-ssa-0"])
    with ec.use_backend("careless"):
        ((_, (sdpa, wrong)),) = session.run()
    assert sdpa.difference == 0
    assert sdpa.ms
    assert "differs from the reference" in wrong.failed
    assert wrong.ms is None


def test_turns_give_every_call_as_many_runs_in_changing_order():
    order: list[int] = []
    calls = [lambda index=index: order.append(index) for index in range(4)]
    timings = Clock(CPU, budget_ms=1, least=3, most=5).take_turns(calls)
    turns = [tuple(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert [timing.runs for timing in timings] == [len(turns)] * 4
    assert 3 <= len(turns) <= 5
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert len(set(turns)) > 1


def test_a_call_that_fails_in_its_turn_leaves_the_others_their_times():
    calls: list[str] = []

    def fails() -> None:
        calls.append("fails")
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")

    failed, timing = Clock(CPU, budget_ms=1, least=3, most=5).take_turns([fails, lambda: None])
    assert isinstance(failed, torch.OutOfMemoryError)
    assert len(calls) == 2
    assert timing.runs >= 3


def test_an_engine_that_fails_in_its_turn_has_a_reason_for_a_time(work, monkeypatch):
    def take_turns(self, calls):
        sdpa, *_ = (self.measure(call) for call in calls)
        return [sdpa, torch.OutOfMemoryError("full")]

    monkeypatch.setattr(Clock, "take_turns", take_turns)
    session = Session([CASE], Clock(CPU, budget_ms=1), ["sdpa", "fa-ssa-0.7"])
    ((_, (sdpa, failed)),) = session.run()
    assert sdpa.ms
    assert failed.ms is None
    assert "OutOfMemoryError: full" in failed.failed


def test_engines_of_a_case_are_timed_in_turns(work):
    session = Session([CASE], Clock(CPU, budget_ms=1), ["sdpa", "fa-ssa-0.7", "xa-ssa-0.7"])
    ((_, records),) = session.run()
    assert len({record.runs for record in records}) == 1
    sdpa, fa, xa = records
    assert fa.ratios == {"sdpa": sdpa.ms / fa.ms, "xa-ssa-0.7": xa.ms / fa.ms}


def test_engines_stay_prepared_until_their_turns_are_over(monkeypatch):
    happened = []

    def prepare(self, work):
        output = FirstToken(work.reference, dense=True)

        def call():
            happened.append("call")
            return output

        return Ready(call, close=lambda: happened.append("close"))

    monkeypatch.setattr(Unchanged, "prepare", prepare)
    monkeypatch.setattr(E2eWork, "flops", 1e9)
    session = Session([CASE], Clock(CPU, budget_ms=1), ["sdpa", "sdpa-flash"])
    ((_, records),) = session.run()
    assert happened.count("close") == 2
    assert happened[-2:] == ["close", "close"]
    assert all(record.tflops == pytest.approx(1 / record.ms) for record in records)


def test_long_prompts_are_left_to_the_fastest_baseline_unless_asked():
    long, short = (E2eCase("e2e", length, None) for length in (131072, 65536))
    left = {str(e) for e in long.engines() if e.left_out(long, torch.device("cuda"))}
    assert left == {"sdpa", "sdpa-flash", "sdpa-efficient", "fa-ssa-0"}
    assert not any(e.left_out(short, torch.device("cuda")) for e in short.engines())


def test_a_gpu_gets_every_length_of_the_paper():
    lengths = [case.length for case in cases_of("e2e", torch.device("cuda"))]
    assert lengths == [8192, 16384, 32768, 65536, 131072, 262144]


def made_up() -> list[tuple[E2eCase, list[Record]]]:
    """A layer takes 100 ms full; the rest 20."""
    return [
        (
            E2eCase("e2e", length, None, layers=5),
            [
                Record("sdpa-flash", True, ms=700.0, details={"rest_ms": 20.0}),
                Record("sdpa-cudnn", True, ms=520.0, details={"rest_ms": 20.0}),
                Record("sdpa-efficient", True, skipped="no."),
                Record("fa-ssa-0", False, ms=510.0, details={"msr": 0.0}),
                Record("fa-ssa-0.7", False, ms=260.0, details={"msr": 0.7}),
                Record("xa-ssa-0.7", False, failed="no."),
            ],
        )
        for length in (8192, 16384)
    ]


def test_speedups_are_over_the_fastest_baseline_and_times_scale_by_layers():
    drawn = lines(made_up())
    assert set(drawn) == {FULL, "fa-ssa-0.7"}
    assert [point.speedup for point in drawn["fa-ssa-0.7"]] == [2.0, 2.0]
    assert drawn[FULL][0].seconds == pytest.approx((20 + 32 * 100) / 1e3)
    assert drawn["fa-ssa-0.7"][0].seconds == pytest.approx((20 + 32 * 48) / 1e3)


def test_the_picture_is_drawn_from_the_file(tmp_path: Path):
    file = tmp_path / "bench-e2e.json"
    write_json(made_up(), {}, file)
    picture = speedups(read_json(file), tmp_path / "bench-e2e.png")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert speedups([], tmp_path / "none.png") is None
