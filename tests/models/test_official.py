"""Official checkpoints, made here in their key layout, become routers that decide as they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import elasticore
from elasticore.models.official import convert_official

from .tiny import tiny, tokens

PREFIX = "model.layers.{}.self_attn.mask_allocator."
ARCHITECTURES = {"qwen3": "PawQwen3ForCausalLM", "llama": "PawLlamaForCausalLM"}
STREAMING = elasticore.Streaming(128, 2048)
SETTINGS = {
    "enable_ada_sparsity": True,
    "pooling_mode": "ctx_q",
    "use_softmax": True,
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "sink_size": 128,
    "local_window_size": 2000,
}


def router_of(d: int, m: int, generator: torch.Generator, logits: int = 2) -> dict[str, Tensor]:
    """One layer's router under the official names."""
    sizes = {
        "cls_feat_extractor.0": (m * d, d),
        "cls_feat_extractor.2": (d, m * d),
        "cls_router_head_agnostic.0": (m * d, d),
        "cls_router_head_agnostic.2": (d, m * d),
        "cls_router_head_agnostic.4": (logits, d),
    }
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors[f"{name}.weight"] = (
            torch.randn(rows, columns, generator=generator) * 2 / columns**0.5
        )
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator) / 20
    return tensors


def official(
    folder: Path,
    family: str = "qwen3",
    *,
    m: int = 4,
    backbone: bool = True,
    shards: int = 1,
    logits: int = 2,
    dtype: torch.dtype = torch.float32,
    drop: str | None = None,
    more: dict[str, Tensor] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Write a checkpoint; return its tensors."""
    folder.mkdir(parents=True)
    model = tiny(family)
    generator = torch.Generator().manual_seed(1)
    tensors = dict(model.state_dict()) if backbone else {}
    for layer in range(model.config.num_hidden_layers):
        for name, tensor in router_of(16, m, generator, logits).items():
            tensors[PREFIX.format(layer) + name] = tensor
        tensors[f"model.layers.{layer}.self_attn.attn_mask_log_alphas"] = torch.full((2,), 4.5)
    tensors |= {f"model.sparsity_lambda{n}_task": torch.rand(5) for n in (1, 2)}
    tensors |= {f"model.sparsity_lambda_{n}": torch.zeros(1) for n in (1, 2)}
    tensors |= more or {}
    tensors.pop(drop or "", None)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    config = {**model.config.to_dict(), "architectures": [ARCHITECTURES[family]]}
    (folder / "config.json").write_text(json.dumps({**config, **SETTINGS, **settings}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = {n: t for i, (n, t) in enumerate(tensors.items()) if i % shards == shard}
        save_file(own, folder / file)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


def official_logits(tensors: dict[str, Tensor], layer: int, pooled: Tensor) -> Tensor:
    """The official forward on pooled keys, ``[..., 2]``: class 0 sparse, class 1 full."""

    def linear(name: str, x: Tensor) -> Tensor:
        name = PREFIX.format(layer) + name
        return x @ tensors[f"{name}.weight"].double().T + tensors[f"{name}.bias"].double()

    silu = torch.nn.functional.silu
    x = linear("cls_feat_extractor.2", silu(linear("cls_feat_extractor.0", pooled.double())))
    x = silu(linear("cls_router_head_agnostic.0", x))
    x = silu(linear("cls_router_head_agnostic.2", x))
    return linear("cls_router_head_agnostic.4", x)


@pytest.mark.parametrize(
    ("family", "m", "shards", "dtype"),
    [
        ("qwen3", 4, 1, torch.float32),
        ("llama", 2, 3, torch.float32),
        ("qwen3", 6, 2, torch.bfloat16),
    ],
)
def test_the_router_decides_as_the_official_one(
    family: str, m: int, shards: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = official(tmp_path / "official", family, m=m, shards=shards, dtype=dtype)
    done = convert_official(tmp_path / "official", tmp_path / "router")
    assert isinstance(done.way.policy, elasticore.Router)
    assert (done.layers, done.way.policy.hidden_multiplier) == (3, m)
    model = elasticore.elasticize(tiny(family), done.path)  # insists on the backbone's weights
    pooled = torch.randn(500, 16, generator=torch.Generator().manual_seed(2))
    for layer, router in enumerate(elasticore.routers(model)):
        theirs = official_logits(tensors, layer, pooled)
        ours = router.logits(pooled)
        # Float64 against float32, whose sums of 96 terms below 10 round by less than 1e-4.
        torch.testing.assert_close(ours.double().flip(-1), theirs, rtol=0, atol=1e-4)
        clear = (theirs[:, 0] - theirs[:, 1]).abs() > 1e-3
        full = theirs.argmax(-1) == 1  # a tie is class 0, as argmax has it
        assert torch.equal((ours[:, 1] < ours[:, 0])[clear], full[clear])
        assert 0 < int(full.sum()) < 500


def test_the_model_routes_as_the_official_one_from_its_keys(tmp_path: Path) -> None:
    tensors = official(tmp_path / "official", "qwen3", sink_size=16, local_window_size=32)
    done = convert_official(tmp_path / "official", tmp_path / "router")
    backbone = tiny("qwen3")
    keys: list[Tensor] = []
    backbone.model.layers[0].self_attn.k_norm.register_forward_hook(lambda *a: keys.append(a[2]))
    model = elasticore.elasticize(backbone, done.path)
    one = elasticore.Pass()
    with torch.no_grad():
        model(tokens(2, 300), elastic=one)
    # First and last 100 tokens of the keys after k_norm and before rotary embedding.
    pooled = torch.cat([keys[0][:, :100], keys[0][:, -100:]], 1).mean(1)
    theirs = official_logits(tensors, 0, pooled)
    sparse = (theirs[..., 0] >= theirs[..., 1]).to(torch.int8)
    assert torch.equal(one.routings[0].decisions, sparse)


@pytest.mark.parametrize(
    ("modes", "patterns"),
    [
        (("full", "streaming"), (elasticore.Full(), STREAMING)),
        (("full", "xattn"), (elasticore.Full(), elasticore.XAttention(threshold=0.9))),
        (("xattn", "streaming"), (elasticore.XAttention(threshold=0.9), STREAMING)),
    ],
)
def test_settings_are_taken_over(
    modes: tuple[str, str], patterns: tuple[Any, Any], tmp_path: Path
) -> None:
    official(tmp_path / "official", retrieval_mode=modes[0], toggle_type=modes[1])
    done = convert_official(tmp_path / "official", tmp_path / "router")
    for way in (done.way, elasticore.Elastic.load(done.path)):
        assert (way.retrieval, way.sparse) == patterns
        assert (way.block_size, way.decode) == (128, "full")
        assert isinstance(way.policy, elasticore.Router)
        assert way.policy.boundary == 100


def test_a_checkpoint_without_backbone_needs_the_model(tmp_path: Path) -> None:
    official(tmp_path / "official", "llama", backbone=False)
    with pytest.raises(ValueError, match=r"no whole backbone.*name it with model"):
        convert_official(tmp_path / "official", tmp_path / "router")
    with pytest.raises(ValueError, match=r"family llama \(model: qwen3\)"):
        convert_official(tmp_path / "official", tmp_path / "router", model=tiny("qwen3"))
    done = convert_official(tmp_path / "official", tmp_path / "router", model=tiny("llama"))
    elasticore.elasticize(tiny("llama"), done.path)


def test_another_backbone_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    official(tmp_path / "official", "llama")
    with pytest.raises(ValueError, match="differs in weights"):
        convert_official(tmp_path / "official", tmp_path / "router", model=tiny("llama", seed=1))


NOISE = {"model.layers.1.self_attn.mask_allocator.extra.weight": torch.zeros(2)}
TASKS = {f"{PREFIX.format(0)}task_embedding.weight": torch.zeros(4, 16)}


def test_what_inference_never_reads_is_left_out_and_said(tmp_path: Path) -> None:
    official(tmp_path / "official", more=TASKS)
    done = convert_official(tmp_path / "official", tmp_path / "router")
    assert "model.layers.{i}.self_attn.mask_allocator.task_embedding.weight" in done.unread
    assert "model.layers.{i}.self_attn.attn_mask_log_alphas" in done.unread
    assert "model.sparsity_lambda1_task" in done.unread
    assert len(done.mapped) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": NOISE}, r"1 tensors that are not understood: .*mask_allocator\.extra\.weight"),
        ({"drop": PREFIX.format(2) + "cls_feat_extractor.0.bias"}, "lacks .*layers.2.*0.bias"),
        ({"num_hidden_layers": 2}, r"routers of layers \[2\]"),
        ({"logits": 1}, "sigmoid kind"),
        ({"head_dim": 8}, r"has the shapes .* head_dim 8"),
        ({"pooling_mode": "q"}, "pooling_mode 'q'"),
        ({"enable_ada_sparsity": False}, "static mask"),
        ({"toggle_type": "triangle"}, "toggle_type 'triangle'"),
        ({"architectures": ["GPT"]}, r"architectures \['GPT'\]"),
    ],
)
def test_what_is_not_understood_is_refused_and_nothing_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    official(tmp_path / "official", **changes)
    with pytest.raises(ValueError, match=message):
        convert_official(tmp_path / "official", tmp_path / "router")
    assert not (tmp_path / "router").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        convert_official(tmp_path, tmp_path / "router")
    official(tmp_path / "official", shards=2)
    (tmp_path / "official" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002"):
        convert_official(tmp_path / "official", tmp_path / "router")
