import pytest
import torch
from torch import nn

from elasticore.errors import RouterMismatch
from elasticore.layout import SequenceLayout
from elasticore.router import (
    AllRetrieval,
    AllSparse,
    FixedPolicy,
    GumbelSigmoid,
    LayerShape,
    Router,
    register_policy,
)
from elasticore.router.policies import as_policy
from elasticore.router.registry import policy_from_dict, policy_to_dict

LAYERS = [LayerShape(3, 8, torch.device("cpu"))] * 2

KEYS = torch.zeros(1, 10, 3, 8)
SEGMENTS = SequenceLayout.packed(torch.tensor([0, 4, 10])).segments(1, 10, 10, KEYS.device)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (AllRetrieval().modules(LAYERS)[0], [0, 0, 0]),
        (AllSparse().modules(LAYERS)[1], [1, 1, 1]),
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


def test_a_router_is_made_for_each_layer_and_in_its_mode():
    for router in Router(boundary=7, hidden_multiplier=2, sampler="gumbel-sigmoid").modules(LAYERS):
        assert (router.head_dim, router.boundary, router.hidden_multiplier) == (8, 7, 2)
        assert isinstance(router.sampler, GumbelSigmoid)


def test_weights_of_routers_are_those_given():
    made = Router().modules(LAYERS)
    policy = Router(weights=[module.state_dict() for module in made])
    for one, two in zip(policy.modules(LAYERS), made, strict=True):
        assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    again = policy_from_dict(policy_to_dict(policy), policy.tensors())
    assert again.settings() == policy.settings()
    assert sorted(again.tensors()) == sorted(policy.tensors())


def test_modules_of_ones_own_are_a_policy():
    own = [FixedPolicy([0, 1, 1]), FixedPolicy([1, 0, 0])]
    assert as_policy(own).modules(LAYERS) == own
    assert as_policy(nn.ModuleList(own)).modules(LAYERS) == own


class Mine(AllSparse):
    """A policy of another package."""


@pytest.mark.usefixtures("clean_registry")
def test_a_policy_can_be_registered():
    with pytest.raises(ValueError, match=r"policy Mine has no name.*register_policy"):
        policy_to_dict(Mine())
    register_policy("mine", Mine)
    assert isinstance(policy_from_dict({"name": "mine"}, {}), Mine)
    with pytest.raises(ValueError, match="taken"):
        register_policy("mine", AllRetrieval)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedPolicy(torch.rand(4)), TypeError, "decisions must be bool or integer"),
        (lambda: FixedPolicy([0, 2]), ValueError, "decisions must hold values from 0 to 1"),
        (lambda: FixedPolicy([[0, 1]]), ValueError, r"decisions must be \[kv_heads\]"),
        (lambda: FixedPolicy(torch.zeros(0, dtype=torch.int8)), ValueError, "decisions must be"),
        (lambda: FixedPolicy([0, 1])(KEYS, SEGMENTS), ValueError, "keys have 3 KV heads but"),
        (lambda: Router(boundary=0), ValueError, "boundary must be at least 1"),
        (lambda: Router(sampler="coin"), ValueError, "sampler must be one of gumbel-softmax"),
        (lambda: Router(weights=[{}]).modules(LAYERS), RouterMismatch, "routers for 1 layers"),
        (lambda: as_policy([FixedPolicy([1])]).modules(LAYERS), RouterMismatch, "got 1"),
        (lambda: as_policy("all"), TypeError, "policy must be a Policy such as Router"),
        (lambda: as_policy([1]), TypeError, "policy must be a Policy .* got 1"),
        (lambda: policy_from_dict({"name": "x"}, {}), ValueError, "policy 'x' is unknown"),
        (
            lambda: policy_from_dict({"name": "router", "wings": 2}, {}),
            ValueError,
            "policy 'router' does not take these settings",
        ),
        (
            lambda: policy_from_dict({"name": "all-sparse"}, {"layers.0.a": torch.ones(1)}),
            ValueError,
            "AllSparse has no tensors",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
