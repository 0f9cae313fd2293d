"""vLLM's attention on CPUs, with heads that are routed.

A layer's call falls into parts: prompts are read by vLLM's own kernel, or, where their heads are
routed, by :func:`elasticore.hybrid_head_attention`; answers are made by vLLM's kernel again, which
is given every (token, KV head) as a sequence of its own, over the pages that this head reads.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from elasticore.call import hybrid_head_attention
from elasticore.patterns import HeadMode
from elasticore.plan import HeadPlan
from elasticore.serving.vllm.decisions import Decisions
from elasticore.serving.vllm.pages import Places
from elasticore.serving.vllm.report import Report
from elasticore.serving.vllm.startup import started
from elasticore.serving.vllm.step import Step
from elasticore.serving.vllm.tables import near_pages

__all__ = ["Backend", "Builder", "Implementation", "Metadata"]


class Backend(CPUAttentionBackend):
    """vLLM's own, unless there are settings for elasticore."""

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        """See vLLM's ``AttentionBackend``."""
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """See vLLM's ``AttentionBackend``."""
        return Builder


@dataclass(frozen=True)
class Routed:
    """What heads read in a part of a step, and vLLM's metadata of its (token, KV head) pairs."""

    plan: HeadPlan
    heads: CPUAttentionMetadata | None


@dataclass(kw_only=True)
class Metadata(CPUAttentionMetadata):
    """What the layers of a step share.

    Attributes
    ----------
    step
        Whose tokens these are.
    builder
        Who made it, and holds what was decided.
    common
        What vLLM said of the step.
    parts, routed
        See :meth:`part` and :meth:`route`; made when a layer asks, as many layers need the same.
    """

    step: Step
    builder: Builder
    common: CommonAttentionMetadata
    parts: dict[str, tuple[Tensor, CPUAttentionMetadata]] = field(default_factory=dict)
    routed: dict[tuple[str, bytes], Routed | None] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The parts of the step that are not empty: the request of each of its sequences.

        Prompts are sequences, and of answers every token is one; int64 ``[n]``.
        """
        prompts = torch.tensor([p.row for p in self.step.prompts], dtype=torch.int64)
        both = {"prompts": prompts, "answers": self.step.row}
        return {name: rows for name, rows in both.items() if len(rows)}

    @cached_property
    def pages(self) -> dict[str, Tensor]:
        """Of these, the pages that name what was decided."""
        return {name: self.step.page[rows] for name, rows in self.rows.items()}

    def route(self, name: str, decisions: Tensor) -> Routed | None:
        """What heads read in a part by the decisions int8 ``[n, Hkv]``; None: all of them all."""
        key = name, decisions.numpy().tobytes()
        if key not in self.routed:
            plan = self.builder.way.plan(decisions, short=name == "answers")
            known = None
            if bool((plan.modes != int(HeadMode.FULL)).any()):
                known = Routed(plan, self._of_heads(plan) if name == "answers" else None)
            self.routed[key] = known
        return self.routed[key]

    def _of_heads(self, plan: HeadPlan) -> CPUAttentionMetadata:
        """vLLM's metadata in which each (token, KV head) is a sequence, over its own pages."""
        size, kv_heads = self.builder.block_size, plan.decisions.shape[1]
        table, seen = near_pages(
            self.block_table[self.step.row],
            self.step.seen,
            plan.modes == int(HeadMode.STREAMING),
            plan.streaming.sink // size,
            plan.streaming.local // size,
            size,
        )
        table = (table * kv_heads + torch.arange(kv_heads)[:, None]).flatten(0, 1)
        one = torch.ones(len(table), dtype=torch.int64)
        return self.builder.other_rows(self.common, one, seen.flatten(), table, one_head=True)

    def part(self, name: str) -> tuple[Tensor, CPUAttentionMetadata]:
        """The tokens (int64 ``[n]``) of a part, and vLLM's metadata of it alone."""
        step = self.step
        if name not in self.parts:
            if name == "answers":
                tokens, count, seen = step.answers, torch.ones_like(step.seen), step.seen
            else:
                each = step.prompts
                tokens = torch.cat([torch.arange(p.start, p.start + p.count) for p in each])
                count, seen = torch.tensor([(p.count, p.past + p.count) for p in each]).T
            table = self.block_table[self.rows[name]]
            self.parts[name] = tokens, self.builder.other_rows(self.common, count, seen, table)
        return self.parts[name]


