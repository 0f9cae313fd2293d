"""Training samples and the batches made of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from elasticore.checks import check_int, check_number
from elasticore.data.encoding import fingerprint
from elasticore.data.parquet import PackedParquet
from elasticore.data.sequence import IGNORED
from elasticore.train.content import check_vocabulary, digest_of

__all__ = ["Collator", "Learnt", "OfflineTasks", "PackedSamples", "TrainingSample"]


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One sequence.

    Attributes
    ----------
    input_ids, labels
        int64 ``[tokens]``; a label is the token itself, or -100 where nothing is to be learnt.
    task
        Name of its task, one of the objective's targets.
    origin
        Where it comes from, for messages: a file and a line, or a number.
    prompt
        How many of its tokens, from the first on, are its prompt: what it is routed by, in training
        as when the model is used. 0, the default, finds it: the prompt ends where learning begins.
        What is learnt from its very beginning is plain text, without an answer; all of that is its
        prompt.

    Raises
    ------
    ValueError
        If the prompt has more tokens than the sample, or a label is neither its token nor -100.
    """

    input_ids: Tensor
    labels: Tensor
    task: str
    origin: str = ""
    prompt: int = 0

    def __post_init__(self) -> None:
        size = len(self.input_ids)
        if not 0 <= self.prompt <= size:
            raise ValueError(f"prompt must be from 0 to the sample's {size} tokens: {self.prompt}.")
        if self.labels.shape != self.input_ids.shape:
            raise ValueError(f"labels of {self} must be as many as its tokens: {len(self.labels)}.")
        wrong = ((self.labels != IGNORED) & (self.labels != self.input_ids)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"labels of {self} must each be the token in its place, or {IGNORED} where nothing "
                f"is to be learnt; label {at} is {int(self.labels[at])}, and token {at} is "
                f"{int(self.input_ids[at])}. They are not shifted: the loss does that."
            )
        if self.prompt == 0:
            learnt = (self.labels != IGNORED).nonzero()
            first = int(learnt[0]) if len(learnt) else size
            # Nothing comes before the first token, so its label may be missing from plain text.
            object.__setattr__(self, "prompt", first if first > 1 else size)

    def __str__(self) -> str:
        return f"{self.origin or 'a sample'} ({self.task}, {len(self.input_ids)} tokens)"


CHAT_STEP = 0.7548776662466927  # another such walk as the tasks', which does not follow it


