"""Train the tiny backbone from scratch: a 6.6M-parameter Qwen3 that can retrieve over 4,096 tokens.

    python -m recipes.tiny.backbone prepare          # tokenizer, training tokens, held-out samples
    python -m recipes.tiny.backbone train             # about six minutes on an H200

The text is the standard library's source. There are two kinds of steps, so that retrieval needs
full attention and text hardly does:

- full attention over short pieces of text from all over the corpus, with many facts laid in and
  many questions about them (`elasticore.eval.tasks.dense_sequence`); lengths grow to 4,096;
- streaming attention, in every head, over 4,096 contiguous tokens of text.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.data import DataLoader
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from elasticore.eval.tasks import ANSWER, CONTINUATION, TASKS, TEXT
from recipes.tiny.backbone_data import Batches, prepare
from recipes.tiny.tokenizer import VOCABULARY

LENGTH = 4096
STAGES = ((512, 0.08), (1024, 0.20), (2048, 0.45), (LENGTH, 1.01))  # length until this progress
BLOCK, SINK_BLOCKS, LOCAL_BLOCKS = 32, 1, 4  # streaming: sink 32, local 128
MODES = {"full": False, "streaming": True}
SAMPLES = 256  # held-out samples of each task
console = Console()


# ---- Model ----


def streaming_visible(query: Tensor, key: Tensor) -> Tensor:
    """Whether a query reads a key under streaming: sink blocks and the local blocks, causal."""
    row, column = query // BLOCK, key // BLOCK
    return (key <= query) & ((column < SINK_BLOCKS) | (column > row - LOCAL_BLOCKS))


@lru_cache
def streaming_mask(length: int, device: str) -> BlockMask | Tensor:
    """The mask of a layer whose heads all stream, in the form that is fast on the device."""
    if device == "cuda":
        rule = lambda b, h, q, k: streaming_visible(q, k)  # noqa: E731
        return create_block_mask(rule, None, None, length, length, device=device)
    position = torch.arange(length)
    return streaming_visible(position[:, None], position[None])


def attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention, or streaming where a mask is given; transformers' attention interface."""
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


def backbone(layers: int, hidden: int, dropout: float) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights; dropout lives in hooks, as Qwen3 has none of its own."""
    AttentionInterface.register("tiny", attention)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
        attn_implementation="tiny",  # type: ignore[call-arg]
    )
    model = Qwen3ForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".mlp")):
            module.register_forward_hook(lambda m, _, out: F.dropout(out, dropout, m.training))
        if name.endswith((".o_proj", ".down_proj")):  # residual branches start small
            torch.nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers))
    return model


def forward(model: Qwen3ForCausalLM, ids: Tensor, streaming: bool) -> Tensor:
    """Final hidden states, with every head full or every head streaming."""
    mask = streaming_mask(ids.shape[1], ids.device.type) if streaming else None
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    out = model.model(ids, attention_mask={"full_attention": mask}, position_ids=positions)
    return out.last_hidden_state


def losses(hidden: Tensor, head: Tensor, targets: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the text's tokens and of the answers' tokens."""
    logits = F.linear(hidden[:, :-1], head).flatten(0, 1).float()
    each = F.cross_entropy(logits, targets[:, 1:].flatten(), reduction="none")
    text, answer = ((roles[:, 1:].flatten() == role).float() for role in (TEXT, ANSWER))
    means = [(each * part).sum() / part.sum().clamp(min=1) for part in (text, answer)]
    return means[0], means[1]


# ---- Evaluation ----


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, held: dict[str, Any], streaming: bool, count: int, rows: int = 16
) -> dict[str, float]:
    """Exact-match accuracy of the retrieval tasks; loss of code and prose, over all and the end.

    An answer is an exact match when each of its tokens is the argmax given those before it, which
    is when greedy decoding would write it.
    """
    device = model.device
    figures: dict[str, float] = {}
    model.eval()
    for task in TASKS:
        scores: list[float] = []
        ends: list[float] = []
        for first in range(0, count, rows):
            chosen = slice(first, min(first + rows, count))
            ids = torch.from_numpy(held[task][chosen].astype(np.int64)).to(device)
            with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
                hidden = forward(model, ids, streaming)
                for row, start in enumerate(held[f"{task}.start"][chosen]):
                    start = int(start) if TASKS[task].sensitive else 1
                    logits = F.linear(hidden[row, start - 1 : -1], model.lm_head.weight).float()
                    target = ids[row, start:]
                    if TASKS[task].sensitive:
                        scores.append(float((logits.argmax(-1) == target).all()))
                    else:
                        each = F.cross_entropy(logits, target, reduction="none")
                        scores.append(each.mean().item())
                        ends.append(each[-CONTINUATION:].mean().item())
        figures[task] = float(np.mean(scores))
        if ends:
            figures[f"{task}.answer"] = float(np.mean(ends))
    model.train()
    return figures


