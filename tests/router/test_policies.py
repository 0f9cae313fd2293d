import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore.layout import SequenceLayout
from elasticore.plan import HeadMode
from elasticore.router import (
    AllRetrieval,
    AllSparse,
    FixedPolicy,
    fixed_policies,
    random_head_table,
)

KEYS = torch.zeros(1, 10, 3, 8)
SEGMENTS = SequenceLayout.packed(torch.tensor([0, 4, 10])).segments(1, 10, 10, KEYS.device)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (AllRetrieval(), [0, 0, 0]),
        (AllSparse(), [1, 1, 1]),
        (FixedPolicy(torch.tensor([True, False, True])), [1, 0, 1]),
        (FixedPolicy([0, 1, 1]), [0, 1, 1]),
    ],
)
def test_every_sequence_gets_the_same_decisions(policy, expected):
    for training in (True, False):
        routing = policy.train(training)(KEYS, SEGMENTS)
        assert routing.decisions.tolist() == [expected, expected]
        assert routing.decisions.dtype == torch.int8
        assert routing.logits is None
        assert routing.gate is None
        assert routing.msr().tolist() == [pytest.approx(sum(expected) / 3)] * 2
    assert list(policy.parameters()) == []


def test_a_fixed_policy_is_its_state_dict():
    policy = FixedPolicy([0, 0, 0])
    policy.load_state_dict(FixedPolicy([0, 1, 1]).state_dict())
    assert policy(KEYS, SEGMENTS).decisions[0].tolist() == [0, 1, 1]


def test_a_policy_keeps_its_own_copy():
    table = torch.tensor([0, 1, 0], dtype=torch.int8)
    policy = FixedPolicy(table)
    table.fill_(1)
    assert policy.decisions.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("table", "retrieval", "expected"),
    [
        ([[True, False], [False, False]], HeadMode.FULL, [[1, 0], [0, 0]]),
        ([[1, 0], [1, 1]], HeadMode.FULL, [[1, 0], [1, 1]]),
        ([[HeadMode.FULL, HeadMode.STREAMING]], HeadMode.FULL, [[0, 1]]),
        ([[HeadMode.FULL, HeadMode.SELECTED]], HeadMode.FULL, [[0, 1]]),
        ([[HeadMode.SELECTED, HeadMode.STREAMING]], HeadMode.SELECTED, [[0, 1]]),  # XA-SSA
    ],
)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_table_makes_a_policy_per_layer(table, retrieval, expected, as_tensor):
    policies = fixed_policies(torch.tensor(table) if as_tensor else table, retrieval)
    assert [policy.decisions.tolist() for policy in policies] == expected


@given(
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 9),
    msr=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_random_table_has_exactly_the_share_asked_for(layers, kv_heads, msr, seed):
    table = random_head_table(layers, kv_heads, msr, seed)
    assert table.shape == (layers, kv_heads)
    assert table.dtype == torch.bool
    assert int(table.sum()) == round(msr * layers * kv_heads)
    assert torch.equal(table, random_head_table(layers, kv_heads, msr, seed))


@pytest.mark.parametrize(
    ("layers", "kv_heads", "msr", "count"),
    [(1, 10, 1 - 0.9, 1), (36, 8, 0.7, 202), (32, 8, 0.29, 74), (10, 10, 0.29, 29), (2, 3, 1.0, 6)],
)
def test_random_table_counts_by_hand(layers, kv_heads, msr, count):
    # 0.7 · 288 = 201.6; 0.29 · 256 = 74.24; 0.29 * 100 is 28.999999999999996 in floats.
    assert int(random_head_table(layers, kv_heads, msr, 0).sum()) == count


def test_random_table_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = random_head_table(32, 8, 0.5, 0), random_head_table(32, 8, 0.5, 1)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedPolicy(torch.rand(4)), TypeError, "decisions must be bool or integer"),
        (lambda: FixedPolicy([0, 2]), ValueError, "decisions must hold values from 0 to 1"),
        (lambda: FixedPolicy([[0, 1]]), ValueError, r"decisions must be \[kv_heads\]"),
        (lambda: FixedPolicy(torch.zeros(0, dtype=torch.int8)), ValueError, "decisions must be"),
        (lambda: fixed_policies([0, 1]), ValueError, r"table must be \[layers, kv_heads\]"),
        (lambda: fixed_policies([[0, 3]]), ValueError, "table must hold values from 0 to 2"),
        (lambda: fixed_policies([[0, -1]]), ValueError, "table must hold values from 0 to 2"),
        (lambda: FixedPolicy([0, 1])(KEYS, SEGMENTS), ValueError, "keys have 3 KV heads but"),
        (lambda: random_head_table(0, 8, 0.5, 0), ValueError, "layers must be at least 1"),
        (lambda: random_head_table(2, 8, 1.5, 0), ValueError, "msr must be from 0 to 1, got 1.5"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
