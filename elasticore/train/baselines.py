"""DuoAttention and PruLong, trained as routers are: same data, same trainer, same evaluation.

Both learn one gate per KV head that holds for every input (:class:`StaticGate`). They differ in
what they preserve, and in what pulls heads to the sparse mode:

- DuoAttention preserves the last hidden states of the model with full attention (its Eq. 2) and
  pays for the sum of its gates (Eq. 3).
- PruLong preserves the language modelling loss, and follows a Lagrangian whose target rises to the
  share of sparse heads that is wanted.

Then the heads with the lowest gates, exactly as many as asked for, become sparse.
The papers are arXiv 2410.10819 and arXiv 2506.17121.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elasticore.checks import check_number
from elasticore.models.attach import state_of
from elasticore.models.elastic import elasticize, restore, routers
from elasticore.models.passes import PASS, Pass
from elasticore.patterns import Streaming
from elasticore.router.gates import (
    DuoGate,
    HardConcreteGate,
    StaticGate,
    head_scores,
    retrieval_only,
)
from elasticore.router.policies import LayerShape, Policy
from elasticore.router.tables import HeadTable, write_duo, write_prulong
from elasticore.train.data import Learnt
from elasticore.train.loss import hidden_states
from elasticore.train.objective import LagrangianObjective, SparsityPenalty, sum_over_processes
from elasticore.train.resuming import load_layers
from elasticore.train.trainer import RouterTrainer

__all__ = [
    "BASELINES",
    "Baseline",
    "DuoAttention",
    "DuoTrainer",
    "GatePrice",
    "GateTrainer",
    "PruLong",
    "PruLongTrainer",
    "RisingTarget",
    "baseline",
    "settle_gates",
]

GATES = "gates.safetensors"

Model = TypeVar("Model", bound=nn.Module)


class GatePrice(nn.Module):
    """DuoAttention's regularisation: ``weight`` times the mean gate (Eqs. 3 and 4).

    The paper sums ``|α|``; its code, as here, takes the mean, so that the weight does not depend on
    the number of heads.

    Parameters
    ----------
    weight
        λ of Eq. 4.
    """

    tasks = ("all",)

    def __init__(self, weight: float) -> None:
        super().__init__()
        check_number("weight", weight, 0)
        self.weight = weight

    def forward(
        self,
        msr: Tensor,
        task_ids: Tensor,
        *,
        all_processes: bool = False,
        step: Tensor | None = None,
    ) -> SparsityPenalty:
        """The price where ``msr`` ``[samples]``, the same for all of them, is 1 - mean α.

        The arguments are those of :meth:`LagrangianObjective.forward`.
        """
        mean, count = msr.float().mean(), self.count(task_ids, all_processes=all_processes)
        share = 1 if step is None else (count / step).squeeze()
        return SparsityPenalty(self.weight * (1 - mean) * share, mean.detach()[None], count)

    def count(self, task_ids: Tensor, *, all_processes: bool = False) -> Tensor:
        """All samples, as one task: int64 ``[1]``."""
        count = torch.tensor([task_ids.numel()], device=task_ids.device)
        return sum_over_processes(count) if all_processes else count

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Nothing to train."""
        return []

    def share(self) -> None:
        """Nothing to share between processes."""

    def figures(self) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def check(self) -> None:
        """Nothing that could break."""

    def config(self) -> dict[str, Any]:
        """The constructor's argument."""
        return {"weight": self.weight}


class RisingTarget(LagrangianObjective):
    """PruLong's Lagrangian: ``λ1 (s - t) + λ2 (s - t)²`` over all samples, with t rising from 0.

    s is the share of sparse heads as sampled. λ1 and λ2 start at 0 and ascend.

    Parameters
    ----------
    sparsity
        t at the end.
    ramp
        Share of the run over which t rises, linearly.
    """

    def __init__(self, sparsity: float, ramp: float = 0.8) -> None:
        check_number("sparsity", sparsity, 0, 1)
        check_number("ramp", ramp, 0, 1)
        super().__init__({"all": sparsity}, signed=True, init=(0.0, 0.0))
        self.sparsity, self.ramp = sparsity, ramp

    def forward(self, msr: Tensor, task_ids: Tensor, **batch: Any) -> SparsityPenalty:
        """As :class:`LagrangianObjective`, with all samples in one task."""
        return super().forward(msr, torch.zeros_like(task_ids), **batch)

    def count(self, task_ids: Tensor, **batch: Any) -> Tensor:
        """As :class:`LagrangianObjective`, with all samples in one task."""
        return super().count(torch.zeros_like(task_ids), **batch)

    def rise(self, step: int, max_steps: int) -> None:
        """Set t for ``step`` (optimizer steps done so far) of ``max_steps``."""
        done = min(1.0, step / (self.ramp * max_steps)) if self.ramp else 1.0
        for bound in (self.low, self.high):
            bound.fill_(self.sparsity * done)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"sparsity": self.sparsity, "ramp": self.ramp}


