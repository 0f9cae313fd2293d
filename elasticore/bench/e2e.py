"""The suite ``e2e``: time to the first token of a whole model with few layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from elasticore.attention import Verdict
from elasticore.bench.attention import CPU
from elasticore.bench.cases import Case, Engine, Ready, Work, tokens
from elasticore.bench.timing import stopped
from elasticore.bench.topics import ROPE_THETA, plant_topics, topic_prompt
from elasticore.layout import Segments, SequenceLayout
from elasticore.models import elastic
from elasticore.models.recording import record
from elasticore.patterns import BlockSelector, Streaming
from elasticore.plan import HeadPlan
from elasticore.router import AttentionRouter, FixedPolicy, HeadTable, Modules, Routing

__all__ = ["E2eCase", "E2eWork", "Elastic", "Unchanged", "e2e_cases"]

LONGEST = 65536
"""Tokens up to which the slower ways to read everything are measured on a GPU."""


@dataclass(frozen=True)
class E2eCase(Case):
    """Prefill of one prompt by a model in the shape of Llama-3.1-8B, with random weights.

    A layer costs what it costs in the full model; the rest, embedding, last norm and head for one
    token, is ``rest_ms`` among the details of the unchanged model. Five layers of eight KV heads
    are 40 heads, so the shares of sparse heads are exact.

    Parameters
    ----------
    layers
        How many there are; 32 in the model whose shape it is.
    """

    suite: ClassVar[str] = "e2e"
    in_turns: ClassVar[bool] = True

    layers: int = 5
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    intermediate: int = 14336
    vocabulary: int = 128256
    sink: int = 128
    local: int = 2048
    block_size: int = 128
    dtype: str = "bfloat16"

    @property
    def topics(self) -> int:
        """Topics of the prompt: selected heads read a share of about 0.9 over this.

        It falls with the square root of the length, from one half at 8K tokens to 8 % at 256K:
        what one query reads grows, as it does in text, but more slowly than the text.
        """
        return max(2, round(1.5 * math.sqrt(self.length / 4096)))

    def engines(self) -> Sequence[Engine]:
        """The unchanged model on each of SDPA's kernels, and the elastic one in several ways."""
        return [
            Unchanged("sdpa", None),
            Unchanged("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
            Unchanged("sdpa-flash", SDPBackend.FLASH_ATTENTION),
            Unchanged("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
            *(Elastic("fa-ssa", share) for share in (0.0, 0.5, 0.7, 0.9)),
            Elastic("xa-ssa", 0.7),
        ]

    def build(self, device: torch.device) -> E2eWork:
        """Make the model and the prompt."""
        return E2eWork(self, device)


class FirstToken(NamedTuple):
    """What a prefill gives.

    Attributes
    ----------
    logits
        Of the first new token, ``[1, 1, vocabulary]``.
    dense
        Whether every head has read everything.
    """

    logits: Tensor
    dense: bool


class E2eWork(Work):
    """A model and a prompt."""

    # Rounding in every layer. One value in eight lost to every head makes 0.03; the suite
    # `attention` compares more closely.
    tolerance = 0.02

    def __init__(self, case: E2eCase, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.case, self.device = case, device
        config = LlamaConfig(
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            head_dim=case.head_dim,
            vocab_size=case.vocabulary,
            max_position_embeddings=case.length,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
            ).eval()
        plant_topics(self.model, case.topics)
        self.prompt = topic_prompt(
            case.length,
            block_size=case.block_size,
            topics=case.topics,
            vocabulary=case.vocabulary,
        ).to(device)

    def twin(self) -> Any:
        """Another model object with the same weights, not copies of them."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    @torch.no_grad()
    def prefill(self, model: Any) -> Tensor:
        """Logits of the first new token, ``[1, 1, vocabulary]``; fills a cache on the way."""
        return model(self.prompt, use_cache=True, logits_to_keep=1).logits

    @cached_property
    def reference(self) -> Tensor:
        """What the unchanged model says."""
        return self.prefill(self.model).float()

    @cached_property
    def rest_ms(self) -> float:
        """Milliseconds of all that is no layer."""
        inner = self.model.model

        @torch.no_grad()
        def rest() -> Tensor:
            return self.model.lm_head(inner.norm(inner.embed_tokens(self.prompt))[:, -1:])

        return stopped(self.device, rest)

    def difference(self, out: FirstToken) -> float | None:
        """Relative error of the logits against SDPA, where every head has read everything."""
        if not bool(out.logits.isfinite().all()):
            return float("inf")
        if not out.dense:
            return None
        return float((out.logits.float() - self.reference).norm() / self.reference.norm())


class Unchanged(Engine):
    """The model as transformers runs it, on one of SDPA's kernels or on SDPA's own choice.

    For one prompt without padding transformers makes no mask, and hands over keys and values with
    the KV heads they have.
    """

    def __init__(self, name: str, kernel: SDPBackend | None) -> None:
        self.name, self.kernel = name, kernel

    def available(self, case: E2eCase, device: torch.device) -> Verdict:
        """Each where it has a kernel."""
        if self.kernel in (None, SDPBackend.FLASH_ATTENTION) or device.type == "cuda":
            return Verdict(True)
        return Verdict(False, "needs an NVIDIA GPU.")

    def left_out(self, case: E2eCase, device: torch.device) -> str:
        """On long prompts, all but the fastest."""
        if case.length > LONGEST and self.kernel is not SDPBackend.CUDNN_ATTENTION:
            return f"not measured above {tokens(LONGEST)} tokens, where cuDNN is the fastest."
        return ""

    def prepare(self, work: E2eWork) -> Ready:
        """Nothing to do."""

        def call() -> FirstToken:
            with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
                return FirstToken(work.prefill(work.model), dense=True)

        return Ready(call, details={"rest_ms": work.rest_ms})


class Elastic(Engine):
    """The elastic model, on the backend that ``auto`` chooses or the context names.

    Parameters
    ----------
    preset
        A preset's name: which patterns there are. Their sizes are the case's.
    share
        Share of sparse heads.
    """

    peer = False

    def __init__(self, preset: str, share: float) -> None:
        self.name = f"{preset}-{share:g}"
        self.preset, self.share = preset, share

    def available(self, case: E2eCase, device: torch.device) -> Verdict:
        """Everywhere."""
        return Verdict(True)

    def left_out(self, case: E2eCase, device: torch.device) -> str:
        """Without sparse heads it is no faster than the unchanged model, and shown not to be."""
        if case.length > LONGEST and self.share == 0:
            return f"it reads everything, not measured above {tokens(LONGEST)} tokens."
        return ""

    def prepare(self, work: E2eWork) -> Ready:
        """Make a twin of the model elastic, and note how sparse it is."""
        case, twin = work.case, work.twin()
        table = torch.as_tensor(
            HeadTable.random(case.layers, case.kv_heads, self.share, seed=0).sparse
        )
        way = elastic.Elastic(
            Modules([_Forced(one, case.head_dim, work.device) for one in table]),
            elastic.PRESETS[self.preset].retrieval,
            Streaming(case.sink, case.local),
            block_size=case.block_size,
        )
        elastic.elasticize(twin, way)

        def call() -> FirstToken:
            return FirstToken(work.prefill(twin), dense=self.share == 0)

        return Ready(call, details=self._sparsity(call, work, way, table))

    def _sparsity(
        self, call: Callable[[], object], work: E2eWork, way: elastic.Elastic, table: Tensor
    ) -> dict[str, Any]:
        """The backend, Ω_MSR, Ω_ESR, and the share of its keys that a SELECTED head reads."""
        with record() as trace:
            call()
        (seen,) = trace.passes
        msr, esr = float(table.double().mean()), float(seen.esr.mean())
        found: dict[str, Any] = {"backend": seen.backend, "msr": msr, "esr": esr}
        if isinstance(way.retrieval, BlockSelector) and msr < 1:
            length = work.case.length
            segments = SequenceLayout.dense().segments(1, length, length, torch.device("cpu"))
            one = torch.ones(1, 1, dtype=torch.int8)
            streams = HeadPlan(one, sparse=way.sparse, block_size=way.block_size)
            left_out = float(streams.esr(segments))
            found["selected"] = 1 - (esr - msr * left_out) / (1 - msr)
        return found


class _Forced(FixedPolicy):
    """A router that runs like any other, and whose decisions a table then replaces."""

    def __init__(self, decisions: Tensor, head_dim: int, device: torch.device) -> None:
        super().__init__(decisions)
        self.router = AttentionRouter(head_dim, device=device).eval()

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        self.router(keys, segments)
        return super().forward(keys, segments)


def e2e_cases(device: torch.device, quick: bool) -> list[Case]:
    """From prompts that the window nearly covers to those where attention is most of the time."""
    sizes: dict[str, Any] = {}
    lengths = [2**power for power in (range(13, 15) if quick else range(13, 19))]
    if device.type != "cuda":
        lengths = [512] if quick else [512, 2048]
        sizes = {**CPU, "layers": 2, "hidden": 128, "intermediate": 256, "vocabulary": 512}
    return [E2eCase("e2e", length, None, **sizes) for length in lengths]
