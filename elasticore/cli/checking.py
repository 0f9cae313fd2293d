"""Whether an elastic model with all heads full is the model itself, here and now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Comparison", "compare_with_plain"]

TOLERANCE = 1e-3
"""Of the largest logit. Rounding in float32 stays far below; a key too many or too few does not."""
NEW_TOKENS = 4


@dataclass(frozen=True)
class Comparison:
    """One kind of pass of an elastic model beside the plain one.

    Attributes
    ----------
    name
        Which pass.
    equal
        Whether the logits agree, up to rounding; None where no model can be made.
    difference
        The largest one, over the largest logit; None if there are no logits to compare.
    reason
        Why there are none.
    """

    name: str
    equal: bool | None
    difference: float | None = None
    reason: str = ""


def compare_with_plain(way: Any = None) -> list[Comparison]:
    """Compare a toy Llama that is elastic with itself as transformers runs it.

    It runs where models would, in float32: on the first GPU if there is one.

    Parameters
    ----------
    way
        An :class:`~elasticore.Elastic`; None for all heads full, which must change nothing.

    Returns
    -------
    list of Comparison
        Of a prefill, of a few steps of ``generate``, and of a batch with padding on the left. What
        raises an error is unequal, and the error its reason.
    """
    from elasticore.errors import OutdatedPackage
    from elasticore.requirements import check_packages

    try:
        check_packages("torch", "transformers", "safetensors", "numpy")
        from transformers import LlamaConfig, LlamaForCausalLM

        from elasticore.models.elastic import Elastic
        from elasticore.router.policies import AllRetrieval
    except OutdatedPackage as error:
        return [Comparison("versions", False, reason=str(error))]
    except Exception as error:  # a broken package of somebody else, as much as one that is missing
        return [
            Comparison("import of transformers", None, reason=f"{type(error).__name__}: {error}")
        ]

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=128,
        max_position_embeddings=1024,
        initializer_range=0.2,  # attention far from uniform: a wrong key shows
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        ids = torch.randint(1, 128, (2, 300))
    model, ids = model.to(device).eval(), ids.to(device)
    way = Elastic(AllRetrieval()) if way is None else way
    found = []
    for name, run in _passes(model, ids):
        expected = run()
        try:
            with way.on(model):
                got = run()
        except Exception as error:  # whatever it is, it is what the user has to know
            found.append(Comparison(name, False, reason=f"{type(error).__name__}: {error}"))
            continue
        difference = float((got - expected).abs().max() / expected.abs().max())
        found.append(Comparison(name, difference <= TOLERANCE, difference))
    return found


def _passes(model: Any, ids: Tensor) -> Iterator[tuple[str, Any]]:
    """The logits of every kind of pass, as functions by name."""
    padding = ids.shape[1] // 3
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0

    @torch.no_grad()
    def prefill() -> Tensor:
        return model(ids).logits

    @torch.no_grad()
    def decoding() -> Tensor:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    @torch.no_grad()
    def padded() -> Tensor:
        logits = model(ids, attention_mask=mask).logits
        return logits.masked_select(mask.bool()[..., None])  # what padding reads means nothing

    yield "prefill", prefill
    yield "decoding", decoding
    yield "left-padded batch", padded
