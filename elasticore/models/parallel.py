"""Sequence parallelism: each process holds a slice of a batch's tokens, and trades them for heads.

Only attention looks from one token at another. So that every process may run the rest of a layer
on its own slice, an all-to-all around the attention call swaps what is split (Ulysses, arXiv
2309.14509): before it, a process has some tokens of all heads; in it, all tokens of some KV heads
and of their query heads. A second all-to-all swaps back.

Routers fit in without any communication of their own. A head is routed by its own keys, and the
keys before rotary embedding travel with q, k and v; a process decides for the heads that it has,
with the same weights as all others. That adds Hkv to the 2 Hq + 2 Hkv heads that travel, a tenth
with four query heads a KV head, where the boundary tokens alone would do: whole keys leave pooling,
and its bits, as they are.

Gradients: an all-to-all's backward is the all-to-all back. A process thus gets, for its copy of a
parameter, what its own tokens and heads add to the gradient of the *sum* of all processes' losses,
and the sum over the processes is the whole gradient. DDP takes the mean instead, over N processes
that hold one batch; so each process's loss is N times what its slice adds to the batch's loss.
:meth:`SequenceParallel.mean` of that is the batch's loss, with this gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from elasticore.models.attach import backbone_of, state_of
from elasticore.models.state import PARALLEL, ROUTER, STATE, LayerState
from elasticore.models.versions import CACHE
from elasticore.router import AttentionRouter

__all__ = ["SequenceParallel", "slice_tokens"]


class SequenceParallel:
    """The processes that hold one batch together, and this one's place among them.

    Parameters
    ----------
    group
        The process group; None for all processes.

    Attributes
    ----------
    rank
        Which slice is this process's, from 0.
    size
        N, the number of slices.

    Raises
    ------
    ValueError
        If ``torch.distributed`` is not initialized, or the group does not hold this process.

    Examples
    --------
    In each of N processes, with the cumulative lengths of the whole batch::

        parallel = SequenceParallel()
        parallel.attach(model)
        hidden = model.base_model(
            input_ids=parallel.slice(input_ids),
            position_ids=parallel.slice(position_ids),
            cu_seq_lens_q=cumulative,
            cu_seq_lens_k=cumulative,
            use_cache=False,
        )[0]
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "group needs torch.distributed: start the processes with torchrun and call "
                "torch.distributed.init_process_group() first."
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"group does not hold this process (rank {dist.get_rank()}); pass its own group, "
                "as torch.distributed.new_subgroups(size) returns it."
            )

    def attach(self, model: nn.Module) -> None:
        """Make an elastic model expect slices, until it is restored.

        Its passes then take this process's slice of packed sequences, their positions, and the
        cumulative lengths of the whole batch. A pass's ``routings`` are those of this
        process's heads, a block of ``kv_heads / size`` in order.

        Raises
        ------
        ValueError
            If the model is not elastic, has layers that it keeps inside a window of its own, runs
            other policies than routers, reads prompts in full, or its KV heads cannot be shared out
            evenly.
        """
        state = state_of(model)
        if state.way.prefill != "routed":
            raise ValueError("model must attend with prefill='routed' to run sequence parallel.")
        for router in (getattr(layer, ROUTER) for layer in state.layers):
            if not isinstance(router, AttentionRouter) or router.by != "head":
                by = " by layer" if isinstance(router, AttentionRouter) else ""
                raise ValueError(
                    f"model runs the policy {type(router).__name__}{by}; sequence parallelism "
                    "needs AttentionRouters, which decide for each head by itself."
                )
        if state.local_layers:
            raise ValueError(
                f"model keeps {state.local_layers} layers inside a sliding window of its own; they "
                "cannot see beyond a process's slice, so it does not run sequence parallel."
            )
        heads = int(model.config.num_key_value_heads)  # type: ignore[union-attr, arg-type]
        if heads % self.size:
            sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"sequence parallelism over {self.size} processes cannot share out the model's "
                f"{heads} KV heads; sizes that work: {sizes}."
            )
        setattr(backbone_of(model).base_model, PARALLEL, self)
        for layer in state.layers:
            getattr(layer, ROUTER).first_head = self.rank * (heads // self.size)
            one: LayerState = getattr(layer, STATE)
            one.parallel = self

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` unless a base model's arguments are those of a slice."""
        if arguments.get("use_cache") is not False or arguments.get(CACHE) is not None:
            raise ValueError(
                "use_cache must be False under sequence parallelism: it is for training, and "
                "cannot generate. Load the routers into a model of its own for that."
            )
        for name, meaning in (
            ("cu_seq_lens_q", "the cumulative lengths of the whole batch's packed sequences"),
            ("position_ids", "the positions of this slice's tokens in their sequences"),
        ):
            if arguments.get(name) is None:
                raise ValueError(
                    f"{name} is missing: under sequence parallelism it gives {meaning}, which "
                    "nothing else tells."
                )

    def slice(self, tokens: Tensor, fill: int = 0) -> Tensor:
        """This process's slice of ``[..., T]``: see :func:`slice_tokens`."""
        return slice_tokens(tokens, self.rank, self.size, fill)

    def to_heads(self, x: Tensor) -> Tensor:
        """From all heads of this slice to all tokens of this process's heads.

        Differentiable. One copy before the exchange, none after it: the result lies in memory token
        by token, as projections leave it.

        Parameters
        ----------
        x
            ``[1, H, T/N, D]``, H a multiple of N.

        Returns
        -------
        Tensor
            ``[1, H/N, T, D]``, a view of ``[T, H/N, D]``.

        Raises
        ------
        ValueError
            If there is more than one row.
        """
        if x.shape[0] != 1:
            raise ValueError(
                "input_ids must be one row of packed sequences under sequence parallelism, got a "
                f"batch of {x.shape[0]} rows."
            )
        parts = x[0].unflatten(0, (self.size, -1)).transpose(1, 2).contiguous()
        return _Exchange.apply(parts, self.group).flatten(0, 1).transpose(0, 1)[None]

    def to_tokens(self, x: Tensor) -> Tensor:
        """Back from ``[1, H/N, T, D]`` to ``[1, H, T/N, D]``, which lies token by token as well."""
        parts = x[0].transpose(0, 1).contiguous().unflatten(0, (self.size, -1))
        own = _Exchange.apply(parts, self.group)  # [N, T/N, H/N, D], of each process's heads
        return own.transpose(0, 1).flatten(1, 2).transpose(0, 1)[None]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes, with its gradient passed on to this one's ``x`` as it is.

        For what every process computes the same loss from, with gradients that are averaged over
        the processes later. A differentiable all-reduce would give ``x`` the mean of N equal
        gradients, so nothing needs to be sent back.
        """
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size + (x - x.detach())  # the difference is exactly 0


class _Exchange(torch.autograd.Function):
    """All-to-all: part i of ``[N, ...]`` goes to process i; its transpose is itself.

    PyTorch has this function too, but deprecates it for one in a private module.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0].contiguous(), ctx.group), None


def slice_tokens(tokens: Tensor, rank: int, size: int, fill: int = 0) -> Tensor:
    """Slice ``rank`` of ``size`` equal ones of ``[..., T]``; ``fill`` makes T a multiple of size.

    What fills up belongs to no sequence, as the cumulative lengths end before it.
    """
    share = -(-tokens.shape[-1] // size)
    whole = pad(tokens, (0, share * size - tokens.shape[-1]), value=fill)
    return whole[..., rank * share : (rank + 1) * share]
