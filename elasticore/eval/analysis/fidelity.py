"""What a head would lose in its sparse mode, and whether its router chose that mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elasticore.attention import (
    AttentionRequest,
    HybridHeadAttention,
    Verdict,
)
from elasticore.backends.selection import choose_blocks
from elasticore.call import hybrid_head_attention
from elasticore.checks import check_int
from elasticore.choice import current_backend, using_engine
from elasticore.eval.analysis.rows import Row
from elasticore.eval.tasks import Sample
from elasticore.layout import SequenceLayout
from elasticore.models.elastic import Elastic, is_elastic
from elasticore.models.families import attention_layers, is_local
from elasticore.patterns import BlockLists, Full, HeadMode
from elasticore.plan import HeadPlan
from elasticore.router.policies import AllRetrieval

__all__ = ["HeadFidelity", "blocks_read", "compare", "head_fidelity"]


@dataclass(frozen=True)
class HeadFidelity:
    """One query head on the prompts of one task, as if it were sparse.

    Attributes
    ----------
    task
        The task.
    layer, head, kv_head
        Which head; the layer by its index in the model.
    kept_mass
        Share of the full attention that lies on the keys which the sparse mode reads, from 0 to 1:
        the mean over the sampled query rows.
    output_error
        ``‖O_sparse - O_full‖ / ‖O_full‖`` of the head's outputs in all sampled rows together.
    sparse
        Share of the prompts for which the router chose the sparse mode; nan without a router.
    """

    task: str
    layer: int
    head: int
    kv_head: int
    kept_mass: float
    output_error: float
    sparse: float

    def row(self) -> Row:
        """As a row of a CSV file."""
        return asdict(self)


@torch.no_grad()
def head_fidelity(
    model: Any,
    samples: Sequence[Sample],
    way: Elastic | None = None,
    *,
    rows: int = 64,
    seed: int = 0,
    progress: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> list[HeadFidelity]:
    """Compare every head's sparse mode with full attention, on the q, k and v that it gets.

    Parameters
    ----------
    model
        In evaluation mode. If it is elastic, its heads run as they are routed, and the sparse mode
        is its own; else all heads run full.
    samples
        Their prompts are read, not their answers.
    way
        Of a model that is not elastic: its sparse pattern is what a sparse head would read; the
        paper's streaming by default.
    rows
        Query rows of each prompt to compute, drawn without replacement; all if there are fewer.
    seed
        Of the draw.
    progress
        Wraps the samples, for a progress bar.

    Returns
    -------
    list of HeadFidelity
        By task in the order of the samples, then by layer and head.

    Raises
    ------
    ValueError
        If there is no sample, `rows` or `seed` is out of range, the model is in training mode, or
        a way is given beside an elastic model.

    Notes
    -----
    An error is that of one head on its own. In a layer behind others that are sparse, q, k and v
    are already what those have made of them, and the error does not count that. Rows near the
    beginning lose nothing: a sparse mode reads all there is. Scores of ``rows × tokens`` of one KV
    head's queries exist at a time, in float32.
    """
    if not samples:
        raise ValueError("samples must hold at least one sample, got none.")
    check_int("rows", rows, 1)
    check_int("seed", seed, 0)
    if model.training:
        raise ValueError("model must be in evaluation mode; call model.eval() first.")
    generator = torch.Generator().manual_seed(seed)
    tasks: dict[str, list[list[_Seen]]] = {}
    layers = [layer for layer in attention_layers(model) if not is_local(layer)]
    with _elastic(model, way) as routed:
        watch = _Watch(current_backend())
        for sample in progress(samples):
            prompt = torch.as_tensor(sample.input_ids[: sample.start], device=model.device)
            watch.rows = torch.randperm(sample.start, generator=generator)[:rows].sort().values
            watch.layers = []
            with using_engine(watch):
                model(prompt[None], use_cache=False, logits_to_keep=1)
            tasks.setdefault(sample.task, []).append(watch.layers)
    return [
        one
        for task, prompts in tasks.items()
        for layer, seen in zip(layers, zip(*prompts, strict=True), strict=True)
        for one in _heads(task, int(layer.layer_idx), seen, routed)  # type: ignore[arg-type]
    ]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the sampled rows of one layer say, on the CPU; ``[kv_heads, query heads of each]``.

    Attributes
    ----------
    kept, difference, output
        Of :func:`compare`.
    sparse
        1 where the head was routed to the sparse mode, ``[kv_heads, 1]``.
    """

    kept: Tensor
    difference: Tensor
    output: Tensor
    sparse: Tensor


