"""A layer of a transformers cache that owns what was decided for the prompts in it.

Transformers' ``Cache`` is a list of layer objects. An elastic attention layer wraps its own one
while it is empty. From then on the wrapper holds, beside keys and values, how the heads of each row
were routed and what it takes to route them anew; whatever moves, cuts or copies the rows moves,
cuts or copies both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from elasticore.errors import ElasticoreError
from elasticore.memo import Memo
from elasticore.models.ends import EndColumns, Ends
from elasticore.models.layouts import PassLayout
from elasticore.models.paged_cache import SPARE, PagedLayer
from elasticore.plan import HeadPlan

__all__ = ["ElasticCacheLayer", "elastic_layer"]

_ITS_OWN = (
    "keys",
    "values",
    "is_initialized",
    "device",
    "is_sliding",
    "is_compileable",
    "is_croppable",
    "supports_early_init",
)
"""What is asked of a cache layer as an attribute, and belongs to the one inside."""


def elastic_layer(cache: Any, index: int) -> ElasticCacheLayer:
    """Layer ``index`` of a cache, as one that remembers routing.

    Raises
    ------
    ElasticoreError
        If the cache is not made of layers, or this one was filled by a model that is not elastic.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ElasticoreError(
            f"the cache is a {type(cache).__name__}, which has no list of layers; give an elastic "
            "model a transformers.DynamicCache, StaticCache or QuantizedCache."
        )
    kind = getattr(cache, "layer_class_to_replicate", None)
    while kind is not None and len(layers) <= index:
        layers.append(kind())
    layer = layers[index]
    if not isinstance(layer, ElasticCacheLayer):
        if int(layer.get_seq_length()) > 0:
            raise ElasticoreError(
                "the cache was filled before this model was elastic, so nothing says how its heads "
                "were routed; prefill the prompt again with the elastic model."
            )
        layers[index] = layer = ElasticCacheLayer(layer)
    return layer


