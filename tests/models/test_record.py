"""record(): what ran, counted as the paper counts it, and nothing at all outside of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import elasticore
from elasticore import (
    AllRetrieval,
    AllSparse,
    BlockLists,
    HeadMode,
    HeadPlan,
    XAttention,
)
from elasticore.models.recording import active_traces

from .tiny import SETTINGS, elastic, first_head_sparse, small, tiny, tokens

STREAMING = int(HeadMode.STREAMING)


def read_by_streaming(position: int, sink: int = 16, local: int = 32, block: int = 16) -> int:
    """Keys that the query at ``position`` reads, one by one."""
    row = position // block
    return sum(
        key // block < sink // block or key // block > row - local // block
        for key in range(position + 1)
    )


def test_a_prefill_by_hand() -> None:
    model = elastic(tiny(), first_head_sparse)
    with elasticore.record() as trace:
        model(tokens(2, 100))
    one = trace.prefill
    assert trace.passes == [one] and one.decided
    assert one.backend in [backend.name for backend in elasticore.list_backends()]
    assert one.queries.tolist() == one.keys.tolist() == [100, 100]
    assert one.decisions.shape == one.modes.shape == (3, 2, 2)
    assert one.decisions.dtype == torch.int8
    assert one.decisions.tolist() == [[[1, 0], [1, 0]]] * 3
    assert one.modes.tolist() == [[[STREAMING, 0], [STREAMING, 0]]] * 3
    assert one.msr.tolist() == [0.5, 0.5] and one.msr.dtype == torch.float64
    # Half of the heads keep all 5,050 pairs.
    kept = sum(read_by_streaming(position) for position in range(100))
    assert one.esr.tolist() == pytest.approx([(1 - kept / 5050) / 2] * 2, abs=1e-15)
    last = 1 - read_by_streaming(99) / 100
    assert one.esr_last_query.tolist() == pytest.approx([last / 2] * 2, abs=1e-15)
    assert one.seconds > 0 and trace.prefill_seconds == one.seconds
    assert trace.decisions is one.decisions and trace.msr is one.msr and trace.esr is one.esr


def test_padding_and_packing_are_counted_by_sequence() -> None:
    model = elastic(tiny(), AllSparse)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :40] = 0
    positions = torch.cat([torch.arange(60), torch.arange(100)])[None]
    expected = [1 - 2 * sum(map(read_by_streaming, range(n))) / (n * (n + 1)) for n in (60, 100)]
    with elasticore.record() as padded:
        model(tokens(2, 100), attention_mask=mask)
    with elasticore.record() as packed:
        model(tokens(1, 160), position_ids=positions, use_cache=False)
    for trace in (padded, packed):
        assert trace.prefill.keys.tolist() == [60, 100]
        assert trace.esr.tolist() == pytest.approx(expected, abs=1e-15)


def test_prefill_and_decoding_are_told_apart() -> None:
    model = elastic(tiny(), AllSparse)
    with elasticore.record() as trace:
        model.generate(tokens(2, 70), max_new_tokens=4, eos_token_id=None, do_sample=False)
    assert [one.decided for one in trace.passes] == [True, False, False, False]
    assert [one.queries.tolist() for one in trace.passes] == [[70, 70]] + [[1, 1]] * 3
    assert [one.keys.tolist() for one in trace.passes] == [[n, n] for n in (70, 71, 72, 73)]
    for step, one in enumerate(trace.passes[1:]):
        ratio = 1 - read_by_streaming(70 + step) / (71 + step)
        assert one.esr.tolist() == one.esr_last_query.tolist() == pytest.approx([ratio] * 2)
    assert trace.prefill is trace.passes[0]


class Noting(XAttention):
    """XAttention that keeps what it chose."""

    def select(self, *args: Any, **kwargs: Any) -> BlockLists:
        chosen.append(super().select(*args, **kwargs))
        return chosen[-1]


chosen: list[BlockLists] = []


@pytest.mark.parametrize(("mode", "policy"), [("fa-xa", AllSparse), ("xa-ssa", AllRetrieval)])
def test_selected_heads_are_counted_by_the_blocks_chosen(mode: str, policy: Any) -> None:
    selector = Noting(threshold=0.5)
    config = small(mode, selector=selector)
    model = elastic(tiny(num_hidden_layers=1), policy, config)
    chosen.clear()
    with elasticore.record() as trace:
        model(tokens(1, 70))
    # A query reads the blocks chosen for its row block whole, but its own one up to itself.
    blocks = chosen[0].counts[0].tolist()
    kept = sum(
        (blocks[head][position // 16] - 1) * 16 + position % 16 + 1
        for head in range(4)
        for position in range(70)
    )
    pairs = 4 * 70 * 71 / 2
    assert kept < 0.9 * pairs
    assert trace.esr.tolist() == pytest.approx([1 - kept / pairs], abs=1e-15)
    assert trace.msr.tolist() == [float(policy is AllSparse)]


def test_records_nest() -> None:
    model = elastic(tiny())
    with elasticore.record() as outer:
        model(tokens(1, 20))
        with elasticore.record() as inner:
            model(tokens(1, 30))
        model(tokens(1, 40))
    model(tokens(1, 50))
    assert [one.keys.item() for one in outer.passes] == [20, 30, 40]
    assert [one.keys.item() for one in inner.passes] == [30]


def test_two_models_in_one_record() -> None:
    small, large = elastic(tiny(num_hidden_layers=2), AllRetrieval), elastic(tiny(), AllSparse)
    with elasticore.record() as trace:
        large(tokens(1, 60))
        small(tokens(2, 60))
        large(tokens(1, 60))
    assert [list(one.decisions.shape) for one in trace.passes] == [[3, 1, 2], [2, 2, 2], [3, 1, 2]]
    assert [one.msr.tolist() for one in trace.passes] == [[1.0], [0.0, 0.0], [1.0]]


def test_a_pass_that_failed_is_not_mixed_into_the_next() -> None:
    model = elastic(tiny(), AllSparse)
    small = elastic(tiny(num_hidden_layers=1), AllRetrieval)
    broken = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with elasticore.record() as trace:
        with pytest.raises(ZeroDivisionError):
            model(tokens(3, 60))
        small(tokens(1, 20))
        broken.remove()
        model(tokens(1, 30))
    assert [one.keys.tolist() for one in trace.passes] == [[20], [30]]
    assert [list(one.decisions.shape) for one in trace.passes] == [[1, 1, 2], [3, 1, 2]]


def test_models_that_are_not_elastic_are_not_recorded() -> None:
    with elasticore.record() as trace:
        tiny()(tokens(1, 20))
    assert trace.passes == []
    with pytest.raises(ValueError, match="no pass"):
        _ = trace.decisions


def test_threads_record_their_own_passes() -> None:
    model, seen = elastic(tiny()), []

    def work() -> None:
        seen.append(len(active_traces()))
        with elasticore.record() as trace:
            model(tokens(1, 30))
        seen.append([one.keys.item() for one in trace.passes])

    with elasticore.record() as outer:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        model(tokens(1, 40))
    assert seen == [1, [30]]  # started inside the block, until it has one of its own
    assert [one.keys.item() for one in outer.passes] == [40]


def test_a_record_ends_with_its_block_also_after_an_error() -> None:
    with pytest.raises(KeyError), elasticore.record():
        raise KeyError
    assert active_traces() == ()


def test_nothing_is_counted_outside_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("counted without a record")

    model = elastic(tiny(), AllSparse, SETTINGS)
    monkeypatch.setattr(HeadPlan, "esr", counted)
    model(tokens(1, 60))
    with pytest.raises(AssertionError, match="counted"), elasticore.record():
        model(tokens(1, 60))


def test_recording_changes_no_output() -> None:
    model, prompt = elastic(tiny()), tokens(2, 80)
    plain = model(prompt).logits
    with elasticore.record():
        assert torch.equal(model(prompt).logits, plain)