class OfflineTasks(Dataset[TrainingSample]):
    """Samples of tasks that make themselves, such as those of :mod:`elasticore.eval.tasks`.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    tasks
        Weight of each task; they alternate in proportion.
    length
        Tokens of every sample.
    samples
        How many there are; sample ``i`` is the same in every run.
    seed
        Of the whole set. Training and held-out samples share no seed, key, value or document.
    split
        ``"train"`` or ``"heldout"``.
    module
        Name of the module whose ``TASKS`` there are: names with a
        :class:`~elasticore.eval.tasks.Task` each.
    chat
        Share of the samples whose prompt ends as a user's does, without the start of the answer
        (:func:`elasticore.eval.chat_tasks.as_in_chat`; the module must have one).
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Mapping[str, float],
        length: int,
        samples: int,
        seed: int = 0,
        split: Literal["train", "heldout"] = "train",
        module: str = "elasticore.eval.tasks",
        chat: float = 0.0,
    ) -> None:
        if not isinstance(module, str):
            raise TypeError(f"module must be a str, got {module!r}.")
        try:
            known = importlib.import_module(module).TASKS
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(
                f"module {module!r} has no TASKS that could be read: {error}"
            ) from error
        if not isinstance(tasks, Mapping):
            raise TypeError(f"tasks must map task names to weights, got {tasks!r}.")
        unknown = sorted(set(tasks) - set(known))
        if unknown or not tasks:
            raise ValueError(
                f"tasks must name some of {', '.join(known)}, got {unknown or 'none'}."
            )
        for task, weight in tasks.items():
            check_number(f"tasks[{task!r}]", weight, 0)
            if weight == 0:
                raise ValueError(f"tasks must have positive weights, got {dict(tasks)}.")
        check_int("length", length, 1)
        check_int("samples", samples, 1)
        check_int("seed", seed, 0)
        check_number("chat", chat, 0, 1)
        if chat and not hasattr(importlib.import_module(module), "as_in_chat"):
            raise ValueError(f"chat must be 0 for tasks of {module}, which has no as_in_chat.")
        if split not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout', got {split!r}.")
        self.tokenizer, self.module, self.chat = tokenizer, module, chat
        self.length, self.samples, self.seed, self.split = length, samples, seed, split
        self.tasks, self.longest = tuple(tasks), length
        total = sum(tasks.values())
        self._edges = np.cumsum([tasks[task] / total for task in self.tasks])

    @property
    def digest(self) -> str:
        """A hash that tells the samples from others, by the settings and the first of them."""
        about = (self.module, self.chat, self.length, self.samples, self.seed, self.split)
        return digest_of([self[0]], *about, self.tasks, self._edges.tolist())

    def check(self) -> None:
        """Make a sample of each task; raises ``ValueError`` where the length is too short."""
        for task in self.tasks:
            self._made(task, 0)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> TrainingSample:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        # A golden-ratio walk over [0, 1): every stretch of samples holds the tasks in proportion.
        point = (index * 0.6180339887498949) % 1.0
        task = self.tasks[
            min(int(np.searchsorted(self._edges, point, "right")), len(self.tasks) - 1)
        ]
        return self._made(task, index)

    def _made(self, task: str, index: int) -> TrainingSample:
        from elasticore.eval.tasks import make_sample

        seed = self.seed * 1_000_003 + index
        module: Any = importlib.import_module(self.module)  # tasks themselves cannot be pickled
        sample = make_sample(task, self.tokenizer, self.length, seed, self.split, module.TASKS)
        if (index * CHAT_STEP) % 1.0 < self.chat:
            sample = module.as_in_chat(sample, self.tokenizer)
        ids = torch.as_tensor(np.asarray(sample.input_ids), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        asked = slice(sample.start + sample.given, sample.stop)
        labels[asked] = ids[asked]
        origin = f"offline {self.split} sample {index}"
        return TrainingSample(ids, labels, task, origin, sample.start)


class PackedSamples(Dataset[tuple[TrainingSample, ...]]):
    """Rows of packed parquet, each the samples that were packed together.

    Parameters
    ----------
    path
        What ``elasticore data build`` wrote, or files of the official code's layout.
    tokenizer
        The model's tokenizer; an error if the data were made with another vocabulary.
    loss
        ``"stored"``: learn what the data say. ``"answer"``: the answers only.

    Attributes
    ----------
    tasks
        The tasks that occur.
    longest
        Tokens that a sample may have; None where the data do not say.

    Raises
    ------
    ValueError
        Also when a row is read whose tokens are not all in the vocabulary.
    """

    def __init__(
        self, path: str | Path, tokenizer: Any, loss: Literal["stored", "answer"] = "stored"
    ) -> None:
        self.data = PackedParquet(path, loss)
        self.tasks = self.data.tasks  # read now, as an id that is no task's is an error
        self.longest: int | None = (self.data.card or {}).get("settings", {}).get("max_length")
        self._vocabulary = None if tokenizer is None else len(tokenizer)
        made_with = self.data.header.tokenizer
        if made_with is not None:
            own = fingerprint(tokenizer)
            if own["vocabulary"] != made_with["vocabulary"]:
                raise ValueError(
                    f"path {path} was made with the tokenizer {made_with['name']}, whose tokens "
                    f"are not those of {own['name'] or 'the backbone'}; build it again with that."
                )

    @property
    def digest(self) -> str:
        """A hash that tells samples apart, by the files' sizes, the first and the last row."""
        files = [(file.name, file.stat().st_size) for file in self.data.files]
        rows = (one for index in {0, len(self) - 1} for one in self[index])
        return digest_of(rows, self.data.loss, len(self), files)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[TrainingSample, ...]:
        where = self.data.where(index)
        samples = tuple(
            TrainingSample(
                torch.tensor(one.input_ids, dtype=torch.int64),
                torch.tensor(one.labels, dtype=torch.int64),
                one.task,
                f"{where}, sequence {number}",
                one.prompt,
            )
            for number, one in enumerate(self.data[index])
        )
        for one in samples:
            check_vocabulary(one.input_ids, self._vocabulary, one.origin)
        return samples


