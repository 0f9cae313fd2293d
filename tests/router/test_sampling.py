import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from elasticore.router import (
    GumbelSigmoid,
    GumbelSoftmax,
    checkpoint_contexts,
    gumbel,
    sample_gumbel,
)

SAMPLERS = [GumbelSoftmax, GumbelSigmoid]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_gumbel_noise_by_hand():
    # -log(-log(1/2)) = -log(0.693147) = 0.366513; -log(-log(1/e)) = 0; at 0.9, -log(0.105361).
    noise = gumbel(torch.tensor([0.5, math.exp(-1), 0.9]), 1e-10)
    expected = torch.tensor([0.366513, 0.0, 2.250367])
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-6)


def test_noise_at_the_ends_is_finite():
    # u = 0: -log(-log(1e-10)) = -log(23.025851) = -3.136618. u = 1: -log(1e-10) = 23.025851.
    noise = gumbel(torch.tensor([0.0, 1.0]), 1e-10)
    torch.testing.assert_close(noise, torch.tensor([-3.136618, 23.025851]), rtol=0, atol=1e-5)


@given(u=st.floats(0, 1, width=32), eps=st.floats(1.2e-38, 9e-3, allow_subnormal=False))
def test_noise_is_finite_for_every_uniform_and_eps(u, eps):
    assert torch.isfinite(gumbel(torch.tensor(u), eps))


def test_gumbel_softmax_by_hand():
    logits = torch.tensor([[0.3, -0.2]], requires_grad=True)
    u = torch.rand(1, 2, generator=seeded(4))
    g = [-math.log(-math.log(x)) for x in u[0].tolist()]
    gate = GumbelSoftmax(generator=seeded(4))(logits, 1.5)
    e0, e1 = math.exp((0.3 + g[0]) / 1.5), math.exp((-0.2 + g[1]) / 1.5)
    soft = e1 / (e0 + e1)
    assert gate.item() == (1.0 if soft >= 0.5 else 0.0)
    gate.sum().backward()
    slope = soft * (1 - soft) / 1.5  # d softmax_1 / d logit_1
    torch.testing.assert_close(logits.grad, torch.tensor([[-slope, slope]]), rtol=0, atol=1e-6)


