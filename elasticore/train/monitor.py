"""What a run tells while it trains: figures summed on the device, a file of them, and reporters."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from elasticore.places import write_text
from elasticore.router import Routing
from elasticore.train.curves import HISTORY

__all__ = [
    "HistoryFile",
    "Meter",
    "TensorBoard",
    "decision_entropy",
    "entropy_figures",
    "reporters",
]


def decision_entropy(routings: Sequence[Routing]) -> Tensor | None:
    """How undecided each layer's heads are, in nats.

    The binary entropy of the probability of sparse without noise, ``softmax(logits)[..., 1]``, as
    the mean over samples and heads: ln 2 = 0.69 where both modes are equally likely, 0 where the
    noise no longer changes a decision.

    Parameters
    ----------
    routings
        One per layer.

    Returns
    -------
    Tensor or None
        float32 ``[layers]``, without gradient; None where a policy has no logits.
    """
    logits = [routing.logits for routing in routings if routing.logits is not None]
    if len(logits) < len(routings):
        return None
    margin = torch.cat(logits, 1).detach().diff(dim=-1)[..., 0].abs()
    # -p log p - q log q with p = sigmoid(-margin); every term is positive, so nothing cancels.
    entropy = F.softplus(-margin) + margin * torch.sigmoid(-margin)
    layers = entropy.mean(0).split([one.shape[1] for one in logits])
    return torch.stack([layer.mean() for layer in layers])


def entropy_figures(layers: Tensor) -> dict[str, float]:
    """The mean of :func:`decision_entropy` and each layer's, by name; read on the host."""
    values = layers.tolist()
    digits = len(str(len(values) - 1))  # so that names sort as layers do
    each = {f"entropy/layer{index:0{digits}}": value for index, value in enumerate(values)}
    return {"entropy": sum(values) / len(values), **each}


class Meter:
    """Sums figures where they are made, on the device; :meth:`read` is the first to wait for it.

    Attributes
    ----------
    steps
        Optimizer steps begun since the last reading; the trainer counts them.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget everything; time runs from now."""
        self._sums: dict[str, Tensor] = {}
        self._tokens: Tensor | int = 0
        self._learnt = 0
        self.steps = 0
        self._since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Everything summed so far, for a checkpoint."""
        return {
            "sums": self._sums,
            "tokens": int(self._tokens),
            "learnt": self._learnt,
            "steps": self.steps,
            "seconds": time.perf_counter() - self._since,
        }

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a :meth:`state`, whose sums go to ``device``."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._tokens = state["tokens"]
        self._learnt, self.steps = state["learnt"], state["steps"]
        self._since = time.perf_counter() - state["seconds"]

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._sums)

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add to a sum of values and to that of their weights; a figure is their ratio.

        Parameters
        ----------
        name
            Of the figure.
        value
            float, any shape, the weight multiplied in.
        weight
            Of that shape, or one number for all.
        """
        value = value.detach().float()
        if not isinstance(weight, Tensor):
            weight = torch.full_like(value, weight)
        pair = torch.stack([value, weight.float().expand_as(value)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def count(self, inputs: Mapping[str, Any], learnt: int) -> None:
        """Count the tokens of a micro-batch, without its padding, and those that are learnt."""
        mask = inputs.get("attention_mask")
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        self._learnt += learnt

    def read(
        self, device: torch.device, reduce: Callable[[Tensor, str], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The means since the last time and what the work cost, over all processes; start anew.

        Parameters
        ----------
        device
            This process's.
        reduce
            ``(tensor, "mean" or "sum")`` over the processes.

        Returns
        -------
        dict
            Every figure's mean, as its values were shaped; NaN where all weights were 0.
        dict
            ``tokens_per_second``, with everything between two readings in the time;
            ``learnt_tokens`` of a step; on a GPU ``peak_memory_gb``, of this process since it
            began.
        """
        means = {}
        for name, total in self._sums.items():
            total = reduce(total, "mean")
            means[name] = total[0] / total[1]
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        counts[0] += self._tokens
        counts[1] += self._learnt
        tokens, learnt = reduce(counts, "sum").tolist()
        costs = {
            "tokens_per_second": tokens / (time.perf_counter() - self._since),
            "learnt_tokens": learnt / max(self.steps, 1),
        }
        if device.type == "cuda":
            costs["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        self.start()
        return means, costs


class HistoryFile(TrainerCallback):
    """Keeps the training log in ``history.json`` of the output folder, written anew at every log.

    A run that is interrupted, or still going, leaves what it has logged so far. A resumed run goes
    on from its checkpoint's log.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace what an older run has left in the folder."""
        self._write(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what there is."""
        self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        entries = [entry for entry in state.log_history if "penalty" in entry]
        file = Path(args.output_dir) / HISTORY
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(entries, indent=1) + "\n")  # whole, whenever it is read


class TensorBoard(TensorBoardCallback):
    """The Trainer's, in one folder of the run's: what was logged after a checkpoint goes.

    A run that is killed has logged steps that a resumed one takes again; TensorBoard would show
    both. What is written here tells it which to forget.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the folder."""
        self.logging_dir = self.logging_dir or str(Path(args.output_dir) / "tensorboard")
        if state.is_world_process_zero and self.tb_writer is None:
            begin = state.global_step + 1
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=begin)
        super().on_train_begin(args, state, control, **kwargs)


def reporters(names: str | Sequence[str] | None) -> list[str]:
    """Where the Trainer shall report to, checked before any work.

    Parameters
    ----------
    names
        What :class:`transformers.TrainingArguments` takes as ``report_to``; None for TensorBoard if
        it is installed, and nothing, with a warning, if not.

    Raises
    ------
    ValueError
        If the Trainer does not know a name, or its package is not installed.
    """
    installed = get_available_reporting_integrations()
    if names is None:
        if "tensorboard" in installed:
            return ["tensorboard"]
        warnings.warn(
            "TensorBoard is not installed, so this run reports to history.json only; pip install "
            "tensorboard, or set report_to: [] in the recipe to agree.",
            stacklevel=2,
        )
        return []
    wanted = [names] if isinstance(names, str) else list(names)
    if wanted == ["none"]:
        return []
    if wanted == ["all"]:
        return installed
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to must name some of {known}, got {name!r}.")
        if name not in installed:
            raise ValueError(
                f"report_to names {name}, which is not installed; pip install {name}, or take one "
                f"of {', '.join(installed) or 'none'}."
            )
    return wanted
