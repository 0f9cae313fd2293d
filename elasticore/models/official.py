"""Routers out of the checkpoints that the paper's authors release.

Such a checkpoint is a whole model, backbone and routers, in safetensors. Every layer has, under
``model.layers.{i}.self_attn.mask_allocator.``,

- ``cls_feat_extractor.{0,2}``: the task MLP, d → m·d → d;
- ``cls_router_head_agnostic.{0,2,4}``: the router MLP, d → m·d → d → 2.

Class 1 is full attention there, and column 0 of our logits is retrieval: the two rows of the last
linear layer change places. A tie is their class 0 and our column 1, both of which are sparse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from elasticore.models.elastic import Elastic
from elasticore.models.fingerprint import fingerprint, weights_hash
from elasticore.patterns import Full, Pattern, Streaming, XAttention
from elasticore.router.policies import Router

__all__ = ["Conversion", "convert_official"]

_FAMILIES = {"PawQwen3ForCausalLM": "qwen3", "PawLlamaForCausalLM": "llama"}
_PAIRS = (("full", "streaming"), ("full", "xattn"), ("xattn", "streaming"))
"""What a checkpoint may call the patterns of retrieval and of sparse heads."""
_BLOCK = 128
"""Sinks and windows are counted in blocks of this size there."""

_LAYER = r"model\.layers\.(\d+)\."
_ROUTER = re.compile(
    _LAYER + r"self_attn\.mask_allocator\.(cls_feat_extractor\.[02]|"
    r"cls_router_head_agnostic\.[024])\.(weight|bias)"
)
_BACKBONE = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|" + _LAYER + r"("
    r"self_attn\.[qkvo]_proj\.(weight|bias)|self_attn\.[qk]_norm\.weight|"
    r"mlp\.(gate|up|down)_proj\.(weight|bias)|(input|post_attention)_layernorm\.weight)"
)
_UNREAD = re.compile(  # by inference with routers
    _LAYER + r"self_attn\.(attn_mask_log_alphas|mask_allocator\.(log_temp|task_embedding\.weight))"
    r"|model\.sparsity_lambda(_[12]|[12]_task)"
)


@dataclass(frozen=True, eq=False)
class Conversion:
    """What :func:`convert_official` did.

    Attributes
    ----------
    path
        The router directory.
    way
        What was written: the settings, the routers, and the backbone's fingerprint as its ``base``.
    layers
        Layers with a router.
    mapped
        For each tensor of a layer's router: its name there, its name here, its shape.
    unread
        Names of tensors that have no part in inference, with ``{i}`` for the layer.
    notes
        What to know before comparing figures.
    """

    path: Path
    way: Elastic
    layers: int
    mapped: list[tuple[str, str, list[int]]]
    unread: list[str]
    notes: list[str]


def convert_official(
    path: str | Path,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    threshold: float = 0.9,
) -> Conversion:
    """Write the routers of an official checkpoint as :meth:`Elastic.save` would.

    Parameters
    ----------
    path
        The checkpoint's directory: ``config.json`` and safetensors, in one file or sharded.
    out
        The router directory to write.
    model
        The backbone; needed only where the checkpoint does not hold it.
    threshold
        Of XAttention, where a pattern is that: 0.9 in the paper and in training. The released
        evaluation uses 0.8.

    Returns
    -------
    Conversion
        What was mapped.

    Raises
    ------
    FileNotFoundError
        If ``path`` lacks a file.
    ValueError
        If something in the checkpoint is not understood; the message says what, and nothing has
        been written.
    """
    folder = Path(path)
    tensors = _Checkpoint(folder)
    unknown = [
        n
        for n in tensors
        if not (_ROUTER.fullmatch(n) or _BACKBONE.fullmatch(n) or _UNREAD.fullmatch(n))
    ]
    if unknown:
        raise ValueError(
            f"path {folder} holds {len(unknown)} tensors that are not understood: "
            f"{', '.join(sorted(unknown))}."
        )
    settings = _settings(folder)
    layers = {index: _router(tensors, index) for index in range(int(settings["num_hidden_layers"]))}
    surplus = {int(m[1]) for m in map(_ROUTER.fullmatch, tensors) if m} - set(layers)
    if surplus:
        raise ValueError(
            f"path {folder} holds routers of layers {sorted(surplus)}, but config.json says "
            f"num_hidden_layers {len(layers)}."
        )
    way = _way(settings, layers, threshold, _base_model(tensors, settings, model))
    notes = [
        "The two logits changed places: class 1 is full attention there, sparse here.",
        "Prompts under 200 tokens: the first and last 100 overlap. The released evaluation counts "
        "the overlap twice; here every token counts once.",
        'decode="full", as in the released code: heads are sparse in the prefill only. "routed" in '
        "router.json keeps them sparse in decoding too.",
    ]
    if XAttention in (type(way.retrieval), type(way.sparse)):
        notes.append(f"XAttention's threshold is {threshold:g}; the released evaluation uses 0.8.")
    return Conversion(
        way.save(out),
        way,
        len(layers),
        [(_theirs(name), name, list(tensor.shape)) for name, tensor in layers[0].items()],
        sorted({re.sub(r"\.\d+\.", ".{i}.", n, count=1) for n in tensors if _UNREAD.fullmatch(n)}),
        notes,
    )


class _Checkpoint(Mapping[str, Tensor]):
    """The tensors of a directory, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            shards = [single]
        elif index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            shards = [folder / file for file in sorted(set(files))]
        else:
            raise FileNotFoundError(f"path {folder} has no {single.name} and no {index.name}.")
        self._file_of: dict[str, Any] = {}
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(f"path {folder} lacks {shard.name}, named in {index.name}.")
            try:
                opened = safe_open(shard, "pt")
            except SafetensorError as error:
                raise ValueError(f"path {shard} is damaged: {error}.") from error
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _settings(folder: Path) -> dict[str, Any]:
    """``config.json``, with the defaults that saving leaves out, checked for what we can run."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"path {folder} has no config.json.")
    saved = json.loads(file.read_text(encoding="utf-8"))
    missing = [
        name
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        if name not in saved
    ]
    if missing:
        raise ValueError(f"path {file} lacks {', '.join(missing)}.")
    settings = {
        "architectures": [None],
        "toggle_type": "streaming",
        "retrieval_mode": "full",
        "sink_size": 128,
        "local_window_size": 1024,
        "pooling_mode": "first_token",
        "enable_ada_sparsity": False,
        **saved,
    }
    kind = settings["architectures"][0]
    pair = settings["retrieval_mode"], settings["toggle_type"]
    for wrong, message in (
        (kind not in _FAMILIES, f"architectures [{kind!r}]; known are {', '.join(_FAMILIES)}"),
        (
            not settings["enable_ada_sparsity"],
            "enable_ada_sparsity false: it runs a static mask, and its routers are not trained",
        ),
        (
            settings["pooling_mode"] != "ctx_q",
            f"pooling_mode {settings['pooling_mode']!r}; the released inference has 'ctx_q' only",
        ),
        (
            pair not in _PAIRS,
            f"retrieval_mode {pair[0]!r} with toggle_type {pair[1]!r}; known are "
            f"{', '.join(map(str, _PAIRS))}",
        ),
    ):
        if wrong:
            raise ValueError(f"path {file} has {message}.")
    return settings


def _router(tensors: _Checkpoint, layer: int) -> dict[str, Tensor]:
    """One layer's router under our names, float32, with our polarity."""
    router = {}
    for name in (
        f"{part}.{kind}"
        for part in ("task_mlp.0", "task_mlp.2", "router_mlp.0", "router_mlp.2", "router_mlp.4")
        for kind in ("weight", "bias")
    ):
        theirs = f"model.layers.{layer}.self_attn.{_theirs(name)}"
        if theirs not in tensors:
            raise ValueError(f"path {tensors.folder} lacks {theirs}.")
        tensor = tensors[theirs].float()
        router[name] = tensor.flip(0) if name.startswith("router_mlp.4") else tensor
    return router