def test_gumbel_sigmoid_by_hand():
    logits = torch.tensor([[0.3, -0.2]], requires_grad=True)
    g = -math.log(-math.log(torch.rand(1, generator=seeded(4)).item()))
    gate = GumbelSigmoid(generator=seeded(4))(logits, 1.5)
    soft = 1 / (1 + math.exp(-(-0.5 + g) / 1.5))  # z = -0.2 - 0.3
    assert gate.item() == (1.0 if soft >= 0.5 else 0.0)
    gate.sum().backward()
    slope = soft * (1 - soft) / 1.5
    torch.testing.assert_close(logits.grad, torch.tensor([[-slope, slope]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gate_is_exactly_zero_or_one(sampler):
    for seed in range(200):
        generator = seeded(seed)
        scale = 10 ** (4 * torch.rand((), generator=generator) - 2)  # logits from 0.01 to 100
        logits = scale * torch.randn(64, 8, 2, generator=generator)
        gate = sampler(generator=generator)(logits.requires_grad_(), 0.1 + seed / 50)
        assert gate.dtype == torch.float32
        assert bool(((gate == 0) | (gate == 1)).all())
        assert not bool(torch.signbit(gate).any())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_extreme_logits_stay_exact_with_finite_gradients(sampler):
    big = 1e30
    logits = torch.tensor([[big, -big], [-big, big], [big, big], [0, 0]], requires_grad=True)
    gate = sampler()(logits, 0.01)
    assert gate[:2].tolist() == [0.0, 1.0]
    assert bool(((gate == 0) | (gate == 1)).all())
    gate.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_straight_through_gradient_is_the_soft_sample_s(temperature):
    logits = torch.randn(50, 8, 2, generator=seeded(0), requires_grad=True)
    upstream = torch.randn(50, 8, generator=seeded(1))

    gate = GumbelSoftmax(generator=seeded(2))(logits, temperature)
    (hard_gradient,) = torch.autograd.grad(gate, logits, upstream)
    noise = sample_gumbel(logits, 1e-10, seeded(2))
    soft = torch.softmax((logits + noise) / temperature, -1)[..., 1]
    (soft_gradient,) = torch.autograd.grad(soft, logits, upstream)
    torch.testing.assert_close(hard_gradient, soft_gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(gate, (soft >= 0.5).float())

    gate = GumbelSigmoid(generator=seeded(2))(logits, temperature)
    (hard_gradient,) = torch.autograd.grad(gate, logits, upstream)
    z = logits[..., 1] - logits[..., 0]
    soft = torch.sigmoid((z + sample_gumbel(z, 1e-10, seeded(2))) / temperature)
    (soft_gradient,) = torch.autograd.grad(soft, logits, upstream)
    assert torch.equal(hard_gradient, soft_gradient)


# Hoeffding: |frequency - p| > t has probability at most 2 exp(-2 n t²), which is 1e-9 at t = BOUND.
DRAWS = 200_000
BOUND = math.sqrt(math.log(2e9) / (2 * DRAWS))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1.5])
@pytest.mark.parametrize("logits", [(0.0, 0.0), (1.0, -0.5), (-2.0, 0.7)])
def test_gumbel_softmax_draws_with_the_softmax_probability(logits, temperature):
    p = math.exp(logits[1]) / (math.exp(logits[0]) + math.exp(logits[1]))
    gate = GumbelSoftmax(generator=seeded(0))(torch.tensor(logits).expand(DRAWS, 2), temperature)
    assert abs(gate.mean().item() - p) < BOUND


@pytest.mark.parametrize(("z", "p"), [(0.0, 0.632121), (1.0, 0.934012), (-1.0, 0.307799)])
def test_gumbel_sigmoid_leans_to_sparse_as_documented(z, p):
    assert p == pytest.approx(1 - math.exp(-math.exp(z)), abs=1e-6)
    logits = torch.tensor([0.25, 0.25 + z]).expand(DRAWS, 2)
    assert abs(GumbelSigmoid(generator=seeded(0))(logits, 1.0).mean().item() - p) < BOUND


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_noise_follows_the_global_seed(sampler):
    logits = torch.zeros(100, 2)
    torch.manual_seed(5)
    first = sampler()(logits, 1.0)
    second = sampler()(logits, 1.0)
    torch.manual_seed(5)
    assert torch.equal(sampler()(logits, 1.0), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        GumbelSoftmax()(torch.zeros(1, 2), temperature)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("eps", "error"), [(0.0, ValueError), (1e-50, ValueError), (0.5, ValueError), ("x", TypeError)]
)
def test_bad_eps_is_named(sampler, eps, error):
    with pytest.raises(error, match="eps must be"):
        sampler(eps=eps)


def test_a_generator_on_another_device_is_named():
    with pytest.raises(ValueError, match="generator is on cpu but the logits are on meta"):
        GumbelSoftmax(generator=seeded(0))(torch.zeros(1, 2, device="meta"), 1.0)


def gradient(sampler, checkpointed, layers=3, **options):
    """Gradient of a loss in which the gate of each layer scales its input, and the gates."""
    torch.manual_seed(0)
    logits = torch.zeros(40, 2, requires_grad=True)
    gates = []

    def layer(x):
        gate = sampler(logits + x.mean(), 1.0)
        gates.append(gate.detach())
        return x * (1 + gate) + gate.cumsum(0)

    x = torch.linspace(-1, 1, 40, requires_grad=True)
    for _ in range(layers):
        x = checkpoint(layer, x, use_reentrant=False, **options) if checkpointed else layer(x)
    x.square().mean().backward()
    return logits.grad, gates


def test_checkpointing_replays_global_noise():
    plain, _ = gradient(GumbelSoftmax(), False)
    again, gates = gradient(GumbelSoftmax(), True)
    assert torch.equal(plain, again)
    assert len(gates) == 6  # three forwards, then three recomputes in reverse
    for forward, recompute in zip(gates[:3], gates[:2:-1], strict=True):
        assert torch.equal(forward, recompute)


def test_checkpointing_refuses_a_private_generator_that_it_cannot_rewind():
    with pytest.raises(RuntimeError, match="checkpoint_contexts"):
        gradient(GumbelSoftmax(generator=seeded(3)), True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_checkpoint_contexts_replay_a_private_generator(sampler):
    plain, _ = gradient(sampler(generator=seeded(3)), False)
    generator = seeded(3)
    again, gates = gradient(
        sampler(generator=generator), True, context_fn=checkpoint_contexts(generator)
    )
    assert torch.equal(plain, again)
    assert len(gates) == 6
    # The recompute leaves the generator where the forward did.
    reference = seeded(3)
    gradient(sampler(generator=reference), False)
    assert torch.equal(generator.get_state(), reference.get_state())


def test_checkpoint_contexts_can_replay_twice():
    generator = seeded(3)
    logits = torch.zeros(40, 2, requires_grad=True)
    sampler = GumbelSoftmax(generator=generator)
    y = checkpoint(
        lambda x: sampler(x, 1.0) * x.sum(-1).exp(),
        logits,
        use_reentrant=False,
        context_fn=checkpoint_contexts(generator),
    ).sum()
    (first,) = torch.autograd.grad(y, logits, retain_graph=True)
    (second,) = torch.autograd.grad(y, logits)
    assert torch.equal(first, second)
