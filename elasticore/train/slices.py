"""Training batches under sequence parallelism: a group of processes shares each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from elasticore.checks import check_int
from elasticore.models.parallel import SequenceParallel, slice_tokens
from elasticore.train.data import Collator, TrainingSample

__all__ = ["SliceCollator", "check_slices", "form_groups", "share_batches"]


def check_slices(size: object, processes: int, packed: bool) -> None:
    """Raise unless batches can be split over groups of ``size`` of the processes.

    Parameters
    ----------
    size
        The setting ``sequence_parallel``.
    processes
        Of the whole run.
    packed
        Whether the batches are packed.
    """
    check_int("sequence_parallel", size, 1)
    if size == 1:
        return
    if processes % int(size):  # type: ignore[call-overload]
        sizes = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        raise ValueError(
            f"sequence_parallel must divide the number of processes, got {size} with {processes}; "
            f"sizes that work: {sizes}. torchrun --nproc-per-node sets that number."
        )
    if not packed:
        raise ValueError(
            f"sequence_parallel is {size}, which splits packed batches only; set packed to True."
        )


def form_groups(size: int) -> SequenceParallel | None:
    """Join this process with its neighbours to a group of ``size``; None if it stays alone.

    All processes of the run have to call it.
    """
    return None if size == 1 else SequenceParallel(dist.new_subgroups(size)[0])


@dataclass(frozen=True)
class SliceCollator:
    """Makes the whole batch, in each process of a group, and keeps this one's slice of its tokens.

    What is learnt stays that of the batch: labels, weights, and ``Learnt.predicting``. ``slice``
    says where in it this process's part is: the first and the last + 1 of the learnt tokens that it
    predicts, and the place of its first token in the batch. A token that is predicted from the end
    of one slice is the first of the next, so labels themselves could not be cut.

    Parameters
    ----------
    collator
        Makes the batch, packed.
    rank, size
        Which slice of how many.
    """

    collator: Collator
    rank: int
    size: int

    def __call__(
        self, batch: Sequence[TrainingSample | Sequence[TrainingSample]]
    ) -> dict[str, Any]:
        """The batch, with slices of ``input_ids`` and ``position_ids``."""
        made = self.collator(batch)
        for name in ("input_ids", "position_ids"):
            made[name] = slice_tokens(made[name], self.rank, self.size)
        share = made["input_ids"].shape[1]
        edges = torch.tensor([self.rank, self.rank + 1]) * share
        start, stop = torch.searchsorted(made["predicting"], edges).tolist()
        return made | {"slice": (start, stop, self.rank * share)}


def share_batches(loader: DataLoader[Any], slices: SequenceParallel | None) -> DataLoader[Any]:
    """Give all processes of a group the same batches of a loader that Accelerate has prepared.

    Accelerate can do so itself, but only together with a parallelism of its own, which would
    replace the attention.

    Parameters
    ----------
    loader
        Changed in place.
    slices
        The group of this process, one of those that :func:`form_groups` makes; None leaves every
        process its own batches.

    Raises
    ------
    ValueError
        If the dataset is iterable, so that no sampler says which process gets which batch.
    """
    if slices is None:
        return loader
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard):
        raise ValueError(
            f"sequence_parallel is {slices.size}, which needs a dataset with a length; "
            f"{type(loader.dataset).__name__} is iterable."
        )
    # Not divided in place: a loader for evaluation may come here again.
    shard.num_processes = dist.get_world_size() // slices.size
    shard.process_index = dist.get_rank() // slices.size
    return loader
