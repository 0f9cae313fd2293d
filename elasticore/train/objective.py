"""The sparsity part of the training objective: a Lagrangian per task (Eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elasticore.checks import check_int

__all__ = ["LagrangianObjective", "SparsityPenalty", "sum_over_processes"]


class SparsityPenalty(NamedTuple):
    """What :class:`LagrangianObjective` returns; all on its device, nothing read on the host."""

    penalty: Tensor
    """float32, no axes: add it to the language modelling loss."""
    task_msr: Tensor
    """float32 ``[tasks]``, no gradient: mean Ω_MSR of each task's samples, NaN without samples."""
    task_count: Tensor
    """int64 ``[tasks]``: samples of each task."""


class LagrangianObjective(nn.Module):
    """Pulls each task's share of sparse heads to that task's target.

    The penalty is the mean, over the tasks present, of the mean over the task's samples of
    ``λ1[task] * d + λ2[task] * d²``, where d is how far the sample's Ω_MSR is from its target.
    The multipliers λ *ascend* (see :meth:`parameter_groups`), so a task's penalty grows for as long
    as it misses its target; everything else descends.

    Parameters
    ----------
    targets
        Per task name, the Ω_MSR wanted: one number ``t``, or bounds ``(low, high)`` between which
        d is 0. All from 0 to 1. The paper has 1.0 for sparsity-robust and 0.7 for
        sparsity-sensitive tasks.
    signed
        True: ``d = Ω - t`` (Eq. 8; outside bounds, the signed distance to the nearest), which lets
        a positive λ1 push below a target. False: ``|d|``, as in the official code.
    init
        λ1 and λ2 start uniformly in this range.
    seed
        Of the start values; None draws from PyTorch's global generator.

    Attributes
    ----------
    lambda1, lambda2
        Parameters, float32 ``[tasks]``, in the order of :attr:`tasks`.
    tasks
        The task names; a sample's task id is its task's place here.

    Raises
    ------
    TypeError, ValueError
        On empty targets, a target outside [0, 1], low > high, or an ``init`` that is no finite
        ascending range; on loading multipliers that are not finite.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        targets: Mapping[str, float | Sequence[float]],
        signed: bool = False,
        init: Sequence[float] = (0.0, 0.5),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(targets, Mapping):
            raise TypeError(f"targets must map task names to targets, got {targets!r}.")
        check_int("seed", seed, optional=True)
        if not isinstance(init, (tuple, list)) or not all(
            isinstance(v, (int, float)) for v in init
        ):
            raise TypeError(f"init must be a pair of numbers (low, high), got {init!r}.")
        if not targets:
            raise ValueError("targets must name at least one task, such as {'qa': 0.7}, got none.")
        bounds = {str(task): _bounds(task, target) for task, target in targets.items()}
        if len(init) != 2 or not all(map(math.isfinite, init)) or init[0] > init[1]:
            raise ValueError(f"init must be a finite range (low, high), got {init!r}.")
        self.targets = bounds
        self.tasks = tuple(bounds)
        self.signed = signed
        self.init = (float(init[0]), float(init[1]))
        self.seed = seed
        self.register_buffer("low", torch.tensor([b[0] for b in bounds.values()]).float(), False)
        self.register_buffer("high", torch.tensor([b[1] for b in bounds.values()]).float(), False)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        start = torch.empty(2, len(bounds), dtype=torch.float32)
        start.uniform_(*self.init, generator=generator)
        self.lambda1 = nn.Parameter(start[0].clone())
        self.lambda2 = nn.Parameter(start[1].clone())
        self.register_load_state_dict_post_hook(_check_loaded)

    def forward(
        self,
        msr: Tensor,
        task_ids: Tensor,
        *,
        all_processes: bool = False,
        step: Tensor | None = None,
    ) -> SparsityPenalty:
        """The penalty of a batch of samples.

        Parameters
        ----------
        msr
            Ω_MSR of each sample over all layers, float ``[samples]``, differentiable
            (:func:`elasticore.router.model_msr`).
        task_ids
            int64 ``[samples]``, places in :attr:`tasks`; :meth:`task_ids` makes them from names.
        all_processes
            Whether the batch is that of all processes of a distributed run, each of which passes
            its own samples (:func:`sum_over_processes`). Every process then gets the same result,
            and gradients whose mean over the processes are those of the whole batch: a
            router's through DDP, and a multiplier's, of which each process has the whole.
        step
            Samples of each task in the optimizer step that the batch is a part of, as
            :meth:`count` gives them: the penalties of its parts, and their gradients, then add up
            to those of all its samples in one batch. None: the batch is the whole step.

        Raises
        ------
        TypeError, ValueError
            On wrong dtypes, shapes or devices, on no samples, and on the CPU on an id that is no
            task's. On a GPU such an id would have to be read back, so instead it makes the penalty
            NaN, which a trainer's finite-loss check finds.
        """
        self._check_batch(msr, task_ids)
        member = task_ids[:, None] == torch.arange(len(self.tasks), device=task_ids.device)
        unknown = (~member.any(1)).sum().expand(len(self.tasks))
        msr = msr.float()[:, None]
        distance = self._distance(msr)
        columns = torch.stack(
            [torch.ones_like(distance), msr.detach().expand_as(distance), distance, distance**2]
        )
        sums = torch.cat([torch.where(member, columns, 0).sum(1), unknown[None].float()])
        if all_processes:
            sums = sum_over_processes(sums)
        count = sums[0].detach()
        present = count > 0
        whole = count if step is None else step
        task_msr = sums[1] / count.clamp(min=1)
        first, second = sums[2:4] / whole.clamp(min=1)
        per_task = self.lambda1 * first + self.lambda2 * second
        penalty = torch.where(present, per_task, 0).sum() / (whole > 0).sum()
        return SparsityPenalty(
            torch.where(sums[4, 0] == 0, penalty, math.nan),
            torch.where(present, task_msr.detach(), math.nan),
            count.long(),
        )

    def count(self, task_ids: Tensor, *, all_processes: bool = False) -> Tensor:
        """How many samples each task has: int64 ``[tasks]``.

        Parameters
        ----------
        task_ids
            int64 ``[samples]``.
        all_processes
            As in :meth:`forward`.
        """
        count = torch.bincount(task_ids, minlength=len(self.tasks))
        return sum_over_processes(count) if all_processes else count

    def _distance(self, msr: Tensor) -> Tensor:
        """d of every sample for every task, ``[samples, tasks]``, from ``msr [samples, 1]``."""
        # The nearest allowed value is a constant: at a point target d = Ω - t has slope 1 also at
        # d = 0, which clamping the differentiable value would double. Inside bounds d is flat.
        distance = msr - torch.minimum(torch.maximum(msr.detach(), self.low), self.high)
        inside = (self.low < self.high) & (distance == 0)
        distance = torch.where(inside, 0, distance)
        return distance if self.signed else distance.abs()

    def _check_batch(self, msr: Tensor, task_ids: Tensor) -> None:
        if not msr.is_floating_point():
            raise TypeError(f"msr must be a float tensor, got {msr.dtype}.")
        if task_ids.dtype != torch.int64:
            raise TypeError(f"task_ids must be int64, got {task_ids.dtype}; use task_ids.long().")
        if msr.ndim != 1 or msr.shape != task_ids.shape or msr.numel() == 0:
            raise ValueError(
                "msr and task_ids must both be [samples] with at least one sample, got shapes "
                f"{list(msr.shape)} and {list(task_ids.shape)}."
            )
        devices = msr.device, task_ids.device, self.lambda1.device
        if len(set(devices)) > 1:
            raise ValueError(
                f"msr, task_ids and this objective must be on one device, got {devices[0]}, "
                f"{devices[1]} and {devices[2]}."
            )
        if task_ids.device.type == "cpu":
            low, high = int(task_ids.min()), int(task_ids.max())
            if low < 0 or high >= len(self.tasks):
                raise ValueError(
                    f"task_ids must be from 0 to {len(self.tasks) - 1} ({', '.join(self.tasks)}), "
                    f"got ids from {low} to {high}."
                )

    def task_ids(self, names: Sequence[str]) -> Tensor:
        """Ids of task names: int64 ``[len(names)]`` on the objective's device.

        Raises
        ------
        ValueError
            If a name is not one of :attr:`tasks`.
        """
        unknown = sorted(set(names) - set(self.tasks))
        if unknown:
            raise ValueError(
                f"names holds unknown tasks {unknown}; the targets name {list(self.tasks)}."
            )
        ids = [self.tasks.index(name) for name in names]
        return torch.tensor(ids, dtype=torch.int64, device=self.lambda1.device)

    def parameter_groups(self, lr: float = 1e-3, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """One optimizer group for the multipliers, which ascend (``maximize=True``).

        For :class:`torch.optim.AdamW`, beside the router's groups. The defaults are the official
        run's.
        """
        parameters = [self.lambda1, self.lambda2]
        return [{"params": parameters, "lr": lr, "weight_decay": weight_decay, "maximize": True}]

    def share(self) -> None:
        """Give every process of a distributed run the multipliers of the first one."""
        if _processes() > 1:
            for multipliers in (self.lambda1, self.lambda2):
                dist.broadcast(multipliers.data, 0)

    def figures(self) -> dict[str, float]:
        """The multipliers for a log, by name; read on the host."""
        return {
            f"{name}/{task}": value
            for name in ("lambda1", "lambda2")
            for task, value in zip(self.tasks, getattr(self, name).tolist(), strict=True)
        }

    def check(self) -> None:
        """Raise ``ValueError`` naming the tasks whose multipliers are not finite.

        Reads the multipliers on the host; a trainer calls it before a step, not in the forward.
        """
        for name in ("lambda1", "lambda2"):
            values = getattr(self, name).tolist()
            bad = {t: v for t, v in zip(self.tasks, values, strict=True) if not math.isfinite(v)}
            if bad:
                raise ValueError(
                    f"{name} must be finite, got {bad}; lower its learning rate, or load an "
                    "earlier checkpoint."
                )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as a JSON object: ``LagrangianObjective(**config)``."""
        return {
            "targets": {
                task: low if low == high else [low, high]
                for task, (low, high) in self.targets.items()
            },
            "signed": self.signed,
            "init": list(self.init),
            "seed": self.seed,
        }

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"targets={self.config()['targets']}, signed={self.signed}"