class GateTrainer(RouterTrainer):
    """A :class:`RouterTrainer` for the static gates of a model.

    Its checkpoints hold the gates in place of routers. ``collator`` has to be given, as the
    objective has no tasks of the data's.
    """

    policy: ClassVar[type[nn.Module]] = StaticGate

    def before_step(self, step: int, max_steps: int) -> None:
        """Nothing changes over a run."""

    def figures(self) -> dict[str, float]:
        """Nothing beside losses and Ω_MSR."""
        return {}

    def save_policies(self, folder: Path) -> None:
        """Write the gates of all layers."""
        from safetensors.torch import save_file

        tensors = {
            f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
            for index, gate in enumerate(routers(self._elastic()))
            for name, tensor in gate.state_dict().items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / GATES)

    def load_policies(self, folder: Path) -> None:
        """Copy the gates of a checkpoint into the model's own."""
        load_layers(self._elastic(), folder / GATES)


class DuoTrainer(GateTrainer):
    """Trains :class:`DuoGate` by distillation; logs ``distillation`` in place of ``lm_loss``."""

    policy = DuoGate
    objective_type = GatePrice
    fidelity_name = "distillation"

    def fidelity(
        self, model: nn.Module, backbone: PreTrainedModel, inputs: dict[str, Any], learnt: Learnt
    ) -> tuple[Tensor, Any]:
        """Mean squared distance (Eq. 2) to the hidden states with every head in retrieval mode.

        It is taken where learnt tokens are predicted, and weighted as the cross-entropy would be.
        """
        with torch.no_grad(), retrieval_only(routers(backbone)):
            full, _ = hidden_states(backbone, backbone, {**inputs, PASS: Pass(inputs[PASS].prompt)})
        mixed, outputs = hidden_states(model, backbone, inputs)
        distance = learnt.rows(mixed).float() - learnt.rows(full).float()
        return (distance.square().mean(-1) * learnt.weights).sum(), outputs

    def before_step(self, step: int, max_steps: int) -> None:
        """Put the gates back into [0, 1]."""
        for gate in routers(self._elastic()):
            gate.clamp()  # type: ignore[operator]


class PruLongTrainer(GateTrainer):
    """Trains :class:`HardConcreteGate` on the language modelling loss."""

    policy = HardConcreteGate
    objective_type = RisingTarget

    def before_step(self, step: int, max_steps: int) -> None:
        """Raise the target."""
        self.objective.rise(step, max_steps)


@dataclass(frozen=True)
class Baseline(Policy):
    """The settings of a method with static gates, and what it is made of.

    As a policy it gives every layer gates that are yet to be trained.
    """

    trainer: ClassVar[type[GateTrainer]]
    lr: float
    multiplier_lr: float
    sparsity: float

    def __post_init__(self) -> None:
        check_number("lr", self.lr, 0)
        check_number("multiplier_lr", self.multiplier_lr, 0)
        check_number("sparsity", self.sparsity, 0, 1)
        self.gate(1)
        self.objective()

    @abstractmethod
    def gate(self, kv_heads: int) -> StaticGate:
        """The gates of a layer."""

    @abstractmethod
    def objective(self) -> GatePrice | RisingTarget:
        """What pulls them to the sparse mode."""

    @abstractmethod
    def write(self, folder: Path, scores: Tensor, table: HeadTable) -> Path:
        """Write trained gates in the method's own format; return where they are.

        Parameters
        ----------
        folder
            Where to.
        scores
            Of the gates, ``[layers, kv_heads]``.
        table
            The heads that are sparse, and what they read.
        """

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """See :class:`~elasticore.Policy`."""
        return [self.gate(layer.kv_heads).to(layer.device) for layer in layers]

    def tensors(self) -> dict[str, Tensor]:
        """Raise: a file holds the table that gates end as."""
        raise ValueError(
            f"policy {type(self).__name__} has gates in training, which no file of a way holds; "
            "call settle_gates(model, folder) first."
        )


