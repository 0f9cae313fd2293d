"""What is measured on held-out samples, and how two moments of a run are compared by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["BEST", "Measured", "Validation", "shares"]

BEST = "best.safetensors"
"""File of a checkpoint with what was measured when the run was at its best so far."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One moment of a run on held-out samples.

    Attributes
    ----------
    fidelity
        The language modelling loss, or what stands in for it.
    msr
        float32 ``[samples]``.
    task_ids
        int64 ``[samples]``.
    """

    fidelity: float
    msr: Tensor
    task_ids: Tensor

    def penalty(self, objective: Any) -> float:
        """The penalty of these samples under the multipliers as they are now."""
        device = next(objective.parameters(), torch.empty(0)).device
        with torch.no_grad():
            return float(objective(self.msr.to(device), self.task_ids.to(device)).penalty)

    def score(self, objective: Any) -> float:
        """``fidelity`` plus penalty: the loss that is trained on.

        Multipliers ascend, so losses of different moments, each under its own multipliers, do not
        compare: the earliest would win. Two moments under the same multipliers do.
        """
        return self.fidelity + self.penalty(objective)

    def save(self, folder: Path) -> None:
        """Write :data:`BEST`."""
        from safetensors.torch import save_file

        fidelity = torch.tensor([self.fidelity], dtype=torch.float64)
        tensors = {"fidelity": fidelity, "msr": self.msr, "task_ids": self.task_ids}
        save_file(tensors, folder / BEST)

    @classmethod
    def load(cls, folder: Path) -> Measured | None:
        """What :meth:`save` wrote, if anything."""
        from safetensors.torch import load_file

        if not (folder / BEST).is_file():
            return None
        tensors = load_file(folder / BEST)
        return cls(float(tensors["fidelity"]), tensors["msr"], tensors["task_ids"])


@dataclass
class Validation:
    """Collects an evaluation, batch by batch.

    Where several processes share the samples, the last of them may be there twice, so that all
    have equally many batches; that is the same in every evaluation.
    """

    _batches: list[tuple[float, int, list[float], list[int]]] = field(default_factory=list)

    def add(self, fidelity: Tensor, weight: int, msr: Tensor, task_ids: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        fidelity
            Its mean.
        weight
            What it counts for: its learnt tokens, or its samples.
        msr, task_ids
            Of its samples.
        """
        row = (float(fidelity), weight, msr.float().tolist(), task_ids.tolist())
        self._batches.append(row)

    def finish(self) -> Measured:
        """All batches of all processes; start anew."""
        batches, self._batches = self._batches, []
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, batches)
            batches = [batch for part in parts for batch in part]
        total = sum(batch[1] for batch in batches)
        fidelity = sum(batch[0] * batch[1] for batch in batches) / max(total, 1)
        return Measured(
            fidelity,
            torch.tensor([msr for batch in batches for msr in batch[2]]),
            torch.tensor([task for batch in batches for task in batch[3]]),
        )


def shares(measured: Measured, tasks: Sequence[str]) -> dict[str, float]:
    """Mean Ω_MSR of each task that occurs."""
    found = {task: measured.msr[measured.task_ids == number] for number, task in enumerate(tasks)}
    return {task: float(msr.mean()) for task, msr in found.items() if len(msr)}
