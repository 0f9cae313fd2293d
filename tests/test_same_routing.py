"""A prompt is routed in one way: in training, validation, generation, evaluation and `run`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments
from typer.testing import CliRunner

import elasticore as ec
from elasticore.assets import tiny
from elasticore.cli import app
from elasticore.data import Encoder, Example, TokenSequence
from elasticore.data.encoding import fingerprint
from elasticore.data.layouts import Header
from elasticore.data.writer import PackedWriter
from elasticore.eval.tasks import Sample
from elasticore.eval.teacher_forced import score
from elasticore.models.loading import load_backbone
from elasticore.train import Collator, JsonLines, LagrangianObjective, PackedSamples, RouterTrainer
from tests.variants import LLAMA, QWEN, variant

QUESTIONS = {
    "Which words stand here? alpha beta gamma delta epsilon zeta eta theta " * 3: "the Greek ones",
    "def add(a, b):\n    return a + b\n\n\nWhat does this do? ": "It adds. " * 30,
    "Say yes.": "yes",
}


@pytest.fixture(params=[LLAMA, QWEN], ids=["a first token", "thinking"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A backbone and routers that decide by both ends of a prompt, close to even odds."""
    folder = tmp_path / "backbone"
    shutil.copytree(tiny() / "backbone", folder)
    variant(first=request.param is LLAMA, template=request.param).save_pretrained(folder)
    model, _ = load_backbone(str(folder), "float32")
    way = ec.Elastic(ec.Router(boundary=16), sparse=ec.Streaming(32, 32), block_size=32)
    torch.manual_seed(0)
    ec.elasticize(model, way)
    for router in ec.routers(model):
        for parameter in router.parameters():
            parameter.data.normal_(0, 0.5)
    ec.way_of(model).save(tmp_path / "router")
    return tmp_path


def test_a_prompt_is_routed_alike_everywhere(place: Path) -> None:
    model, tokenizer = load_backbone(str(place / "backbone"), "float32")
    ec.elasticize(model, place / "router")
    samples, rows = training_data(place, tokenizer)
    prompts = [one.input_ids[: one.prompt] for one in samples]
    expected = [decided(lambda p=p: model(p[None], use_cache=False)) for p in prompts]
    assert 0.1 < float(torch.stack(expected).double().mean()) < 0.9
    assert len({tuple(one.flatten().tolist()) for one in expected}) == len(prompts)
    # Routers that saw the answers would decide otherwise.
    whole = [decided(lambda s=s: model(s.input_ids[None], use_cache=False)) for s in samples]
    assert not torch.equal(torch.cat(whole), torch.cat(expected))

    together = torch.cat(expected, 1)
    trainer = trainer_of(model, samples, place)
    for collator, batch in (
        (Collator(("a",)), samples),
        (Collator(("a",), packed=True), samples),
        (Collator(("a",), packed=True), rows),
    ):
        inputs = collator(batch)
        assert torch.equal(
            decided(lambda i=inputs: trainer.compute_loss(model.eval(), i)), together
        )
    with ec.record() as trace:
        trainer.evaluate()
    assert torch.equal(torch.cat([one.decisions for one in trace.passes], 1), together)

    for prompt, own in zip(prompts, expected, strict=True):
        one = prompt[None]
        assert torch.equal(decided(lambda o=one: model.generate(o, max_new_tokens=2)), own)
    assert torch.equal(decided(lambda: generated(model, prompts)), together)
    scored = [
        Sample("a", s.input_ids.numpy(), s.prompt, len(s.input_ids), "", True) for s in samples
    ]
    with ec.record() as trace:
        score(model, scored)
    found = [one.decisions for one in trace.passes if one.decided]
    order = sorted(range(3), key=lambda i: samples[i].prompt)
    assert torch.equal(torch.cat(found, 1), together[:, order])

    for question, own in zip(QUESTIONS, expected, strict=True):
        text = place / "prompt.txt"
        text.write_text(question, encoding="utf-8")
        command = ["run", "--model", str(place / "backbone"), "--router", str(place / "router")]
        command += ["--prompt-file", str(text), "--chat", "--max-new-tokens", "1", "--json"]
        result = CliRunner().invoke(app, [*command, "--dtype", "float32"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["decisions"] == own[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_evaluation_routes_as_training_does(place: Path, batch_size: int) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")
    from elasticore.eval.benchmarks.task import Rendered
    from elasticore.eval.journal import Journal
    from elasticore.eval.language_model import ElasticLM

    model, tokenizer = load_backbone(str(place / "backbone"), "float32")
    ec.elasticize(model, place / "router")
    samples, _ = training_data(place, tokenizer)
    inputs = Collator(("a",))(samples)
    trainer = trainer_of(model, samples, place)
    expected = decided(lambda: trainer.compute_loss(model.eval(), inputs))
    lm = ElasticLM(model, tokenizer, Journal(place / "answers.jsonl"), batch_size=batch_size)
    settings = {"until": [], "do_sample": False, "max_gen_toks": 2}
    turns = [[{"role": "user", "content": text.strip()}] for text in QUESTIONS]
    requests = [
        Rendered("generate_until", {}, (lm.apply_chat_template(turn), settings), 0, ("a", i, 1))
        for i, turn in enumerate(turns)
    ]
    lm.generate_until(requests)
    for entry in lm.journal.entries():
        own = expected[:, entry.document].tolist()
        assert entry.measures.decisions == tuple("".join(map(str, layer)) for layer in own)
        assert entry.measures.prompt_tokens == samples[entry.document].prompt


def training_data(place: Path, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """The questions as rows of JSON lines and as one packed row: the same samples."""
    lines = [
        {
            "task": "a",
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
        }
        for question, answer in QUESTIONS.items()
    ]
    file = place / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    written = JsonLines(file, tokenizer, 1000)
    samples = [written[i] for i in range(len(written))]
    encoder = Encoder(tokenizer, loss="all")  # the prompt is told by its span, not by its labels
    folder = place / "packed"
    folder.mkdir()
    writer = PackedWriter(folder, Header(2000, ("a",), ("mine",), fingerprint(tokenizer)))
    examples = [Example(question, answer, "a") for question, answer in QUESTIONS.items()]
    sequences = [encoder(one, "mine") for one in examples]
    writer.add([one for one in sequences if isinstance(one, TokenSequence)])
    writer.close()
    rows = [PackedSamples(folder, tokenizer)[0]]
    for one, other in zip(samples, rows[0], strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert one.prompt == other.prompt
    return samples, rows


def trainer_of(model: Any, samples: list[Any], place: Path) -> RouterTrainer:
    args = TrainingArguments(
        output_dir=str(place / "run"),
        per_device_eval_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        prediction_loss_only=True,
    )
    objective = LagrangianObjective({"a": 0.7})
    return RouterTrainer(model, args, objective, train_dataset=samples, eval_dataset=samples)  # type: ignore[arg-type]


def generated(model: Any, prompts: list[Tensor]) -> None:
    """All prompts in a batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=1) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    model.generate(ids, attention_mask=mask, max_new_tokens=2)


def decided(run: Any) -> Tensor:
    """What the first pass of ``run`` decided, int8 ``[layers, sequences, KV heads]``."""
    with torch.no_grad(), ec.record() as trace:
        run()
    return trace.passes[0].decisions