@dataclass(frozen=True)
class DuoAttention(Baseline):
    """DuoAttention; the defaults are its paper's.

    Parameters
    ----------
    lr
        Of the gates.
    sparsity
        Ω_MSR of the pattern.
    reg_weight
        λ of Eq. 4.
    initial
        α at the start.
    """

    trainer = DuoTrainer
    lr: float = 0.02
    multiplier_lr: float = 0.0
    sparsity: float = 0.7
    reg_weight: float = 0.05
    initial: float = 1.0

    def gate(self, kv_heads: int) -> DuoGate:
        """See :meth:`Baseline.gate`."""
        return DuoGate(kv_heads, self.initial)

    def objective(self) -> GatePrice:
        """See :meth:`Baseline.objective`."""
        return GatePrice(self.reg_weight)

    def write(self, folder: Path, scores: Tensor, table: HeadTable) -> Path:
        """The gates themselves: any share of them can be made sparse later."""
        assert table.streaming is not None
        return write_duo(folder, scores, table.streaming.sink, table.streaming.local)


@dataclass(frozen=True)
class PruLong(Baseline):
    """PruLong; the defaults are those of its released run.

    Parameters
    ----------
    lr, multiplier_lr
        Of log α, and of λ1 and λ2.
    sparsity
        Ω_MSR of the pattern, and the target at the end.
    ramp
        Share of the run over which the target rises.
    initial
        log α at the start.
    """

    trainer = PruLongTrainer
    lr: float = 1.0
    multiplier_lr: float = 1.0
    sparsity: float = 0.7
    ramp: float = 0.8
    initial: float = 4.0

    def gate(self, kv_heads: int) -> HardConcreteGate:
        """See :meth:`Baseline.gate`."""
        return HardConcreteGate(kv_heads, self.initial)

    def objective(self) -> RisingTarget:
        """See :meth:`Baseline.objective`."""
        return RisingTarget(self.sparsity, self.ramp)

    def write(self, folder: Path, scores: Tensor, table: HeadTable) -> Path:
        """The mask at this sparsity."""
        file = folder / f"masks_sp{self.sparsity:g}.tsv"
        return write_prulong(file, torch.as_tensor(table.sparse))


BASELINES: dict[str, type[Baseline]] = {"duo": DuoAttention, "prulong": PruLong}
"""The methods by their name in a recipe."""


def baseline(policy: str, settings: Mapping[str, Any]) -> Baseline:
    """The method called ``policy`` with its settings.

    Raises
    ------
    ValueError
        On a name or a setting that does not exist, or a value out of range.
    """
    if policy not in BASELINES:
        raise ValueError(f"policy must be one of elastic, {', '.join(BASELINES)}, got {policy!r}.")
    try:
        return BASELINES[policy](**settings)
    except TypeError as error:
        raise ValueError(f"policy_settings do not fit policy {policy!r}: {error}.") from None


def settle_gates(model: Model, folder: Path) -> Model:
    """Put a :class:`HeadTable` in the place of trained gates, and write it in the method's format.

    Parameters
    ----------
    model
        Elastic, with a :class:`Baseline` as its policy, whose ``sparsity`` is the table's Ω_MSR, to
        the nearest head. Changed in place.
    folder
        Where the method's own file goes.

    Raises
    ------
    ValueError
        If the model has no such gates, or its sparse heads do not stream: the method's files hold
        nothing else.
    """
    way = state_of(model).way
    if not isinstance(way.policy, Baseline) or not isinstance(way.sparse, Streaming):
        raise ValueError(
            "model must attend by Elastic(policy, sparse=Streaming(...)) with the policy "
            f"{' or '.join(cls.__name__ for cls in BASELINES.values())}, got {way}."
        )
    scores = head_scores(routers(model))
    table = replace(HeadTable.of_scores(scores, way.policy.sparsity), streaming=way.sparse)
    way.policy.write(folder, scores, table)
    return elasticize(restore(model), replace(way, policy=table))
