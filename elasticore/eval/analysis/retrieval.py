"""Which heads retrieve: how much of their attention lies on what the answer rests on (Eq. 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from elasticore.eval.analysis.rows import Row
from elasticore.eval.tasks import Sample
from elasticore.models.elastic import is_elastic
from elasticore.models.families import attention_layers, family_of, is_local

__all__ = ["RetrievalScores", "retrieval_scores"]

IMPLEMENTATION = "elasticore_retrieval_scores"


@dataclass(frozen=True, eq=False)
class RetrievalScores:
    """Scores of the layers that can be made elastic.

    Attributes
    ----------
    heads
        float64 ``[layers, query_heads]`` on the CPU, from 0 to 1.
    kv_heads
        float64 ``[layers, kv_heads]``: the mean over the query heads of each group, as routing is
        by KV head.
    layers
        The layers' indices in the model.
    """

    heads: Tensor
    kv_heads: Tensor
    layers: tuple[int, ...]

    def rows(self) -> list[Row]:
        """One row per query head: layer, head, kv_head, score."""
        group = self.heads.shape[1] // self.kv_heads.shape[1]
        return [
            {"layer": layer, "head": head, "kv_head": head // group, "score": value}
            for layer, values in zip(self.layers, self.heads.tolist(), strict=True)
            for head, value in enumerate(values)
        ]


@torch.no_grad()
def retrieval_scores(
    model: Any,
    samples: Sequence[Sample],
    rows: Literal["last", "answer"] = "last",
    *,
    progress: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> RetrievalScores:
    """Mean share of every head's attention that lies on the evidence of the samples.

    Parameters
    ----------
    model
        A causal language model of a supported family, not elastic, in evaluation mode.
    samples
        Samples with evidence before their answer.
    rows
        Whose attention counts: that of the prompt's last token, as in the paper's Eq. 9, or the
        mean over all tokens that predict one of the answer's, the answer given.
    progress
        Wraps the samples, for a progress bar.

    Raises
    ------
    ValueError
        If `rows` is unknown, there is no sample, one has no evidence, or the model is elastic.
    UnsupportedModel
        If the model's family is not supported.

    Notes
    -----
    Only the rows that count are computed, ``rows × tokens`` of each head; the model itself runs
    with PyTorch's SDPA.
    """
    if rows not in ("last", "answer"):
        raise ValueError(f"rows must be 'last' or 'answer', got {rows!r}.")
    if is_elastic(model):
        raise ValueError("model is elastic; call elasticore.restore(model) first.")
    if not samples:
        raise ValueError("samples must hold at least one sample, got none.")
    family_of(model)
    watched = [layer for layer in attention_layers(model) if not is_local(layer)]
    total = torch.zeros((), dtype=torch.float64)
    with _watching(model) as watch:
        for sample in progress(samples):
            if not sample.evidence:
                raise ValueError(f"samples: one of {sample.task!r} has no evidence to look for.")
            stop = sample.start if rows == "last" else sample.stop - 1
            ids = torch.as_tensor(sample.input_ids[:stop], device=model.device)
            watch.first_row = sample.start - 1
            watch.evidence = torch.zeros(stop, dtype=torch.bool, device=model.device)
            for first, end in sample.evidence:
                watch.evidence[first:end] = True
            model(ids[None], use_cache=False, logits_to_keep=1)
            shares = [watch.shares[layer] for layer in watched]
            total = total + torch.stack([share.flatten() for share in shares]).double().cpu()
            groups = shares[0].shape[0]
    heads = total / len(samples)
    return RetrievalScores(
        heads,
        heads.unflatten(1, (groups, -1)).mean(2),
        tuple(int(layer.layer_idx) for layer in watched),  # type: ignore[arg-type]
    )


@dataclass(eq=False)
class _Watch:
    """What to look at in the pass under way, and what was seen in each layer."""

    first_row: int = 0
    evidence: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    shares: dict[nn.Module, Tensor] = field(default_factory=dict)


_watch: ContextVar[_Watch] = ContextVar("elasticore_retrieval_watch")


@contextmanager
def _watching(model: Any) -> Iterator[_Watch]:
    """The model's attention, with an eye on it."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    original = model.config._attn_implementation
    token = _watch.set(_Watch())
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield _watch.get()
    finally:
        model.set_attn_implementation(original)
        _watch.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """SDPA, after a look at the rows that count; in transformers' own signature."""
    watch = _watch.get()
    if not is_local(module):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        watch.shares[module] = evidence_shares(
            query[0, :, watch.first_row :], key[0], watch.evidence, scale
        )
    return ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def evidence_shares(queries: Tensor, keys: Tensor, evidence: Tensor, scale: float) -> Tensor:
    """Mean over the last rows of the attention that lies on the evidence.

    Parameters
    ----------
    queries
        Float ``[query_heads, rows, head_dim]`` of the last `rows` positions.
    keys
        Float ``[kv_heads, tokens, head_dim]``.
    evidence
        Bool ``[tokens]``.
    scale
        Of the scores.

    Returns
    -------
    Tensor
        float32 ``[kv_heads, query_heads // kv_heads]``.
    """
    rows, tokens = queries.shape[1], keys.shape[1]
    position = torch.arange(tokens, device=keys.device)
    later = position > position[tokens - rows :, None]
    shares = []
    # One KV head at a time: nothing larger than [group, rows, tokens] exists.
    for own, k in zip(queries.unflatten(0, (keys.shape[0], -1)), keys, strict=True):
        scores = (own.float() @ k.float().T) * scale
        attention = scores.masked_fill(later, float("-inf")).softmax(-1)
        shares.append(attention[..., evidence].sum(-1).mean(-1))
    return torch.stack(shares)
