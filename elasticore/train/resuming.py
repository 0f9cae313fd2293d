"""A Trainer whose runs can be cut at any point and resumed to the same bits."""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from elasticore.checks import differences
from elasticore.models.elastic import routers
from elasticore.places import free_bytes
from elasticore.processes import from_first, highest, together
from elasticore.train.checkpoints import (
    PARTIAL,
    checkpoints,
    clear_partial,
    commit,
    find_checkpoint,
    name_of,
    saved_settings,
)
from elasticore.train.monitor import Meter, TensorBoard
from elasticore.train.signals import Stopped, StopSignals, shield_workers
from elasticore.train.validation import Measured, Validation, shares

__all__ = ["ResumableTrainer", "load_layers"]

STATE = "trainer_state.json"

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """A :class:`transformers.Trainer` with checkpoints that are whole or not there.

    Beside what the Trainer saves, a checkpoint holds every process's sums since the last log, so
    that also the log goes on as if nothing had happened. It lists its files, and the settings
    that a run must share with it. SIGTERM and SIGUSR1 end a run after the step under way, with a
    checkpoint of it.
    """

    identity: Mapping[str, Any] = {}
    """What else a resumed run must share with the one that it goes on from, as JSON values."""
    fidelity_name: ClassVar[str]
    meter: Meter
    multiplier_lr: float
    objective: Any

    def __init__(self, model: nn.Module, args: TrainingArguments, **arguments: Any) -> None:
        if args.data_seed is None:
            args.data_seed = args.seed  # else the order of the data is the global generator's
        # With a limit of 1 the Trainer would remove the newest checkpoint at the end.
        self._keep, args.save_total_limit = args.save_total_limit, None
        self._partial: Path | None = None
        self._signals = StopSignals()
        self._stopped = 0
        self._origins: list[str] = []
        self.validation = Validation()
        self._measured: Measured | None = None
        self._best: Measured | None = None
        super().__init__(model, args, **arguments)
        self.add_callback(_Stop(self))
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(TensorBoard())

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from the start or from a checkpoint.

        Parameters
        ----------
        resume_from_checkpoint
            A checkpoint; the folder of a run, or True for ``output_dir``, for its newest whole one.
        *args, **kwargs
            As the Trainer's.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such checkpoint, it is damaged, or of a run with other settings.
        Stopped
            After SIGTERM or SIGUSR1: a ``SystemExit`` with 128 plus the signal's number.
        """
        run, source = Path(str(self.args.output_dir)), resume_from_checkpoint
        found = None
        if source is not None and source is not False:
            found = self.check_resumable(run if source is True else source)
        if self.args.process_index == 0:
            clear_partial(run)
        self._stopped = 0
        self._best = None if found is None else Measured.load(found)
        if found is not None:
            state = TrainerState.load_from_json(str(found / STATE))
            if 0 < self.args.max_steps <= state.global_step:  # the Trainer would take another step
                self._load_from_checkpoint(str(found))
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        with self._signals:
            try:
                done = super().train(None if found is None else str(found), *args, **kwargs)
            except KeyboardInterrupt:
                logger.warning(
                    "Interrupted after step %d. %s", self.state.global_step, _last(run, found)
                )
                raise
        if self._stopped:
            raise Stopped(self._stopped)
        return done

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's; its workers outlive a signal to the whole job."""
        loader = super().get_train_dataloader()
        shield_workers(loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The Trainer's; its workers outlive a signal to the whole job."""
        loader = super().get_eval_dataloader(eval_dataset)
        shield_workers(loader)
        return loader

    def note_samples(self, origins: list[str], training: bool) -> None:
        """Keep where the samples of a step come from, for :meth:`not_finite`."""
        if training:
            self._origins += origins

    def not_finite(self, what: str, origins: list[str]) -> FloatingPointError:
        """The error of a step whose loss or gradients are not finite."""
        rank = f", process {self.args.process_index}" if self.args.world_size > 1 else ""
        return FloatingPointError(
            f"{what}: not finite in step {self.state.global_step + 1}{rank}. It was made of: "
            f"{'; '.join(origins) or 'samples that do not say where they come from'}. Nothing was "
            "learnt from it. Look at these samples, or lower the learning rates. "
            f"{_last(Path(str(self.args.output_dir)))}"
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the figures of all samples together; training's noise stays."""
        with torch.random.fork_rng(devices=[]):  # loaders draw from the CPU's generator
            output = super().evaluation_loop(*args, **kwargs)
        made = self._measured = self.validation.finish()
        penalty = made.penalty(self.objective)
        figures = {"loss": made.fidelity + penalty, self.fidelity_name: made.fidelity}
        figures |= {"penalty": penalty}
        figures |= {f"msr/{t}": msr for t, msr in shares(made, self.objective.tasks).items()}
        prefix = kwargs.get("metric_key_prefix", "eval")
        named = {f"{prefix}_{name}": value for name, value in figures.items()}
        return output._replace(metrics=(output.metrics or {}) | named)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        by_loss = self.args.metric_for_best_model in ("loss", "eval_loss")
        if by_loss and self._best is not None:
            self.state.best_metric = self._best.score(self.objective)  # λ has moved since
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.save_strategy != "no":
            self._best = self._measured
            self.control.should_save = True
        return better

    def load_best(self) -> None:
        """Take over the policies of the best checkpoint, if there has been an evaluation."""
        best = self.state.best_model_checkpoint
        if best is None:
            logger.warning("No evaluation has led to a checkpoint; the result is that of the end.")
        else:
            self._load_best_model()
            logger.warning("The result is that of %s, the best one.", best)

    def stop_signal(self) -> int:
        """The number of the signal that any process has received, or 0; the same in all."""
        return highest(self._signals.received, self.args.device)

    def settings(self) -> dict[str, Any]:
        """What decides a run's course, as JSON values; a resumed run has the same."""
        args = self.args
        names = (
            *("max_steps", "num_train_epochs", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm"),
            *("warmup_steps", "seed", "data_seed"),
        )
        try:
            samples = len(self.train_dataset)  # type: ignore[arg-type]
        except TypeError:  # a stream
            samples = None
        return {
            **self.identity,
            "processes": args.world_size,
            "samples": samples,
            "data": getattr(self.train_dataset, "digest", None),
            "validation": getattr(self.eval_dataset, "digest", None),
            "multiplier_lr": self.multiplier_lr,
            "lr_scheduler_type": str(args.lr_scheduler_type),
            **{name: getattr(args, name) for name in names},
        }

    def check_resumable(self, source: str | Path) -> Path:
        """The checkpoint to go on from; nothing is loaded or written.

        Parameters
        ----------
        source
            A checkpoint, or the folder of a run.

        Raises
        ------
        FileNotFoundError, ValueError
            As :meth:`train`.
        """
        own = json.loads(json.dumps(self.settings()))

        def check() -> Path:
            found = find_checkpoint(source)
            differs = differences(saved_settings(found), own)
            if differs:
                raise ValueError(
                    f"resume {found} was written by a run with other settings: "
                    f"{', '.join(differs)}. Resume with the same, or start a new run."
                )
            return found

        return from_first(check)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and not math.isfinite(norm):  # fp16's scaler steps over such a batch
            raise self.not_finite("the norm of the gradients", self._origins)
        self._origins = []
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        run, name = Path(str(self.args.output_dir)), name_of(self.state.global_step)
        first, device = self.args.process_index == 0, self.args.device
        partial = run / PARTIAL / name

        def begin() -> None:
            if first:
                clear_partial(run)
                partial.mkdir(parents=True)

        def finish() -> None:
            if first:
                self._check_ranks(partial)
                commit(partial, run / name, self.settings())
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(run), self._keep, best, use_mtime=True)

        try:
            together(begin, device)
            together(lambda: self._fill(partial, model, trial), device)
            together(finish, device)
        except (OSError, RuntimeError, SafetensorError) as error:
            if first:
                clear_partial(run)
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written to "
                f"{partial}: {error}. It takes about {_mb(self._bytes())}, and {free_bytes(run)}. "
                f"What was there of it is removed. {_last(run)}"
            ) from error

    def _fill(self, partial: Path, model: nn.Module, trial: Any) -> None:
        """Write everything, in all processes, as the Trainer does, but into ``partial``."""
        self._partial = partial.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        best = self.state.best_global_step
        if best:
            folder = partial.parents[1] / name_of(best)  # its place when this one is finished
            if folder.is_dir() or folder.name == partial.name:
                self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            if self._best is not None:
                self._best.save(partial)
            self.state.save_to_json(str(partial / STATE))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _check_ranks(self, partial: Path) -> None:
        for rank in range(self.args.world_size):
            if not (partial / _sums_of(rank)).is_file():
                raise FileNotFoundError(
                    f"process {rank} has left nothing in it; the output folder has to be on a file "
                    "system that all nodes share"
                )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        sums = {
            "meter": self.meter.state(),
            "loss": self._tr_loss,
            "logged": self._globalstep_last_logged,
        }
        torch.save(sums, Path(output_dir) / _sums_of(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The Trainer calls this once when it resumes, where its generators have to be set.
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / _sums_of(self.args.process_index)
        sums = torch.load(file, map_location="cpu", weights_only=True)
        self.meter.resume(sums["meter"], self.args.device)
        self._tr_loss = sums["loss"].to(self.args.device)
        self._globalstep_last_logged = sums["logged"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The Trainer goes on without them where the files are missing.
        if checkpoint is not None:
            for name, owner in (("optimizer", self.optimizer), ("scheduler", self.lr_scheduler)):
                file = Path(checkpoint) / f"{name}.pt"
                state = torch.load(file, map_location="cpu", weights_only=True)
                owner.load_state_dict(state)  # type: ignore[union-attr]

    def _bytes(self) -> int:
        """About what a checkpoint takes."""
        tensors = [p for p in self.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
        for state in self.optimizer.state.values():  # type: ignore[union-attr]
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Stop(TrainerCallback):
    """Ends a run on a signal, and says so."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = self.trainer.stop_signal()
        if number and state.global_step < state.max_steps:
            self.trainer._stopped = number
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._stopped and state.is_world_process_zero:
            logger.warning(
                "%s: stopped after step %d of %d, and saved it in %s. The same command with "
                "--resume auto goes on from there.",
                signal.Signals(self.trainer._stopped).name,
                state.global_step,
                state.max_steps,
                Path(args.output_dir) / name_of(state.global_step),
            )


def _sums_of(rank: int) -> str:
    return f"sums_{rank}.pt"


def _last(run: Path, resumed: Path | None = None) -> str:
    """A sentence about where to go on from."""
    found = next(iter(checkpoints(run)), resumed)
    if found is None:
        return "There is no checkpoint yet."
    return f"The newest checkpoint is {found}; resume from it with --resume {found}."


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def load_layers(model: nn.Module, file: Path) -> None:
    """Copy saved ``layers.INDEX.NAME`` into the model's own routers or policies."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    for index, router in enumerate(routers(model)):
        prefix = f"layers.{index}."
        router.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