def sum_over_processes(sums: Tensor) -> Tensor:
    """Sum a tensor over the processes of a distributed run, differentiably.

    For a loss that every process computes from the same sums, and gradients that are averaged over
    the processes afterwards, as DDP does: with P processes, the gradient of ``sums`` is P times
    that of the result. That is what the backward of an all-reduce, another all-reduce, would give,
    as every process has the same gradient; so there is no communication in the backward pass.

    Parameters
    ----------
    sums
        Of this process; any shape, float32, or integers without gradient.
    """
    processes = _processes()
    if processes == 1:
        return sums
    total = sums.detach().clone()
    dist.all_reduce(total)
    if not sums.is_floating_point():
        return total
    own = sums * processes
    return total + (own - own.detach())  # the difference is exactly 0


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _bounds(task: str, target: float | Sequence[float]) -> tuple[float, float]:
    """A target as (low, high)."""
    values = target if isinstance(target, (tuple, list)) else (target, target)
    if len(values) != 2 or any(
        isinstance(v, bool) or not isinstance(v, (int, float)) for v in values
    ):
        raise TypeError(
            f"targets[{task!r}] must be a number or a pair (low, high), got {target!r}."
        )
    low, high = values
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"targets[{task!r}] must be from 0 to 1, and low <= high in a pair, got {target!r}."
        )
    return float(low), float(high)


def _check_loaded(objective: nn.Module, _incompatible: object) -> None:
    assert isinstance(objective, LagrangianObjective)
    objective.check()
