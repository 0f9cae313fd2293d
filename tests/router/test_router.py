import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from elasticore.layout import SequenceLayout
from elasticore.plan import HeadPlan
from elasticore.router import AttentionRouter, GumbelSigmoid, GumbelSoftmax, pool_boundary


def segments_of(keys):
    batch, tokens = keys.shape[:2]
    return SequenceLayout.dense().segments(batch, tokens, tokens, keys.device)


def route(router, keys):
    return router(keys, segments_of(keys))


@pytest.fixture
def router():
    torch.manual_seed(0)
    return AttentionRouter(16, boundary=4)


@pytest.fixture
def keys():
    return torch.randn(3, 20, 4, 16, generator=torch.Generator().manual_seed(1))


def test_parameter_count_of_the_paper():
    # Task MLP: 128·512 + 512 + 512·128 + 128 = 131,712.
    # Router MLP: 128·512 + 512 + 512·128 + 128 + 128·2 + 2 = 131,970.
    assert sum(p.numel() for p in AttentionRouter(128).parameters()) == 131_712 + 131_970
    assert 131_712 + 131_970 == 263_682


def test_state_dict_holds_the_two_mlps_and_no_temperature(router):
    shapes = {name: list(value.shape) for name, value in router.state_dict().items()}
    assert shapes == {
        "task_mlp.0.weight": [64, 16],
        "task_mlp.0.bias": [64],
        "task_mlp.2.weight": [16, 64],
        "task_mlp.2.bias": [16],
        "router_mlp.0.weight": [64, 16],
        "router_mlp.0.bias": [64],
        "router_mlp.2.weight": [16, 64],
        "router_mlp.2.bias": [16],
        "router_mlp.4.weight": [2, 16],
        "router_mlp.4.bias": [2],
    }


def test_logits_by_hand():
    router = AttentionRouter(1, hidden_multiplier=1)
    values = {
        # 1 -> 2 -> silu(2) = 1.761594 -> 1.761594 - 0.761594 = 1
        "task_mlp.0.weight": [[2.0]],
        "task_mlp.0.bias": [0.0],
        "task_mlp.2.weight": [[1.0]],
        "task_mlp.2.bias": [-0.761594],
        # 1 -> silu(1) = 0.731059 -> silu(0.731059) = 0.493493 -> (0.493493, 0.5 - 0.493493)
        "router_mlp.0.weight": [[1.0]],
        "router_mlp.0.bias": [0.0],
        "router_mlp.2.weight": [[1.0]],
        "router_mlp.2.bias": [0.0],
        "router_mlp.4.weight": [[1.0], [-1.0]],
        "router_mlp.4.bias": [0.0, 0.5],
    }
    router.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    pooled = torch.ones(1, 1, 1)
    torch.testing.assert_close(
        router.task_representation(pooled), torch.ones(1, 1, 1), rtol=0, atol=1e-6
    )
    expected = torch.tensor([[[0.493493, 0.006507]]])
    torch.testing.assert_close(router.logits(pooled), expected, rtol=0, atol=1e-6)
    keys = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)  # pooled to 1
    routing = route(router.eval(), keys)
    torch.testing.assert_close(routing.logits, expected, rtol=0, atol=1e-6)
    assert routing.decisions.tolist() == [[0]]


def test_heads_share_the_router(router, keys):
    same = keys[:, :, :1].expand(-1, -1, 4, -1)
    logits = route(router.eval(), same).logits
    torch.testing.assert_close(logits, logits[:, :1].expand(-1, 4, -1), rtol=0, atol=1e-6)


def test_evaluation_is_deterministic_and_without_gate(router, keys):
    router.eval()
    first, state = route(router, keys), torch.get_rng_state()
    second = route(router, keys)
    assert first.gate is None
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.decisions, second.decisions)
    assert torch.equal(first.decisions, first.logits.argmax(-1).to(torch.int8))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tie_is_sparse(router, keys):
    for parameter in router.router_mlp[4].parameters():
        torch.nn.init.zeros_(parameter)
    assert bool((route(router.eval(), keys).decisions == 1).all())
    with torch.no_grad():
        router.router_mlp[4].bias[0] = 1e-30  # the smallest lead decides
    assert bool((route(router, keys).decisions == 0).all())


def test_training_samples_a_gate_with_gradient(router, keys):
    keys.requires_grad_()
    router.temperature = 1.5
    torch.manual_seed(3)
    routing = route(router, keys)
    torch.manual_seed(3)
    assert torch.equal(routing.gate, GumbelSoftmax()(routing.logits, 1.5))
    assert torch.equal(routing.gate, routing.decisions.float())
    routing.msr().sum().backward()
    for name, parameter in router.named_parameters():
        assert bool((parameter.grad != 0).any()), name
    # Tokens 4..15 of 20 are not pooled.
    read = keys.grad.abs().sum((0, 2, 3)) > 0
    assert read.tolist() == [True] * 4 + [False] * 12 + [True] * 4


def test_temperature_scales_the_gradient_and_not_the_decision(router, keys):
    gates = []
    for router.temperature in (0.5, 1.0, 2.0):
        torch.manual_seed(3)
        gates.append(route(router, keys).gate)
    assert torch.equal(gates[0], gates[1])
    assert torch.equal(gates[0], gates[2])


