"""What a run does at its start, before every step and after the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from elasticore.router import seed_noise

if TYPE_CHECKING:
    from elasticore.train.trainer import RouterTrainer

__all__ = ["EveryStep"]


class EveryStep(TrainerCallback):
    """Seeds the noise; before each step clears the multipliers' gradients and checks them.

    The last step is always logged, so that a run of any length leaves something to look at.
    """

    def __init__(self, trainer: RouterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed the noise, and start the clock."""
        if args.world_size > 1:  # the Trainer has seeded all processes alike
            seed_noise(args.seed, args.process_index)
        self.trainer.meter.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare a step."""
        self.trainer.meter.steps += 1
        self.trainer.objective.zero_grad()  # the Trainer clears those of the model only
        self.trainer.objective.check()
        self.trainer.before_step(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step logged."""
        if state.global_step >= state.max_steps:
            control.should_log = True
