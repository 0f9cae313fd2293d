"""The suite ``e2e``: time to the first token of a whole model with few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elasticore.attention import Verdict
from elasticore.backends.registry import backends, use_backend
from elasticore.bench.attention import CPU, Backend
from elasticore.bench.cases import Case, Engine, Ready, Work
from elasticore.models.config import ElasticConfig
from elasticore.models.elastic import elasticize, restore
from elasticore.router import fixed_policies, random_head_table

__all__ = ["E2eCase", "E2eWork", "e2e_cases"]


@dataclass(frozen=True)
class E2eCase(Case):
    """Prefill of one prompt by a model in the shape of Llama-3.1-8B, with random weights.

    The routing is forced: a random head table with the share asked for, so no router runs. One
    layer costs the same as in the full model, the embedding and the head weigh more than there.
    """

    suite: ClassVar[str] = "e2e"
    unit: ClassVar[str] = "ms"

    layers: int = 4
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

    def engines(self) -> Sequence[Engine]:
        """The elastic model over every backend; where all heads are FULL, the unchanged one too."""
        elastic = [Elastic(info.name) for info in backends()]
        return [*elastic, Unchanged()] if self.share == 0 else elastic

    @property
    def sparse(self) -> str:
        """What sparse heads run."""
        return "STREAMING"

    @property
    def queries(self) -> int:
        """The whole prompt."""
        return self.length

    def build(self, device: torch.device) -> E2eWork:
        """Make the model."""
        return E2eWork(self, device)


class E2eWork(Work):
    """A model and a prompt."""

    # Only a model whose heads are all FULL can be compared, and its attention is averages over
    # thousands of random values: this notices a broken set-up. The suite `attention` compares.
    tolerance = 0.05

    def __init__(self, case: E2eCase, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.case = case
        config = LlamaConfig(
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            head_dim=case.head_dim,
            vocab_size=case.vocabulary,
            max_position_embeddings=case.length,
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
            ).eval()
            self.prompt = torch.randint(case.vocabulary, (1, case.length))
        self.reference = self.first_token().float() if case.share == 0 else None

    @torch.no_grad()
    def first_token(self) -> Tensor:
        """Logits of the first new token, ``[1, 1, vocabulary]``; fills a cache on the way."""
        return self.model(self.prompt, use_cache=True, logits_to_keep=1).logits

    def difference(self, out: Tensor) -> float | None:
        """Relative error of the logits against SDPA, where all heads are FULL."""
        if not bool(out.isfinite().all()):
            return float("inf")
        if self.reference is None:
            return None
        return float((out.float() - self.reference).norm() / self.reference.norm())


class Elastic(Backend):
    """The elastic model over one backend."""

    def prepare(self, work: E2eWork) -> Ready:  # type: ignore[override]
        """Make the model elastic; closing restores it."""
        case = work.case
        table = random_head_table(case.layers, case.kv_heads, case.share or 0.0, seed=0)
        settings = ElasticConfig(sink=case.sink, local=case.local, block_size=case.block_size)
        model: Any = work.model

        def call() -> Tensor:
            with use_backend(self.backend):
                return work.first_token()

        elasticize(model, settings, policies=fixed_policies(table))
        return Ready(call, close=lambda: restore(model))


class Unchanged(Engine):
    """The same model as transformers runs it, on SDPA; reads everything."""

    name = "sdpa"

    def available(self, case: E2eCase, device: torch.device) -> Verdict:
        """Everywhere."""
        return Verdict(True)

    def prepare(self, work: E2eWork) -> Ready:
        """Nothing to do."""
        return Ready(work.first_token)


def e2e_cases(device: torch.device, quick: bool) -> list[Case]:
    """Long prompts, where attention is most of the time."""
    sizes: dict[str, Any] = {}
    lengths: tuple[int, ...] = (16384,) if quick else (16384, 32768, 65536, 131072)
    if device.type != "cuda":
        lengths = (512,) if quick else (512, 2048)
        sizes = {**CPU, "layers": 2, "hidden": 128, "intermediate": 256, "vocabulary": 512}
    return [
        E2eCase("e2e", length, share, **sizes)
        for length in lengths
        for share in ((0.0, 0.75) if quick else (0.0, 0.5, 0.75, 1.0))
    ]