def test_gate_makes_a_plan(router, keys):
    routing = route(router, keys)
    plan = HeadPlan.from_gate(routing.gate)
    assert torch.equal(plan.modes, routing.decisions)  # FULL = 0, STREAMING = 1
    assert plan.msr().item() == pytest.approx(routing.msr().mean().item())


def test_a_sequence_decides_the_same_alone_padded_and_packed(router):
    torch.manual_seed(2)
    router.eval()
    lengths = [5, 30, 8, 9]
    sequences = [torch.randn(1, n, 4, 16) for n in lengths]
    alone = torch.cat([route(router, x).logits for x in sequences])
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = SequenceLayout.packed(cu).segments(1, 52, 52, cu.device)
    together = router(torch.cat(sequences, 1), packed)
    # Pooling has the same bits; the matrix products of another batch size may round otherwise.
    torch.testing.assert_close(together.logits, alone, rtol=0, atol=1e-6)
    assert torch.equal(together.decisions, (alone[..., 1] >= alone[..., 0]).to(torch.int8))


def test_parameters_are_float32_whatever_the_default(keys):
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = AttentionRouter(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    assert route(router, keys.bfloat16()).logits.dtype == torch.float32


def test_autocast_does_not_round_the_logits(router, keys):
    expected = route(router.eval(), keys).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(route(router, keys).logits, expected)


def test_a_bfloat16_router_still_returns_float32(router, keys):
    routing = route(router.bfloat16(), keys.bfloat16())
    assert routing.logits.dtype == routing.gate.dtype == torch.float32


def test_task_representation_feeds_the_logits(router, keys):
    pooled = pool_boundary(keys, segments_of(keys), 4)
    task = router.task_representation(pooled)
    assert task.shape == (3, 4, 16)
    assert torch.equal(router.router_mlp(task), router.logits(pooled))
    assert torch.equal(router.logits(pooled), route(router.eval(), keys).logits)


def test_checkpointing_gives_the_same_gradient(router, keys):
    def gradients(checkpointed):
        torch.manual_seed(7)
        router.zero_grad()
        call = (router, keys, segments_of(keys))
        routing = checkpoint(*call, use_reentrant=False) if checkpointed else route(router, keys)
        routing.msr().square().sum().backward()
        return [p.grad.clone() for p in router.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


def test_ranks_draw_their_own_noise(router, keys):
    decisions = []
    for rank in range(2):
        mine = copy.deepcopy(router)
        mine.sampler = GumbelSoftmax(generator=torch.Generator().manual_seed(rank))
        decisions.append(route(mine, keys.repeat(10, 1, 1, 1)).decisions)
    assert not torch.equal(*decisions)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_on_the_host(training):
    router = AttentionRouter(16, device="meta").train(training)
    keys = torch.empty(2, 500, 4, 16, device="meta", dtype=torch.bfloat16)  # has no values
    assert route(router, keys).decisions.shape == (2, 4)


def test_settings_are_shown():
    shown = repr(AttentionRouter(8, 2, None, GumbelSigmoid()))
    assert "head_dim=8, hidden_multiplier=2, boundary=None, sampler=GumbelSigmoid" in shown


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "head_dim must be at least 1, got 0"),
        ((16.0,), TypeError, "head_dim must be an int, got 16.0"),
        ((16, 0), ValueError, "hidden_multiplier must be at least 1"),
        ((16, 4, 0), ValueError, "boundary must be at least 1"),
    ],
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        AttentionRouter(*arguments)


def test_keys_of_another_head_dim_are_named(router):
    with pytest.raises(ValueError, match="keys have head_dim 8 but this router was made for 16"):
        route(router, torch.zeros(1, 4, 2, 8))
    with pytest.raises(ValueError, match="keys must be"):
        router(torch.zeros(4, 2, 16), segments_of(torch.zeros(1, 4, 2, 16)))


def test_heads_of_a_layer_may_decide_as_one(keys):
    torch.manual_seed(0)
    one, each = (AttentionRouter(16, boundary=4, by=by) for by in ("layer", "head"))
    each.load_state_dict(one.state_dict())
    mean = route(each.eval(), keys).logits.mean(1)
    found = route(one.eval(), keys)
    assert torch.equal(found.logits, mean[:, None].expand(-1, 4, -1))
    assert torch.equal(found.decisions, (mean[:, 1] >= mean[:, 0])[:, None].expand(-1, 4).char())
    one.train()
    seen = set()
    for _ in range(40):  # the noise is shared as well
        sampled = route(one, keys)
        assert bool((sampled.decisions == sampled.decisions[:, :1]).all())
        seen.update(sampled.decisions[:, 0].tolist())
    assert seen == {0, 1}
    sampled.gate.sum().backward()
    assert bool(one.router_mlp[4].weight.grad.any())


def test_other_units_of_decision_are_refused():
    with pytest.raises(ValueError, match="by must be 'head' or 'layer', got 'model'"):
        AttentionRouter(16, by="model")
