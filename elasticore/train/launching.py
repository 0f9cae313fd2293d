"""What a launcher must have done for the Trainer to train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elasticore.processes import launched

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["check_processes"]


def check_processes(args: TrainingArguments) -> None:
    """Raise unless every process has one device, and knows of the others.

    Raises
    ------
    ValueError
        If the Trainer would copy the model to several GPUs of this one process, or a launcher has
        started processes that each would train alone; the message says what to do.
    """
    size = launched().size
    if args.world_size != size:
        raise ValueError(
            f"args has world_size {args.world_size}, but a launcher has started {size} "
            "processes, which would all train alone. Without GPUs, pass use_cpu=True and set "
            "ACCELERATE_USE_CPU=true."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"args sees {args.n_gpu} GPUs in one process, for which the Trainer uses "
            "nn.DataParallel; its copies of the model lose the routing. Start a process per GPU, "
            f"with torchrun --nproc-per-node {args.n_gpu} or accelerate launch, or show this one a "
            "single GPU with CUDA_VISIBLE_DEVICES=0."
        )
