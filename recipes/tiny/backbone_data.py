"""What the tiny backbone trains on and is judged by: tokens, batches and held-out samples."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer

from elasticore.eval.corpus import documents
from elasticore.eval.tasks import TASKS, TEXT, dense_sequence, encode, make_sample
from recipes.tiny.tokenizer import VOCABULARY, train

console = Console()


def prepare(folder: Path, length: int, samples: int) -> None:
    """Write the tokenizer, the training tokens and the held-out samples to `folder`."""
    tokenizer = train(folder / "tokenizer")
    rng = np.random.default_rng(0)
    found = [*documents("train", "code"), *documents("train", "prose")]
    eos = np.array([tokenizer.eos_token_id])
    parts = [
        p for i in rng.permutation(len(found)) for p in (encode(tokenizer, found[i].text), eos)
    ]
    np.save(folder / "train.npy", np.concatenate(parts).astype(np.uint16))
    held: dict[str, Any] = {}
    for task in TASKS:
        drawn = [make_sample(task, tokenizer, length, seed) for seed in range(samples)]
        held[task] = np.stack([s.input_ids for s in drawn]).astype(np.uint16)
        held[f"{task}.start"] = np.array([s.start for s in drawn])
    np.savez_compressed(folder / "heldout.npz", **held)
    tokens, size = sum(map(len, parts)), sum(len(d.text) for d in found)
    about = {"python": platform.python_version(), "documents": len(found)}
    about |= {"characters": size, "training_tokens": tokens}
    (folder / "data.json").write_text(json.dumps(about))
    console.print(about)


class Batches(IterableDataset[tuple[Tensor, Tensor, Tensor, bool]]):
    """Endless batches: inputs, tokens and roles `[sequences, length]`, and whether heads stream.

    A streaming batch is contiguous text. Any other batch is facts laid into short pieces of text
    from all over the corpus: there, only the facts reward looking far back.
    """

    def __init__(self, args: argparse.Namespace, length: int) -> None:
        self.text = np.load(args.data / "train.npy")
        self.tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
        self.args, self.length = args, length
        self.row(np.random.default_rng(0), False)  # what this encodes, forked workers inherit

    def row(
        self, rng: np.random.Generator, streaming: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """One sequence: contiguous text, or from one fact to very many in pieces of text."""
        # Streaming costs the same at any length, so its sequences need not grow.
        length = self.args.length if streaming else self.length
        piece = length if streaming else min(self.args.piece, length)
        starts = rng.integers(len(self.text) - piece, size=-(-length // piece))
        places = (starts[:, None] + np.arange(piece)).flatten()[:length]
        count = 0 if streaming else 1 + int(length // 120 * rng.random() ** 0.7)
        return dense_sequence(
            self.tokenizer, self.text[places].astype(np.int64), length, rng, count
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.args.seed, self.length, worker.id if worker else 0))
        while True:
            streaming = bool(rng.random() < self.args.streaming)
            length = self.args.length if streaming else self.length
            rows = [self.row(rng, streaming) for _ in range(self.args.tokens // length)]
            ids, roles = (np.stack(part) for part in zip(*rows, strict=True))
            inputs = ids.copy()
            noisy = (rng.random(ids.shape) < self.args.noise) & (roles == TEXT)
            inputs[noisy] = rng.integers(2, VOCABULARY, noisy.sum())
            # Small integers: batches travel between processes through little shared memory.
            small = (torch.from_numpy(a.astype(np.int16)) for a in (inputs, ids, roles))
            yield *small, streaming  # type: ignore[misc]