def _heads(task: str, layer: int, seen: Sequence[_Seen], routed: bool) -> Iterator[HeadFidelity]:
    """One layer, over the prompts of a task."""
    kept = torch.stack([one.kept for one in seen]).mean(0)
    difference = torch.stack([one.difference for one in seen]).sum(0)
    error = (difference / torch.stack([one.output for one in seen]).sum(0)).sqrt()
    sparse = torch.stack([one.sparse for one in seen]).mean(0).expand_as(kept)
    if not routed:
        sparse = torch.full_like(kept, torch.nan)
    columns = torch.stack([kept, error, sparse], -1)
    for head, values in enumerate(columns.flatten(0, 1).tolist()):
        yield HeadFidelity(task, layer, head, head // kept.shape[1], *values)


class _Watch(HybridHeadAttention):
    """Looks at the sampled rows of every call, and hands it on to another backend.

    A prefill in evaluation mode is one call per elastic layer, in their order.
    """

    name = "fidelity"

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.rows = torch.zeros(0, dtype=torch.long)
        self.layers: list[_Seen] = []

    @classmethod
    def available(cls) -> Verdict:
        """Always: another backend does the work."""
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        """Everything: the other backend refuses for itself."""
        return Verdict(True)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        *,
        layout: SequenceLayout,
        scale: float,
    ) -> Tensor:
        """See :meth:`HybridHeadAttention.attend`."""
        rows = self.rows.to(q.device)
        blocks = blocks_read(q, k, plan, rows // plan.block_size, scale)
        kept, difference, output = compare(
            q[0, :, rows], k[0], v[0], blocks, rows, plan.block_size, scale
        )
        sparse = plan.decisions[0].double()[:, None]
        self.layers.append(_Seen(kept.cpu(), difference.cpu(), output.cpu(), sparse.cpu()))
        return hybrid_head_attention(
            q, k, v, plan, layout=layout, scale=scale, backend=self.backend
        )


def blocks_read(q: Tensor, k: Tensor, plan: HeadPlan, row_block: Tensor, scale: float) -> Tensor:
    """Which key blocks the plan's sparse mode reads in some row blocks, by its own rules.

    Parameters
    ----------
    q, k
        ``[1, Hq, T, D]`` and ``[1, Hkv, T, D]``: one whole prompt.
    plan
        Its sparse pattern counts; ``decisions`` are not read.
    row_block
        int64 ``[rows]``.
    scale
        Of the scores.

    Returns
    -------
    Tensor
        bool ``[Hq, rows, key blocks]``.
    """
    tokens, heads = k.shape[2], q.shape[1]
    key_block = torch.arange(-(-tokens // plan.block_size), device=q.device)
    if plan.sparse.lane is HeadMode.SELECTED:
        lists = choose_blocks(q, k, plan, SequenceLayout.dense(), scale, every=True)
        assert lists is not None
        own = BlockLists(lists.indices[:, :, row_block], lists.counts[:, :, row_block])
        return own.to_mask(len(key_block))[0]
    if plan.sparse.lane is HeadMode.STREAMING:
        read = plan.streaming.reads(row_block[:, None], key_block, plan.block_size)
    else:
        read = key_block <= row_block[:, None]
    return read.expand(heads, -1, -1)


def compare(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    position: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of attention over the blocks that are read, beside the same rows over all keys.

    Parameters
    ----------
    queries
        Float ``[Hq, rows, D]``.
    keys, values
        Float ``[Hkv, T, D]``.
    blocks
        bool ``[Hq, rows, key blocks]``: what is read, causally; at least each row's own block.
    position
        int64 ``[rows]``.
    block_size
        Tokens of a block.
    scale
        Of the scores.

    Returns
    -------
    tuple of Tensor
        float64 ``[Hkv, Hq // Hkv]`` each: the attention on the keys that are read, the mean over
        the rows; and two squared norms over all rows, of what the outputs differ in and of the
        output over all keys. Where everything is read, the first is exactly 1, the second 0.
    """
    token = torch.arange(keys.shape[1], device=keys.device)
    later = token > position[:, None]
    found = []
    # One KV head at a time: nothing larger than [group, rows, T] exists.
    for own, read, k, v in zip(
        queries.unflatten(0, (len(keys), -1)),
        blocks.unflatten(0, (len(keys), -1)),
        keys,
        values,
        strict=True,
    ):
        left_out = ~read[..., token // block_size]
        scores = (own.float() @ k.float().T * scale).masked_fill(later, -torch.inf)
        full = scores.softmax(-1)
        sparse = scores.masked_fill(left_out, -torch.inf).softmax(-1)
        # From what is lost: a sum over all keys would be 1 but for its rounding.
        kept = (1 - full.masked_fill(~left_out, 0).double().sum(-1)).clamp(min=0).mean(-1)
        norms = [((p @ v.float()).double().square().sum((-1, -2))) for p in (sparse - full, full)]
        found.append(torch.stack([kept, *norms]))
    kept, difference, output = torch.stack(found, 1)
    return kept, difference, output


@contextmanager
def _elastic(model: Any, way: Elastic | None) -> Iterator[bool]:
    """The model with elastic layers, its own or for a while; whether a router decides in them."""
    if is_elastic(model):
        if way is not None:
            raise ValueError("way must be None for an elastic model, which has its own.")
        yield True
        return
    way = Elastic() if way is None else way
    with replace(way, policy=AllRetrieval(), retrieval=Full(), base=None).on(model):
        yield False
