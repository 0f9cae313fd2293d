"""The blocked loss is the model's own loss, and neither makes nor needs all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

import elasticore as ec
from elasticore.train import (
    Collator,
    LagrangianObjective,
    RouterTrainer,
    TrainingSample,
    checkpoint_layers,
)
from elasticore.train.loss import Head, blocked_cross_entropy, hidden_states
from tests.models.tiny import FAMILIES, SETTINGS, tiny, tokens

UNIT = 2.0**-24
"""Rounding of one float32 operation, relative."""
SOFTCAP = {"final_logit_softcapping": 2.0}
"""Bends these models' logits, which are around 1: without it the loss would be another."""


def elastic(family: str = "llama") -> Any:
    """A frozen backbone with new routers, in training mode; the same ones at every call."""
    model = tiny(family, **(SOFTCAP if family.startswith("gemma") else {}))
    torch.manual_seed(1)
    return ec.elasticize(model, SETTINGS).train()


def samples(count: int = 3) -> list[TrainingSample]:
    """Texts of 60, 70, ... tokens, of which 5, 12, ... at the end are learnt."""
    made = []
    for index in range(count):
        ids = tokens(1, 60 + 10 * index, seed=index)[0]
        labels = torch.full_like(ids, -100)
        labels[-5 - 7 * index :] = ids[-5 - 7 * index :]
        made.append(TrainingSample(ids, labels, "qa"))
    return made


