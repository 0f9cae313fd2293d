"""What samples hold: whether a run can use it, and what tells it from other samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elasticore.train.data import TrainingSample

__all__ = ["check_samples", "check_vocabulary", "digest_of"]


def check_vocabulary(ids: Tensor, vocabulary: int | None, where: str) -> None:
    """Raise ``ValueError`` unless all tokens are in a vocabulary of that size; None: any."""
    limit = torch.iinfo(torch.int64).max if vocabulary is None else vocabulary
    outside = ids[(ids < 0) | (ids >= limit)]
    if len(outside):
        raise ValueError(
            f"{where}: token {int(outside[0])} is not in the tokenizer's vocabulary of "
            f"{vocabulary}; use the tokenizer that the data were made with."
        )


def digest_of(samples: Iterable[TrainingSample], *about: Any) -> str:
    """SHA-256 of samples, in their order, and of what else is known of them."""
    digest = hashlib.sha256(repr(about).encode())
    for one in samples:
        digest.update(repr((one.task, one.prompt, len(one.input_ids))).encode())
        digest.update(torch.stack([one.input_ids, one.labels]).numpy().tobytes())
    return digest.hexdigest()


def check_samples(
    name: str, dataset: Any, targets: Sequence[str], positions: int | None = None
) -> None:
    """Raise ``ValueError`` if a data set holds what cannot be trained on, as far as it says so.

    Parameters
    ----------
    name
        The data's, for the message.
    dataset
        With ``tasks``, the names that occur; ``longest``, tokens of a sample, or None; and
        ``check()``, which raises if a sample cannot be made. Any of them may be missing.
    targets
        The tasks that have one.
    positions
        Tokens that the model can read.
    """
    where = "".join(f" {place}" for place in [getattr(dataset, "path", None)] if place)
    without = sorted(set(getattr(dataset, "tasks", ())) - set(targets))
    if without:
        raise ValueError(
            f"{name}{where} holds the tasks {', '.join(without)}, which have no target; targets "
            f"name {', '.join(targets)}."
        )
    longest = getattr(dataset, "longest", None)
    if longest is not None and positions is not None and longest > positions:
        raise ValueError(
            f"{name}{where} holds samples of up to {longest} tokens, but the backbone has "
            f"{positions} positions; make them shorter, or use a backbone for longer texts."
        )
    if hasattr(dataset, "check"):
        try:
            dataset.check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
