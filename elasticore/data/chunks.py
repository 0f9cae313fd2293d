"""Records into token sequences, a chunk of records at a time, in worker processes.

A chunk is a fixed number of records, and results are taken in the order of the chunks, so that
what comes out does not depend on how many workers there are.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import parent_process
from random import Random
from typing import Any

from elasticore.data.encoding import Encoder
from elasticore.data.sequence import TokenSequence
from elasticore.data.sources import Example, Source

__all__ = ["Chunk", "Job", "encode", "in_order", "jobs", "start_worker"]

ALONE, WITH_COMPANY = 16, 512  # records of a chunk

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A chunk of records, and what to make of it.

    Attributes
    ----------
    source, records, first
        The records, of which the first has this number in the source.
    least, most
        Tokens that a sequence may have.
    seed
        Of what is random: the order of passages, and how much company an example gets.
    """

    source: Source
    records: Sequence[Record]
    first: int
    least: int
    most: int
    seed: int


@dataclass
class Chunk:
    """What became of a chunk: its sequences, the records read, and why examples were dropped."""

    records: int
    sequences: list[TokenSequence] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=lambda: {"short": 0, "long": 0, "unusable": 0})


def jobs(
    source: Source, records: Iterator[Record], least: int, most: int, seed: int
) -> Iterator[Job]:
    """Cut the records of a source into chunks."""
    size = ALONE if source.company == "none" else WITH_COMPANY
    first = 0
    while chunk := list(islice(records, size)):
        yield Job(source, chunk, first, least, most, seed)
        first += len(chunk)


def encode(job: Job, encoder: Encoder) -> Chunk:
    """Make the token sequences of a chunk and drop those of other lengths."""
    chunk = Chunk(len(job.records))
    random = Random(f"{job.seed} {job.source.name} {job.first}")
    usable, sizes = [], []
    for number, record in enumerate(job.records, job.first):
        alone = _make(job.source, number, record, (), random)
        if alone is None:
            chunk.dropped["unusable"] += 1
        else:
            usable.append((number, record))
            sizes.append(len(alone.prompt))
    if not usable:
        return chunk
    for asked, company in _companies(job, encoder, usable, sizes, random):
        number, record = usable[asked]
        example = _make(job.source, number, record, [usable[one][1] for one in company], random)
        sequence = None if example is None else encoder(example, job.source.name)
        if sequence is None:
            chunk.dropped["unusable"] += 1
        elif len(sequence) < job.least:
            chunk.dropped["short"] += 1
        elif len(sequence) > job.most:
            chunk.dropped["long"] += 1
        else:
            chunk.sequences.append(sequence)
    return chunk


def _companies(
    job: Job,
    encoder: Encoder,
    usable: Sequence[tuple[int, Record]],
    sizes: Sequence[int],
    random: Random,
) -> Iterator[tuple[int, list[int]]]:
    """Which record is asked, and which others keep it company, for every example of a chunk.

    The lengths that are aimed at are uniform in their logarithm. Tokens are estimated from
    characters; what misses the limits all the same is dropped later.
    """
    count = len(usable)
    if job.source.company == "none":
        yield from ((asked, []) for asked in range(count))
        return
    sample = _make(job.source, *usable[0], (), random)
    assert sample is not None
    tokens = encoder.tokenizer(sample.prompt, add_special_tokens=False, verbose=False)["input_ids"]
    per_character = len(tokens) / len(sample.prompt)
    low, high = 1.05 * job.least, 0.95 * job.most
    asked = 0
    while asked < count:
        wanted = math.exp(random.uniform(math.log(low), math.log(max(low, high))))
        following = [*range(asked + 1, count)]
        if job.source.company == "lent":
            following += range(asked)
        company: list[int] = []
        size = sizes[asked] * per_character
        for one in following:
            if size >= wanted or size + sizes[one] * per_character > high:
                break
            company.append(one)
            size += sizes[one] * per_character
        yield asked, company
        asked += 1 + (len(company) if job.source.company == "spent" else 0)


def _make(
    source: Source, number: int, record: Record, company: Sequence[Record], random: Random
) -> Example | None:
    try:
        example = source.make(record, company, random)
        if example is not None:
            (example.prompt + example.answer).encode()  # half of a character pair is no text
        return example
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as error:
        raise ValueError(
            f"source {source.name}, record {number}: {type(error).__name__}: {error}; is this "
            f"{source.name} in its own schema? See docs, Data."
        ) from error


# ---- Worker processes ----

_encoder: Encoder | None = None


def start_worker(encoder: Encoder) -> None:
    """Keep the encoder for all chunks of this process, which ends with the one that started it."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers; they would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(job: Job) -> Chunk:
    assert _encoder is not None
    return encode(job, _encoder)


def in_order(pool: Executor, work: Iterable[Job], ahead: int) -> Iterator[Chunk]:
    """Encode chunks in a pool; give them in their order, with at most ``ahead`` under way."""
    under_way: deque[Future[Chunk]] = deque()
    for job in work:
        under_way.append(pool.submit(_encode_in_worker, job))
        if len(under_way) > ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