class Listed(Dataset[TrainingSample]):
    def __init__(self, rows: list[TrainingSample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TrainingSample:
        return self.rows[index]


def trainer_of(model: Any, folder: Path, collator: Collator, **settings: Any) -> RouterTrainer:
    """A trainer whose penalty is zero: multipliers start at 0 and stay there."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        "logging_steps": 1,
    }
    return RouterTrainer(
        model,
        TrainingArguments(**{**arguments, **settings}),
        LagrangianObjective({"qa": 0.5}, init=(0.0, 0.0)),
        train_dataset=Listed(samples(4)),
        collator=collator,
        multiplier_lr=0.0,
    )


def gradients(model: Any) -> Tensor:
    """All gradients of the routers in one vector; they are cleared."""
    parameters = [p for router in ec.routers(model) for p in router.parameters()]
    vector = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    assert bool(vector.any())
    return vector


def tolerance(model: Any, hidden: Tensor) -> float:
    """How far two ways to compute a float32 loss may be apart.

    A logit is a sum of H products, off by at most H roundings of Σ|h||w| (every bound here holds to
    first order); a loss is the difference of one logit and a mean of logits, in two ways; the rest
    is a handful of roundings of numbers below 16.
    """
    weight = model.get_output_embeddings().weight
    largest = (hidden.detach().abs() @ weight.abs().T).max().item()
    return UNIT * (4 * weight.shape[1] * largest + 8 * 16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_loss_of_every_family(family: str, packed: bool, tmp_path: Path) -> None:
    model = elastic(family)
    collator = Collator(("qa",), packed=packed)
    trainer = trainer_of(model, tmp_path, collator)
    batch = collator(samples())
    ours = ("task_ids", "loss_weights", "predicting", "prompt", "origins")
    inputs = {name: value for name, value in batch.items() if name not in ours}
    prompt = batch["prompt"]

    torch.manual_seed(2)  # the noise of the sampled decisions
    own = model(**inputs, use_cache=False, elastic=ec.Pass(prompt)).loss
    own.backward()
    own_gradients = gradients(model)
    torch.manual_seed(2)
    loss = trainer.compute_loss(model, batch)
    loss.backward()

    names = [name for name in inputs if name != "labels"]
    again = {name: inputs[name] for name in names} | {"elastic": ec.Pass(prompt)}
    hidden, _ = hidden_states(model, model, again)
    assert abs(loss.item() - own.item()) <= tolerance(model, hidden)
    # The backward passes are the same from the hidden states on. Rounding moved these gradients by
    # up to 3e-6 of their norm; without Gemma's cap they move by 3.5 times their norm.
    assert float((gradients(model) - own_gradients).norm() / own_gradients.norm()) < 3e-5


def test_num_items_in_batch_divides_as_in_the_model(tmp_path: Path) -> None:
    model = elastic()
    collator = Collator(("qa",))
    trainer = trainer_of(model, tmp_path, collator)
    trainer.current_gradient_accumulation_steps = 2
    batch = collator(samples())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    items = torch.tensor(100)
    torch.manual_seed(2)
    own = model(**inputs, num_items_in_batch=items, elastic=ec.Pass(batch["prompt"])).loss
    torch.manual_seed(2)
    trainer.step_samples = trainer.objective.count(batch["task_ids"])
    loss = trainer.compute_loss(model, batch, num_items_in_batch=items).detach()
    assert float(loss) == pytest.approx(own.item(), rel=1e-5)


class Decided(nn.Module):
    """A sampler without noise: what a head does depends on its logits alone."""

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        soft = (logits / temperature).softmax(-1)[..., 1]
        return (soft > 0.5).float() + (soft - soft.detach())


def step_gradients(folder: Path, batch: int, accumulation: int, reduction: Any) -> Tensor:
    """What the optimizer is given by one step over four samples."""
    model = elastic()
    for router in ec.routers(model):
        router.sampler = Decided()  # type: ignore[assignment]
    trainer = trainer_of(
        model,
        folder,
        Collator(("qa",), reduction=reduction),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    found: list[Tensor] = []

    def note(*_: Any) -> None:
        parameters = [p for router in ec.routers(model) for p in router.parameters()]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

    trainer.create_optimizer().register_step_pre_hook(note)
    trainer.train()
    return found[0]


@pytest.mark.parametrize("reduction", ["tokens", "samples"])
def test_micro_batches_add_up_to_the_whole_batch(reduction: str, tmp_path: Path) -> None:
    # The samples learn 5, 12, 19 and 26 tokens: a mean of the micro-batches' token means would
    # weigh the tokens of the first ones more.
    whole = step_gradients(tmp_path, 4, 1, reduction)
    for batch, accumulation in ((2, 2), (1, 4)):
        parts = step_gradients(tmp_path, batch, accumulation, reduction)
        assert float((parts - whole).norm() / whole.norm()) < 1e-4


class Spy(nn.Module):
    """Notes how many rows a head is asked for."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection, self.weight = projection, projection.weight
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.flatten(0, -2).shape[0])
        return self.projection(hidden)


def problem(tokens: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    projection = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(False)
    projection.weight.data.normal_(generator=generator)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(50, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    return hidden, labels, weights, projection


def test_the_head_sees_a_block_at_a_time_and_learnt_tokens_only(tmp_path: Path) -> None:
    hidden, labels, weights, projection = problem()
    spy = Spy(projection)
    blocked_cross_entropy(hidden, labels, weights, Head(spy), rows=4).backward()
    assert spy.rows == [4, 4, 2]

    model = elastic()
    model.lm_head = spy = Spy(model.lm_head)
    collator = Collator(("qa",))
    trainer_of(model, tmp_path, collator).compute_loss(model, collator(samples()))
    assert spy.rows == [3, 5 + 12 + 19], "one position per row in the model's own forward"


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_change_nothing_but_rounding(softcap: float | None) -> None:
    hidden, labels, weights, projection = problem()
    head = Head(projection, softcap)
    logits = head(hidden)
    whole = (nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    (wanted,) = torch.autograd.grad(whole, hidden)
    for rows in (1, 3, 10, 64, None):
        loss = blocked_cross_entropy(hidden, labels, weights, head, rows=rows)
        (gradient,) = torch.autograd.grad(loss * 3, hidden)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(gradient, wanted * 3)


def test_bfloat16_loses_no_more_than_the_usual_way() -> None:
    hidden, labels, weights, projection = problem(400, torch.bfloat16)

    def usual(hidden: Tensor, projection: nn.Module) -> Tensor:
        losses = nn.functional.cross_entropy(projection(hidden).float(), labels, reduction="none")
        return (losses * weights).sum()

    def error(loss: Callable[[], Tensor]) -> float:
        (gradient,) = torch.autograd.grad(loss(), hidden)
        return float((gradient.double() - exact).norm() / exact.norm())

    double = hidden.detach().double().requires_grad_()
    linear = nn.Linear(16, 50, bias=False, dtype=torch.float64).requires_grad_(False)
    linear.weight.data.copy_(projection.weight)
    logits = linear(double)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    (exact,) = torch.autograd.grad((losses * weights).sum(), double)
    ours = error(lambda: blocked_cross_entropy(hidden, labels, weights, Head(projection)))
    # The weights are one more rounding, of 2^-9 at most.
    assert ours <= error(lambda: usual(hidden, projection)) + 2**-9


def test_a_factor_on_the_loss_is_not_rounded_to_bfloat16() -> None:
    hidden, labels, weights, projection = problem(dtype=torch.bfloat16)
    factor = torch.tensor(1 / 3)
    loss = blocked_cross_entropy(hidden, labels, weights, Head(projection))
    (plain,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * factor, hidden)
    assert torch.equal(scaled, (plain.float() * factor).bfloat16())


def test_nothing_to_learn_is_no_loss_and_no_gradient(tmp_path: Path) -> None:
    hidden, labels, weights, projection = problem()
    loss = blocked_cross_entropy(hidden[:0], labels[:0], weights[:0], Head(projection))
    loss.backward()
    assert loss.item() == 0
    assert not bool(hidden.grad.any())

    model = elastic()
    collator = Collator(("qa",))
    prompt = samples(1)[0]
    prompt.labels.fill_(-100)
    trainer = trainer_of(model, tmp_path, collator)
    trainer.current_gradient_accumulation_steps = 1
    batch = collator([prompt])
    trainer.step_samples = trainer.objective.count(batch["task_ids"])
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(0))
    assert loss.item() == 0


def test_a_head_that_trains_is_refused() -> None:
    hidden, labels, weights, projection = problem()
    with pytest.raises(ValueError, match="head must be frozen"):
        blocked_cross_entropy(hidden, labels, weights, Head(projection.requires_grad_(True)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_stay_in_float32_over_a_bfloat16_backbone(
    checkpointing: bool, tmp_path: Path
) -> None:
    def trained(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = ec.elasticize(tiny("qwen3").bfloat16(), SETTINGS)
        if checkpointing:
            checkpoint_layers(model)
        trainer = trainer_of(
            model, tmp_path, Collator(("qa",)), max_steps=2, per_device_train_batch_size=2
        )
        trainer.train()
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        return [p.detach() for router in ec.routers(model) for p in router.parameters()]

    routers = trained(checkpointing)
    assert {parameter.dtype for parameter in routers} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in routers)
    assert all(map(torch.equal, routers, trained(False))), "checkpointing changes memory only"