# ---- Training ----


def train(args: argparse.Namespace) -> None:
    """Train for `--minutes`, evaluate, and write weights, tokenizer and `training.json`."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device == "cuda"
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    model = backbone(args.layers, args.hidden, args.dropout).to(device).train()  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in model.parameters())
    objective = torch.compile(losses, dynamic=False) if cuda else losses
    if cuda:
        for layer in model.model.layers:  # one compiled layer serves all of them
            layer.compile(dynamic=False)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    held = dict(np.load(args.data / "heldout.npz"))
    curve: list[dict[str, float]] = []
    step = tokens = 0
    next_look = args.look
    progress, began = 0.0, time.monotonic()
    for length, until in STAGES:
        if length > args.length or progress >= 1:
            break
        until = 1.01 if length == args.length else until
        loader = DataLoader(
            Batches(args, length), batch_size=None, num_workers=args.workers, pin_memory=cuda
        )
        for batch in loader:
            progress = (time.monotonic() - began) / (60 * args.minutes)
            if progress >= min(until, 1):
                break
            *tensors, streaming = batch
            inputs, targets, roles = (t.to(device, non_blocking=True).long() for t in tensors)
            warm = min(1.0, (step + 1) / 200)
            rate = args.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device, torch.bfloat16, cuda):
                hidden = forward(model, inputs, streaming)
                text, answer = objective(hidden, model.lm_head.weight, targets, roles)
            loss = text if streaming else args.text * text + answer
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + inputs.numel()
            if step % args.every == 0:
                row = {"step": step, "tokens": tokens, "seconds": time.monotonic() - began}
                row |= {"length": inputs.shape[1], "streaming": streaming}
                row |= {"text": text.item(), "answer": answer.item()}
                if progress >= next_look:
                    next_look = progress + args.look
                    for mode, streams in MODES.items():
                        looked = evaluate(model, held, streams, args.samples // 4)
                        row |= {f"{mode}.{task}": value for task, value in looked.items()}
                curve.append({name: round(value, 4) for name, value in row.items()})
                console.print(curve[-1], soft_wrap=True)
    seconds = time.monotonic() - began
    for parameter in model.parameters():  # judge the weights that ship
        parameter.data = parameter.data.bfloat16().float()
    final = {m: evaluate(model, held, streams, args.samples) for m, streams in MODES.items()}
    record = {
        "date": date.today().isoformat(),
        "command": command(args),
        "seed": args.seed,
        "data": json.loads((args.data / "data.json").read_text()),
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "versions": versions(),
        "parameters": parameters,
        "steps": step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "samples_per_task": args.samples,
        "length": args.length,
        "streaming": {"sink": 32, "local": 128, "block_size": BLOCK},
        "figures": final,
        "curve": curve,
    }
    save(model, args.data / "tokenizer", args.out, record, args.results)
    console.print(f"{parameters:,} parameters, {step} steps, {tokens:,} tokens, {seconds:.0f} s")
    table = Table("held out", "full", "streaming")
    for task in final["full"]:
        table.add_row(task, *(f"{final[mode][task]:.4f}" for mode in final))
    console.print(table)


def save(
    model: Qwen3ForCausalLM,
    tokenizer: Path,
    out: Path,
    record: dict[str, Any],
    results: Path | None,
) -> None:
    """Write the model in bf16 with its tokenizer and its training record."""
    model.config.use_cache = model.generation_config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    for file in tokenizer.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    if results is not None:
        short = {key: value for key, value in record.items() if key != "curve"}
        results.write_text(json.dumps(short, indent=1) + "\n")


def command(args: argparse.Namespace) -> str:
    """The command that repeats this run, without the folders of this machine."""
    shown = {k: v for k, v in vars(args).items() if k not in ("action", "data", "out", "results")}
    return " ".join(
        ["python -m recipes.tiny.backbone train", *(f"--{k} {v}" for k, v in shown.items())]
    )


def versions() -> dict[str, str]:
    """Versions of what made the weights."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=("prepare", "train"))
    parser.add_argument("--data", type=Path, default=Path(".cache/tiny"))
    parser.add_argument("--out", type=Path, default=Path("elasticore/assets/tiny/backbone"))
    parser.add_argument("--results", type=Path, help="file for the figures without the curve")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time; drives the LR")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.2, help="weight decay")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.1, help="share of text inputs replaced")
    parser.add_argument("--text", type=float, default=1.0, help="weight of text beside facts")
    parser.add_argument("--piece", type=int, default=96, help="tokens of text in one piece")
    parser.add_argument("--look", type=float, default=0.1, help="progress between evaluations")
    parser.add_argument("--streaming", type=float, default=0.5, help="share of streaming steps")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.action == "prepare":
        prepare(args.data, args.length, args.samples)
    else:
        train(args)


if __name__ == "__main__":
    main()