@dataclass(eq=False)
class Memory:
    """What a cache layer knows of the prompts in it.

    Attributes
    ----------
    owner
        Digest of the model and the way it attends, which alone may read the rest.
    columns
        Positions of the cache that this is about.
    prompt
        Of those, how many the last decision was made from.
    generated
        Whether tokens that are no prompt came after that.
    decisions
        int8 ``[rows, kv_heads]``; None if there is nothing that they hold for.
    ends
        The keys at both ends of each row, up to ``pending``; None if the policy reads no keys.
    pending
        What came after ``ends``, in order: the inputs of a pass ``[rows, T, hidden size]`` with its
        valid tokens (None: all), or the rows that were chosen from those before. Keys are made
        of them if they are wanted, or if there are too many to keep.
    waiting
        Tokens and choices that were put off since keys were made last.
    valid
        bool ``[rows, columns]``: what is no padding, as the latest pass had it; None: all.
    plain
        Whether the valid tokens of each row follow each other, up to the latest one.
    trail
        Inputs ``[rows, n, hidden size]`` that compiled steps note on the device: that of column
        ``j`` at ``j % n``. None: they note nothing.
    lost
        Whether keys are wanted of tokens that compiled steps did not note, or wrote over.
    plans
        By whether a pass is shorter than a block: the plan of passes that decide nothing, which
        backends prepare for once.
    """

    owner: str
    columns: int = 0
    prompt: int = 0
    generated: bool = False
    decisions: Tensor | None = None
    ends: Ends | None = None
    pending: list[tuple[Tensor, Tensor | None] | Tensor] = field(default_factory=list)
    waiting: int = 0
    valid: Tensor | None = None
    plain: bool = True
    trail: Tensor | None = None
    lost: bool = False
    plans: dict[bool, HeadPlan] = field(default_factory=dict)

    def append(self, ends: Ends) -> None:
        """Go on with more keys; nothing may be pending."""
        self.ends = ends if self.ends is None else self.ends + ends

    def put_off(
        self, hidden: Tensor, valid: Tensor | None, project: Callable[[Tensor], Tensor]
    ) -> None:
        """Note a pass that is no prompt; keys are made when there is too much of it."""
        self.pending.append((hidden.detach(), valid))
        self.waiting += hidden.shape[1]
        limit = None if self.ends is None else self.ends.boundary
        if self.waiting >= (2 * limit if limit else 256):
            self.settle(project)

    def skip(self, columns: int) -> None:
        """Compiled steps have generated all up to ``columns``; what they have noted is pending."""
        tokens = columns - self.columns
        if tokens == 0:
            return
        if self.valid is not None:
            self.valid = pad(self.valid, (0, tokens), value=True)
        self.columns, self.generated = columns, True
        if self.ends is None:
            return
        trail, boundary = self.trail, self.ends.boundary
        held = 0 if trail is None else min(trail.shape[1], tokens)
        # Of more tokens the last ones are enough, if the first keys of every row are there.
        if trail is None or (held < tokens and int(self.ends.length.min()) < (boundary or 0)):
            self.ends, self.pending, self.waiting, self.lost = None, [], 0, True
            return
        if held < tokens:
            unknown = trail.new_zeros(1, 1, 1).expand(len(trail), tokens - held, trail.shape[2])
            self.pending.append((unknown, None))
        column = torch.arange(columns - held, columns, device=trail.device)
        self.pending.append((trail[:, column % trail.shape[1]], None))
        self.waiting += tokens

    def settle(self, project: Callable[[Tensor], Tensor]) -> None:
        """Make keys of all that is pending."""
        self.settle_rows()
        runs, self.pending, self.waiting = self.pending, [], 0
        if not runs or self.ends is None:
            return
        hidden = torch.cat([run[0] for run in runs], 1)
        valid = None
        if any(run[1] is not None for run in runs):
            every = [x.new_ones(x.shape[:2], dtype=torch.bool) if v is None else v for x, v in runs]
            valid = torch.cat(every, 1)
        layout = PassLayout.of_valid(valid, hidden.shape[0], hidden.shape[1], hidden.device)
        width, boundary = hidden.shape[1], self.ends.boundary
        where = EndColumns.of(boundary, width, layout.columns, layout.row, layout.length)
        self.append(Ends.of(where, hidden, project))

    def settle_rows(self) -> None:
        """Choose the rows of all that came before a choice of rows."""
        if not any(isinstance(entry, Tensor) for entry in self.pending):
            return
        chosen: Tensor | None = None  # from the rows at an entry to those of now
        settled: list[Any] = []
        for entry in reversed(self.pending):
            if isinstance(entry, Tensor):
                chosen = entry if chosen is None else entry[chosen]
            elif chosen is None:
                settled.append(entry)
            else:
                rows = chosen.to(entry[0].device)
                settled.append((entry[0][rows], None if entry[1] is None else entry[1][rows]))
        self.pending = settled[::-1]
        if self.ends is not None and chosen is not None:
            rows = chosen.to(self.ends.length.device)
            self.ends = self.ends.rows(lambda tensor: tensor[rows])

    def move(self, rows: Tensor) -> None:
        """Replace the rows by the ones of these numbers."""
        if self.decisions is not None:
            self.decisions = self.decisions[rows.to(self.decisions.device)]
            self.plans = {}
        if self.valid is not None:
            self.valid = self.valid[rows.to(self.valid.device)]
        if self.trail is not None:
            self.trail = self.trail[rows.to(self.trail.device)]
        if self.ends is not None:
            self.pending.append(rows)
            self.waiting += 1

    def crop(self, columns: int) -> None:
        """Forget all beyond ``columns``, and the decision if its prompt is no longer whole."""
        self.settle_rows()
        drop = self.columns - columns
        while drop and self.pending:
            hidden, valid = self.pending.pop()
            keep = max(hidden.shape[1] - drop, 0)
            drop -= hidden.shape[1] - keep
            if keep:
                self.pending.append((hidden[:, :keep], None if valid is None else valid[:, :keep]))
        if drop and self.ends is not None:
            gone = torch.full_like(self.ends.length, drop)
            if self.valid is not None:
                gone = self.valid[:, columns : columns + drop].sum(1)
            self.ends = self.ends.without(gone)
        if self.valid is not None:
            self.valid = self.valid[:, :columns]
        self.columns = columns
        if columns < self.prompt:
            self.decisions, self.prompt, self.plans, self.generated = None, 0, {}, False