@dataclass(frozen=True)
class Collator:
    """Makes a batch of samples: dense if they are equally long, else packed or padded.

    Samples that come together, as those of :class:`PackedSamples`, stay together and in order.

    Parameters
    ----------
    tasks
        Task names in the objective's order.
    pad_token_id
        What fills shorter rows.
    packed
        Whether samples are laid one after the other in one row instead of padded.
    reduction
        What the language modelling loss averages over: all learnt ``"tokens"`` of the batch, or
        first each sample's tokens and then the ``"samples"``, so that short answers weigh as much
        as long ones.
    """

    tasks: tuple[str, ...]
    pad_token_id: int = 0
    packed: bool = False
    reduction: Literal["tokens", "samples"] = "tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, (tuple, list)) or not self.tasks:
            raise TypeError(f"tasks must be the objective's task names, got {self.tasks!r}.")
        check_int("pad_token_id", self.pad_token_id, 0)
        if self.reduction not in ("tokens", "samples"):
            raise ValueError(f"reduction must be 'tokens' or 'samples', got {self.reduction!r}.")

    def __call__(
        self, batch: Sequence[TrainingSample | Sequence[TrainingSample]]
    ) -> dict[str, Any]:
        """The model's inputs and, beside them, what the loss is made of, and ``origins`` in words.

        ``task_ids`` and ``prompt`` ``[samples]``, the latter in tokens; ``labels`` and
        ``loss_weights`` ``[rows, T]``, at the tokens to be learnt; ``predicting``
        ``[learnt tokens]``: where the token before each of them lies in the flattened
        ``[rows, T]``. Prompts are not predicted, so no logits are made for them.
        """
        samples = [
            sample
            for one in batch
            for sample in ((one,) if isinstance(one, TrainingSample) else one)
        ]
        unknown = sorted({sample.task for sample in samples} - set(self.tasks))
        if unknown:
            raise ValueError(
                f"samples hold the tasks {unknown}, which have no target; targets name "
                f"{list(self.tasks)}."
            )
        labels, weights = [], []
        for sample in samples:
            label = sample.labels.clone()
            label[0] = IGNORED  # nothing comes before the first token that could predict it
            labels.append(label)
            weights.append((label != IGNORED).float())
        if self.reduction == "samples":
            weights = [w / w.sum().clamp(min=1) / len(samples) for w in weights]
        else:
            total = sum(float(w.sum()) for w in weights)
            weights = [w / max(total, 1.0) for w in weights]
        ids = [sample.input_ids for sample in samples]
        made: dict[str, Any] = {
            "task_ids": torch.tensor([self.tasks.index(sample.task) for sample in samples]),
            "prompt": torch.tensor([sample.prompt for sample in samples]),
            "origins": [str(sample) for sample in samples],
        }
        if self.packed:
            made |= self._pack(ids)
            made["labels"] = torch.cat(labels)[None]
            made["loss_weights"] = torch.cat(weights)[None]
        else:
            made |= self._pad(ids)
            made["labels"] = _stack(labels, IGNORED)
            made["loss_weights"] = _stack(weights, 0)
        made["predicting"] = (made["labels"] != IGNORED).flatten().nonzero()[:, 0] - 1
        return made

    def _pack(self, ids: list[Tensor]) -> dict[str, Any]:
        lengths = [len(one) for one in ids]
        cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": cumulative,
            "cu_seq_lens_k": cumulative,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    def _pad(self, ids: list[Tensor]) -> dict[str, Any]:
        batch = {"input_ids": _stack(ids, self.pad_token_id)}
        if len({len(one) for one in ids}) > 1:
            batch["attention_mask"] = _stack([torch.ones_like(one) for one in ids], 0)
        return batch


@dataclass(frozen=True, eq=False)
class Learnt:
    """Which tokens of a batch are learnt.

    Attributes
    ----------
    labels
        int64 ``[learnt tokens]``.
    weights
        float32 ``[learnt tokens]``: what each counts for.
    predicting
        int64 ``[learnt tokens]``: where the token before each lies in the flattened
        ``[rows, T]``.
    """

    labels: Tensor
    weights: Tensor
    predicting: Tensor

    def rows(self, hidden: Tensor) -> Tensor:
        """The hidden states ``[learnt tokens, hidden size]`` that predict them."""
        return hidden.flatten(0, 1).index_select(0, self.predicting)

    def part(self, start: int, stop: int, first: int) -> Learnt:
        """Those from ``start`` to ``stop``, predicted from a slice that begins at ``first``."""
        here = slice(start, stop)
        return Learnt(self.labels[here], self.weights[here], self.predicting[here] - first)


def _stack(rows: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
