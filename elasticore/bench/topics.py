"""A model with random weights whose heads attend to little: to the passages on one topic.

With weights that are random all the way, attention is nearly uniform, and a selector that keeps
90 % of it keeps 90 % of the blocks. Here every token belongs to a topic, every block of a prompt is
about one, and each query head looks, from each topic, for one topic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["ROPE_THETA", "plant_topics", "topic_prompt"]

ROPE_THETA = 1e12
"""Base of the rotary embedding: half of its planes turn by less than 0.3 in 256K tokens."""
LOUDNESS = 8.0
"""Size of an embedding's entries; a layer adds entries of about 1, which must not drown it."""
SCORE = 16.0
"""Mean score of a query and the keys on the topic that it looks for."""
NOISE = 0.25
"""What is left of the random weights that queries and keys had."""


@torch.no_grad()
def plant_topics(model: Any, topics: int, seed: int = 0) -> None:
    """Let the heads of a Llama with random weights look for topics.

    Token ``t`` is on topic ``t % topics``: half of its embedding's energy is the topic's code. A
    head's keys show their own topic, and its queries the topic that a permutation, drawn for each
    layer and query head, gives for theirs; in rotary planes that turn too slowly for a position to
    hide it. So a query attends to about one key in ``topics``, in whole blocks, the same at any
    distance. Values, outputs and MLPs stay as they are.

    Parameters
    ----------
    model
        A ``LlamaForCausalLM`` with ``rope_theta`` :data:`ROPE_THETA`; changed in place.
    topics
        At most half of the head dimension.

    Raises
    ------
    ValueError
        If there are too many topics.
    """
    config = model.config
    dim, hidden = config.head_dim, config.hidden_size
    if not 1 <= topics <= dim // 2:
        raise ValueError(f"topics must be from 1 to head_dim / 2 = {dim // 2}, got {topics}.")
    generator = torch.Generator().manual_seed(seed)
    codes = _orthonormal(topics, hidden, generator) * math.sqrt(hidden)
    slow = [*range(dim // 4, dim // 2), *range(3 * dim // 4, dim)]
    signs = torch.zeros(topics, dim)
    signs[:, slow] = _orthonormal(topics, len(slow), generator)
    # A query and a key on its topic have the product SCORE * sqrt(dim), half of it each. The norm
    # before the projection leaves a code of 1 / sqrt(2) per entry.
    signs *= math.sqrt(SCORE * math.sqrt(dim)) * math.sqrt(2) / hidden

    embedding = model.get_input_embeddings().weight
    topic = torch.arange(embedding.shape[0], device=embedding.device) % topics
    embedding.div_(config.initializer_range).add_(codes.to(embedding)[topic]).mul_(LOUDNESS)
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight
        keys.mul_(NOISE).unflatten(0, (-1, dim)).add_((signs.T @ codes).to(keys))
        queries = layer.self_attn.q_proj.weight.mul_(NOISE)
        for head in queries.unflatten(0, (-1, dim)):
            wanted = torch.randperm(topics, generator=generator)
            head.add_((signs[wanted].T @ codes).to(head))


def topic_prompt(
    length: int, *, block_size: int, topics: int, vocabulary: int, seed: int = 0
) -> Tensor:
    """Draw a prompt, int64 ``[1, length]``: a random topic for each block, then tokens on it."""
    generator = torch.Generator().manual_seed(seed)
    blocks = math.ceil(length / block_size)
    topic = torch.randint(topics, (blocks,), generator=generator).repeat_interleave(block_size)
    token = torch.randint(vocabulary // topics, (length,), generator=generator)
    return (topic[:length] + topics * token)[None]


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator)).Q.T