class ElasticCacheLayer(CacheLayerMixin):
    """A cache layer around another one, with the routing of the prompts that it holds.

    Everything that is asked of a layer goes to the one inside, a dynamic, static, quantized or
    offloaded one.

    Attributes
    ----------
    inner
        The layer with the keys and values.
    memory
        What is known of its prompts; None while it is empty.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._columns: int | None = 0
        self.memory: Memory | None = None

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(inner, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def columns(self) -> int:
        """Positions that it holds; after a compiled step the device is asked, once."""
        if self._columns is None:
            self._columns = int(self.inner.get_seq_length())
            if self.memory is not None:
                self.memory.skip(self._columns)
        return self._columns

    @columns.setter
    def columns(self, columns: int) -> None:
        self._columns = columns

    @property
    def steps(self) -> bool:
        """Whether a step of decoding needs nothing but what lies here, on the device."""
        memory = self.memory
        if memory is None or memory.decisions is None:
            return False
        if isinstance(self.inner, PagedLayer):
            return self.inner.room is not None
        return isinstance(self.inner, StaticLayer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See the layer inside, as for all that follows."""
        self.inner.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values; return all of them."""
        if torch.compiler.is_compiling():
            self._columns = None  # a number here would be one more graph for every length
        else:
            self.columns += key_states.shape[-2]
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``update`` returns."""
        return self.inner.get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:
        """Positions held: an int, or a tensor on the device in a static layer."""
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        """Positions that there is room for; -1 if there is no limit."""
        return self.inner.get_max_length()

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.inner.offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        self.inner.prefetch()

    def give_back(self, plan: HeadPlan, valid: Tensor | None) -> None:
        """Keep of streaming heads what they read from now on, and no more, once that is less.

        Parameters
        ----------
        plan
            What all further passes run: heads that are FULL or STREAMING.
        valid
            bool ``[rows, columns]``: what is no padding; None: all.
        """
        sink, local = plan.streaming.blocks(plan.block_size)
        if type(self.inner) not in (DynamicLayer, StaticLayer):
            return
        room = self.inner.get_max_length()
        if max(room, self.columns) <= (sink + local + SPARE) * plan.block_size:
            return  # there is nothing to give yet
        sizes = {"sink": sink, "local": local, "page_size": plan.block_size}
        keys, values = self.inner.keys, self.inner.values
        assert keys is not None and values is not None
        keys, values = keys[:, :, : self.columns], values[:, :, : self.columns]
        sizes["room"] = room
        self.inner = PagedLayer(keys, values, plan.modes, valid, **sizes)

    def end_prompt(self, plan: HeadPlan | None, valid: Tensor | None) -> None:
        """A pass that read a prompt is over: a static cache is made ready for compiled steps.

        Parameters
        ----------
        plan, valid
            See :meth:`give_back`; no plan keeps everything.
        """
        if plan is not None:
            self.give_back(plan, valid)
        if isinstance(self.inner, PagedLayer):
            self.inner.stay()
        memory = self.memory
        if memory is None or memory.decisions is None:
            return
        memory.decisions = memory.decisions.contiguous()
        for tensor in (memory.decisions, memory.trail):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Start over with the same objects."""
        if isinstance(self.inner, PagedLayer):
            room = self.inner.room
            self.inner = DynamicLayer() if room is None else StaticLayer(room)
        self.inner.reset()
        self.columns, self.memory = int(self.inner.get_seq_length()), None

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens off the end; a cut into a prompt forgets its routing."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        if isinstance(self.inner, PagedLayer):
            self._crop_pages(self.inner, tokens_to_remove)
            return
        held, before = self.columns, self.inner.get_seq_length()
        self.inner.crop(tokens_to_remove)
        if not isinstance(before, int):  # it counts on the device, and takes negative numbers only
            self.columns = max(held + tokens_to_remove, 0)
        else:
            self.columns = self.inner.get_seq_length()
        if self.memory is not None and self.memory.columns > self.columns:
            self.memory.crop(self.columns)

    def _crop_pages(self, inner: PagedLayer, tokens_to_remove: int) -> None:
        # Older versions of transformers take a positive number for what is left.
        left = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        left = min(max(left, 0), self.columns)
        memory = self.memory
        assert memory is not None  # pages are made of what it knows
        if left < memory.prompt:
            raise ElasticoreError(
                f"the cache cannot be cropped to {left} tokens, into the prompt of "
                f"{memory.prompt}: its streaming heads have given their memory back, so it cannot "
                "be routed anew. Attend with cache='dense', or prefill the text again."
            )
        gone: Tensor | int = self.columns - left
        if memory.valid is not None:
            gone = memory.valid[:, left : self.columns].sum(1)
        inner.cut(self.columns - left, gone)
        self.columns = left
        memory.crop(left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace rows by others."""
        if isinstance(self.inner, PagedLayer):
            self.inner.select(_listed(beam_idx))
        else:
            self.inner.reorder_cache(beam_idx)
        self._move(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the rows, given by their numbers or by a mask."""
        if isinstance(self.inner, PagedLayer):
            self.inner.select(_listed(indices))
        else:
            self.inner.batch_select_indices(indices)
        self._move(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if isinstance(self.inner, PagedLayer):
            held = range(len(self.inner.streams))
            self.inner.select([row for row in held for _ in range(repeats)])
        else:
            self.inner.batch_repeat_interleave(repeats)
        if self.memory is not None and self.memory.decisions is not None:
            rows = torch.arange(self.memory.decisions.shape[0])
            self._move(rows.repeat_interleave(repeats))

    def _move(self, rows: Any) -> None:
        if self.memory is not None:
            self.memory.move(_numbers(rows))


def _numbers(rows: Any) -> Tensor:
    """Numbers of rows, int64, of numbers or a mask."""
    rows = torch.as_tensor(rows)
    if rows.dtype == torch.bool:
        rows = rows.nonzero()
    return rows.long().flatten()


_last_listed: Memo[list[int]] = Memo()


def _listed(rows: Tensor) -> list[int]:
    """:func:`_numbers` on the host, for which a device is waited for once in all layers."""
    return _last_listed.get((), (rows,), rows.device, lambda: _numbers(rows).tolist())


def _own(name: str) -> property:
    def read(self: ElasticCacheLayer) -> Any:
        return getattr(self.inner, name)

    def write(self: ElasticCacheLayer, value: Any) -> None:
        setattr(self.inner, name, value)

    return property(read, write)


for _name in _ITS_OWN:
    setattr(ElasticCacheLayer, _name, _own(_name))