def _theirs(name: str) -> str:
    part, rest = name.split(".", 1)
    names = {"task_mlp": "cls_feat_extractor", "router_mlp": "cls_router_head_agnostic"}
    return f"mask_allocator.{names[part]}.{rest}"


def _multiplier(layers: Mapping[int, Mapping[str, Tensor]], settings: Mapping[str, Any]) -> int:
    """m, from the shapes, all of which must fit it."""
    d = _head_dim(settings)
    if layers[0]["router_mlp.4.weight"].shape[0] == 1:
        raise ValueError(
            "path holds routers of the sigmoid kind (use_softmax false), one logit per head. They "
            "normalise the logits over the heads of a layer, which an AttentionRouter does not do."
        )
    m = max(1, layers[0]["task_mlp.0.weight"].shape[0] // d)
    sizes = [("task_mlp.0", m * d, d), ("task_mlp.2", d, m * d)]
    sizes += [("router_mlp.0", m * d, d), ("router_mlp.2", d, m * d), ("router_mlp.4", 2, d)]
    for index, layer in layers.items():
        for part, rows, columns in sizes:
            shapes = [list(layer[f"{part}.{kind}"].shape) for kind in ("weight", "bias")]
            if shapes != [[rows, columns], [rows]]:
                raise ValueError(
                    f"path has the shapes {shapes[0]} and {shapes[1]} for "
                    f"model.layers.{index}.self_attn.{_theirs(part + '.weight')} and its bias; an "
                    f"AttentionRouter of head_dim {d} and hidden multiplier {m} has "
                    f"[{rows}, {columns}] and [{rows}]."
                )
    return m


def _way(
    settings: Mapping[str, Any],
    layers: Mapping[int, Mapping[str, Tensor]],
    threshold: float,
    base: Mapping[str, Any],
) -> Elastic:
    sink, local = (
        -(-int(settings[k]) // _BLOCK) * _BLOCK for k in ("sink_size", "local_window_size")
    )
    patterns: dict[str, Pattern] = {
        "full": Full(),
        "streaming": Streaming(sink, local),
        "xattn": XAttention(threshold=threshold),
    }
    multiplier = _multiplier(layers, settings)
    return Elastic(
        Router(hidden_multiplier=multiplier, weights=[layers[index] for index in sorted(layers)]),
        patterns[settings["retrieval_mode"]],
        patterns[settings["toggle_type"]],
        block_size=_BLOCK,
        decode="full",
        base=base,
    )


def _base_model(
    tensors: _Checkpoint, settings: Mapping[str, Any], model: nn.Module | None
) -> dict[str, Any]:
    """The fingerprint of the backbone, of ``model`` or as the checkpoint holds it."""
    sizes = {
        "family": _FAMILIES[settings["architectures"][0]],
        "layers": settings["num_hidden_layers"],
        "kv_heads": settings["num_key_value_heads"],
        "head_dim": _head_dim(settings),
    }
    names = ["model.embed_tokens.weight"] + [
        f"model.layers.{layer}.{norm}_layernorm.weight"
        for layer in range(sizes["layers"])
        for norm in ("input", "post_attention")
    ]
    missing = [name for name in names if name not in tensors]
    if model is None and missing:
        raise ValueError(
            f"path {tensors.folder} holds no whole backbone (no {missing[0]}); name it with model."
        )
    own = None if missing else weights_hash(tensors[name] for name in names)
    if model is None:
        return {**sizes, "weights": own, "name": tensors.folder.resolve().name}
    base_model = fingerprint(model)
    wrong = [f"{k} {v} (model: {base_model[k]})" for k, v in sizes.items() if base_model[k] != v]
    if own not in (None, base_model["weights"]):
        wrong.append("weights")
    if wrong:
        raise ValueError(
            f"model is not the backbone of {tensors.folder}; it differs in {', '.join(wrong)}. "
            "Leave model out to convert for the backbone in the checkpoint."
        )
    return base_model


def _head_dim(settings: Mapping[str, Any]) -> int:
    return int(
        settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    )