class Builder(CPUAttentionMetadataBuilder):
    """Looks at each step once for all layers of a group; holds what was decided for its requests.

    vLLM's own builder where there are no settings for elasticore, or no elastic layers.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        found = started(vllm_config)
        layers = {extract_layer_index(name) for name in layer_names}
        self.layers = layers & set(found.backbone.elastic if found else ())
        if found is None or not self.layers:
            return
        self._decided: frozenset[tuple[int, int]] = frozenset()
        self.way, self.report = found.way, Report(found.settings.log_requests)
        self.decisions = Decisions(found.way, found.backbone, self.layers)
        # The same builder for caches of one head.
        self._one_head = copy.copy(self)
        self._one_head.num_heads = self.num_heads // self.num_kv_heads
        self._one_head.num_kv_heads = 1
        self.places = Places(self._write, self.block_size, self.head_dim, kv_cache_spec.dtype)

    def _write(self, keys: Tensor, values: Tensor, cache: Tensor) -> None:
        """Write a page as vLLM does."""
        layer = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]]
        layer.impl.do_kv_cache_update(layer, keys, values, cache, torch.arange(len(keys)))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """See vLLM's ``AttentionMetadataBuilder``."""
        common = common_attn_metadata
        made = super().build(common_prefix_len, common, fast_build)
        if not self.layers:
            return made
        step = Step.of(
            common.query_start_loc_cpu.tolist(),
            common.seq_lens.tolist(),
            common.rswa_prefix_lens[: common.num_reqs].tolist(),
            common.block_table_tensor,
            self.block_size,
            self._decided,
        )
        self._decided = step.decided
        return Metadata(**vars(made), step=step, builder=self, common=common)

    def other_rows(
        self,
        common: CommonAttentionMetadata,
        count: Tensor,
        seen: Tensor,
        table: Tensor,
        *,
        one_head: bool = False,
    ) -> CPUAttentionMetadata:
        """vLLM's metadata of rows other than the step's.

        Parameters
        ----------
        common
            Of the step.
        count, seen
            int64 ``[rows]``: their queries, and the tokens that the last of these sees.
        table
            ``[rows, n]``: their pages.
        one_head
            Whether they are of a cache with one KV head.
        """
        starts = torch.zeros(len(count) + 1, dtype=torch.int32)
        starts[1:] = count.cumsum(0)
        rows = common.replace(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seen.int(),
            num_reqs=len(count),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(count.max()),
            max_seq_len=int(seen.max()),
            block_table_tensor=table.int().contiguous(),
        )
        return CPUAttentionMetadataBuilder.build(self._one_head if one_head else self, 0, rows)


class Implementation(CPUAttentionBackendImpl):
    """One layer's attention: vLLM's own, wherever all heads of all requests read everything."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See vLLM's ``AttentionImpl``."""
        whole, m = partial(super().forward, layer), attn_metadata
        routed: dict[str, Routed] = {}
        if isinstance(m, Metadata):
            routed = self._routed(_number(layer.layer_name), m, kv_cache)
        if not routed or not isinstance(m, Metadata):
            scales = (output_scale, output_block_scale)
            return whole(query, key, value, kv_cache, m, output, *scales)
        for name in m.rows:
            if name not in routed:
                tokens, part = m.part(name)
                out = torch.empty_like(output[: len(tokens)])
                output[tokens] = whole(query[tokens], key, value, kv_cache, part, out)
        if "prompts" in routed:
            self._prompts(routed["prompts"].plan, m, query, key, value, kv_cache, output)
        if "answers" in routed:
            # A cache of one KV head, in which every head of every page is a page.
            cache = kv_cache.view(-1, 1, *kv_cache.shape[2:])
            tokens, group = m.step.answers, self.num_heads // self.num_kv_heads
            q = query[tokens].reshape(-1, group, self.head_size)
            out = whole(q, key, value, cache, routed["answers"].heads, torch.empty_like(q))
            output[tokens] = out.view(len(tokens), *output.shape[1:])
        return output

    def _routed(self, number: int, m: Metadata, kv_cache: Tensor) -> dict[str, Routed]:
        """The parts of a step in which heads do not read everything, in the layer of a number."""
        builder, step = m.builder, m.step
        if number not in builder.layers:
            return {}

        def read(row: int, position: Tensor) -> Tensor:
            return builder.places.read_keys(kv_cache, m.block_table[row], position)

        builder.decisions.decide(number, step, read, kv_cache.shape[0])
        if step.ended and number == max(builder.layers):
            builder.report(step, builder.decisions)
        found = {}
        for name, page in m.pages.items():
            routed = m.route(name, builder.decisions.of(number, page))
            if routed is not None:
                found[name] = routed
        return found

    def _prompts(
        self,
        plan: HeadPlan,
        m: Metadata,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        output: Tensor,
    ) -> None:
        """Prompts whose heads are routed."""
        for number, p in enumerate(m.step.prompts):
            own = slice(p.start, p.start + p.count)
            keys, values = key[own], value[own]
            if p.past:
                keys, values = m.builder.places.read(
                    kv_cache, m.block_table[p.row], torch.arange(p.past + p.count)
                )
            q, k, v = (x.transpose(0, 1)[None] for x in (query[own], keys, values))
            own_plan = plan.with_decisions(plan.decisions[number : number + 1])
            out = hybrid_head_attention(q, k, v, own_plan, scale=self.scale)
            output[own] = out[0].transpose(0, 1).reshape(p.count, *output.shape[1:])


_number = functools.cache(extract_layer_index)
"""A layer's number, from its name."""
