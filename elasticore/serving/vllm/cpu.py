"""vLLM's attention on CPUs, with heads that are routed.

A layer's call falls into parts: prompts are read by vLLM's own kernel, or, where their heads are
routed, by :func:`elasticore.hybrid_head_attention`; answers are made by vLLM's kernel again, which
is given every (token, KV head) as a sequence of its own, over the pages that this head reads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
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
    parts
        See :meth:`part`; made when a layer asks.
    """

    step: Step
    builder: Builder
    common: CommonAttentionMetadata
    parts: dict[str, tuple[Tensor, CPUAttentionMetadata]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """What there is of the parts ``"prompts"`` and ``"answers"``."""
        there = {"prompts": self.step.prompts, "answers": self.step.answers}
        return [name for name, tokens in there.items() if len(tokens)]

    def rows(self, name: str) -> Tensor:
        """Of a part, the request that each of its sequences is of, int64 ``[n]``.

        Prompts are sequences, and of answers every token is one.
        """
        prompts = self.step.prompts
        return self.step.row if name == "answers" else torch.tensor([p.row for p in prompts])

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
            table = self.block_table[self.rows(name)]
            self.parts[name] = tokens, self.builder.rows(self.common, count, seen, table)
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
        )
        return Metadata(**vars(made), step=step, builder=self, common=common)

    def rows(
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
        routed: dict[str, HeadPlan] = {}
        if isinstance(m, Metadata):
            routed = self._routed(extract_layer_index(layer.layer_name), m, kv_cache)
        if not routed or not isinstance(m, Metadata):
            scales = (output_scale, output_block_scale)
            return whole(query, key, value, kv_cache, m, output, *scales)
        for name in m.names:
            if name not in routed:
                tokens, part = m.part(name)
                out = torch.empty_like(output[: len(tokens)])
                output[tokens] = whole(query[tokens], key, value, kv_cache, part, out)
        if "prompts" in routed:
            self._prompts(routed["prompts"], m, query, key, value, kv_cache, output)
        if "answers" in routed:
            out = self._answers(routed["answers"], m, layer, query, key, value, kv_cache)
            output[m.step.answers] = out.view(len(m.step.answers), *output.shape[1:])
        return output

    def _routed(self, index: int, m: Metadata, kv_cache: Tensor) -> dict[str, HeadPlan]:
        """What parts of a step have heads that do not read everything, and their plans.

        Plans are of the prompts and of the answers' tokens, one sequence each.
        """
        builder, step = m.builder, m.step
        if index not in builder.layers:
            return {}

        def read(row: int, position: Tensor) -> Tensor:
            return builder.places.read(kv_cache, m.block_table[row], position)[0]

        builder.decisions.decide(index, step, read, kv_cache.shape[0])
        if step.ended and index == max(builder.layers):
            builder.report(step, builder.decisions)
        found = {}
        for name in m.names:
            decisions = builder.decisions.of(index, step.page[m.rows(name)])
            plan = builder.way.plan(decisions, short=name == "answers")
            if bool((plan.modes != int(HeadMode.FULL)).any()):
                found[name] = plan
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

    def _answers(
        self,
        plan: HeadPlan,
        m: Metadata,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
    ) -> Tensor:
        """Tokens of answers: each (token, KV head) a sequence of its own, over its own pages."""
        step, builder = m.step, m.builder
        size = builder.block_size
        table, seen = near_pages(
            m.block_table[step.row],
            step.seen,
            plan.modes == int(HeadMode.STREAMING),
            plan.streaming.sink // size,
            plan.streaming.local // size,
            size,
        )
        heads = torch.arange(self.num_kv_heads)[None, :, None]
        table = (table * self.num_kv_heads + heads).flatten(0, 1)
        one = torch.ones(len(table), dtype=torch.int64)
        part = builder.rows(m.common, one, seen.flatten(), table, one_head=True)
        group = self.num_heads // self.num_kv_heads
        q = query[step.answers].reshape(len(table), group, self.head_size)
        pages = kv_cache.view(-1, 1, *kv_cache.shape[2:])
        out = torch.empty_like(q)
        super().forward(layer, q, key, value, pages, part, out)
        return out
