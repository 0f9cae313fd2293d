"""Analyses of the reproduction: retrieval heads, sparsification, similarity, curves, examples."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

import elasticore as ec
from elasticore.eval.analysis import (
    progressive_sparsification,
    retrieval_scores,
    router_activations,
    task_similarity,
)
from elasticore.eval.methods import Method
from elasticore.eval.tasks import TASKS, Sample
from elasticore.train import Recipe
from elasticore.train.curves import read_curves, to_json
from elasticore.train.recipe import parts_of
from recipes.study.runs import Run, Trainings, console
from recipes.study.scores import Scorer, identity, streaming
from recipes.tiny.plan import Size, main_target, router

__all__ = ["analyse"]

QUESTION = 60  # tokens of a prompt's end that an example shows


def analyse(
    trainings: Trainings, scorer: Scorer, size: Size, trained: Sequence[Run], failed: list[Any]
) -> dict[str, Any]:
    """All analyses by name; each is kept in a file, and one that fails is noted.

    A file counts if it is of the same trainings and settings.
    """
    recipe = Recipe.load(trainings.config, trainings.common)
    streams = streaming(parts_of(recipe).way)
    group = f"elastic-t{main_target(recipe):g}"
    main = [run for run in trained if run.group == group]
    samples = [
        sample
        for task in TASKS
        for sample in scorer.samples(task, size.length, size.analysis_samples)
    ]
    parts: dict[str, Callable[[], Any]] = {
        "sparsification": lambda: sparsification(scorer, samples, streams, size),
    }
    ways = [Method("full", "full"), *(router(trainings, run) for run in main[:1])]
    ways += [router(trainings, run) for run in trained if (run.group, run.seed) == ("duo", 0)]
    about = {
        "ways": [identity(way) for way in (*ways, *(router(trainings, run) for run in main[1:]))],
        "backbone": scorer.weights,
        "streams": streams.to_dict(),
        "length": size.length,
        "samples": size.analysis_samples,
        "ratios": list(size.ratios),
        "dtype": scorer.dtype,
    }
    if main:
        parts["similarity"] = lambda: similarity(scorer, samples, router(trainings, main[0]))
        parts["curves"] = lambda: curves(trainings, main)
        parts["examples"] = lambda: examples(scorer, samples, ways)
    found = {}
    for name, part in parts.items():
        file = trainings.folder / "analyses" / f"{name}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("about") != about:
            try:
                result = part()
            except Exception as error:  # the others are worth having
                text = "".join(traceback.format_exception(error)[-4:])
                console.print(f"[red]{name} failed[/]")
                console.print(text, markup=False, highlight=False)
                failed.append({"name": name, "text": text})
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = json.loads(json.dumps({"about": about, "result": result}))
            file.write_text(json.dumps(kept), encoding="utf-8")
        found[name] = kept["result"]
    return found


def sparsification(
    scorer: Scorer, samples: Sequence[Sample], streams: ec.Elastic, size: Size
) -> dict[str, Any]:
    """Retrieval scores (Eq. 9), and each task as head after head turns sparse (C.2, Figure 2)."""
    needles = [sample for sample in samples if sample.task == "needle"]
    scores = retrieval_scores(scorer.model, needles)
    steps = progressive_sparsification(
        scorer.model,
        samples,
        scores.kv_heads,
        ratios=size.ratios,
        way=streams,
        batch_size=max(1, scorer.batch_tokens // size.length),
        step=lambda text: console.print(text, highlight=False),
    )
    return {
        "heads": scores.heads.tolist(),
        "kv_heads": scores.kv_heads.tolist(),
        "layers": list(scores.layers),
        "steps": [step.row() for step in steps],
    }


def similarity(scorer: Scorer, samples: Sequence[Sample], way: Method) -> dict[str, Any]:
    """How alike tasks look to the first router, before and after its task MLP (Figures 5 and 9)."""
    with way.on(scorer.model):
        activations = router_activations(scorer.model, samples)
    matrices = {
        f"{place}, {measure}": task_similarity(vectors, rescaled=measure == "rescaled").tolist()
        for measure in ("cosine", "rescaled")
        for place, vectors in activations._asdict().items()
    }
    return {"tasks": list(activations.before), "matrices": matrices}


def curves(trainings: Trainings, runs: Sequence[Run]) -> dict[str, Any]:
    """What the trainings logged (Figure 13); the entropy as its mean over the layers."""
    found = to_json(one for run in runs for one in read_curves(trainings.path(run)))
    for run, entry in zip(runs, found["runs"], strict=True):
        entry["name"] = run.name
        entry["history"] = [
            {key: value for key, value in log.items() if not key.startswith("entropy/")}
            for log in entry["history"]
        ]
    return found


@torch.no_grad()
def examples(
    scorer: Scorer, samples: Sequence[Sample], ways: Sequence[Method]
) -> list[dict[str, Any]]:
    """One prompt of two tasks, and what each way to attend writes (as in Figures 15 to 17)."""
    chosen = [next(s for s in samples if s.task == task) for task in ("multikey", "tracking")]
    found = []
    for sample in chosen:
        prompt = torch.as_tensor(sample.input_ids[: sample.start], device=scorer.model.device)
        answers = {}
        for way in ways:
            with way.on(scorer.model), ec.use_backend(scorer.backend):
                new = scorer.model.generate(
                    prompt[None],
                    attention_mask=torch.ones_like(prompt)[None],
                    max_new_tokens=sample.stop - sample.start,
                    do_sample=False,
                )
            answers[way.name] = scorer.tokenizer.decode(new[0, sample.start :].tolist())
        facts = [
            scorer.tokenizer.decode(sample.input_ids[a:b].tolist()) for a, b in sample.evidence
        ]
        question = scorer.tokenizer.decode(prompt[-QUESTION:].tolist())
        found.append(
            {
                "task": sample.task,
                "facts": facts,
                "question": question,
                "expected": sample.answer,
                "answers": answers,
            }
        )
    return found
