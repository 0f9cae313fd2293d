"""The basic suite: what is asked, what counts as right, and who can answer it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

from elasticore.eval.benchmarks.basic import MAX_NEW_TOKENS, Basic, load_basic
from elasticore.eval.evaluate import Evaluation, evaluate
from elasticore.eval.report import read_report
from elasticore.eval.tasks import TASKS
from elasticore.models.loading import load_backbone


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_backbone("tiny")[1]


def tasks_of(groups: list[Any]) -> dict[str, Basic]:
    return {task.task_name: task for group in groups for task in group}


def test_groups_are_retrieval_and_text(tokenizer: Any) -> None:
    groups = load_basic(tokenizer, [256, 512], 1)
    kinds = [(length, kind) for length in (256, 512) for kind in ("retrieval", "text")]
    assert [group.name for group in groups] == [f"basic-{n}-{kind}" for n, kind in kinds]
    assert set(tasks_of(groups)) == {f"basic-{n}-{task}" for n in (256, 512) for task in TASKS}
    assert [group.name for group in load_basic(tokenizer, [256], 1, tasks=["code"])] == [
        "basic-256-text"
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 1000])
def test_prompt_and_answer_fit_the_length(task: str, length: int, tokenizer: Any) -> None:
    (made,) = tasks_of(load_basic(tokenizer, [length], 4, tasks=[task])).values()
    assert len(made.rows) == 4
    for row in made.rows:
        prompt = made.fewshot_context(row)
        size = len(tokenizer(prompt)["input_ids"])
        assert size + MAX_NEW_TOKENS <= length
        if TASKS[task].sensitive:
            # The number is in the prompt, and the prompt ends where the answer begins.
            assert row["answer"].split()[-1] in prompt
            assert prompt.endswith(row["prefix"]) and row["prefix"].startswith("\nAnswer: ")


def test_a_chat_template_wraps_questions_but_not_text(tokenizer: Any) -> None:
    def template(turns: list[dict[str, str]]) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"

    for name, task in tasks_of(load_basic(tokenizer, [256], 1)).items():
        (row,) = task.rows
        prompt = task.fewshot_context(row, apply_chat_template=True, chat_template=template)
        if "code" in name or "prose" in name:
            assert prompt == row["prompt"]
        else:
            assert prompt.startswith("<user>") and prompt.endswith("<assistant>" + row["prefix"])
            assert "Question:" in prompt.split("<assistant>")[0]


@pytest.mark.parametrize(
    ("task", "answer", "prediction", "score"),
    [
        ("needle", " 12345", " 12345.\nMore", {"score": 1.0, "exact": 1.0}),
        ("needle", " 12345", " the number 12345", {"score": 1.0, "exact": 0.0}),
        ("needle", " 12345", " 12346", {"score": 0.0, "exact": 0.0}),
        ("needle", " 12345", "", {"score": 0.0, "exact": 0.0}),
        ("tracking", " ab1\nVAR ab1 = 12345", " ab1\nVAR ab1 = 12345\n", {"score": 1, "exact": 1}),
        ("tracking", " ab1\nVAR ab1 = 12345", " 12345", {"score": 1.0, "exact": 0.0}),
        ("tracking", " ab1\nVAR ab1 = 12345", " ab1\nVAR ab1 = 54321", {"score": 0, "exact": 0}),
        ("code", "abcd", "abcd", {"score": 1.0}),
        ("code", "abcd", "bcda", {"score": 0.75}),  # 2 * 3 / 8
        ("code", "a" * 300, "x" + "a" * 299, {"score": 2 * 299 / 600}),  # frequent characters too
        ("prose", "abcd", "", {"score": 0.0}),
    ],
)
def test_scores(task: str, answer: str, prediction: str, score: dict[str, float]) -> None:
    assert Basic(task, 256, []).score(prediction, {"answer": answer}) == score


def test_the_tiny_model_answers_and_streaming_does_not(tmp_path: Path) -> None:
    methods = ("full", "ours=router:path=tiny", "streaming:sink=32,local=64,block_size=32")
    evaluation = Evaluation(
        "tiny", ("basic:multikey",), methods, (512,), samples=3, dtype="float32", batch_size=3
    )
    found = read_report([evaluate(evaluation, tmp_path / "run")], ["score", "exact"])
    full, ours, streaming = ([*row[1:3]] for row in found.rows)
    assert found.columns[1:3] == ("basic-512-multikey", "basic-512-multikey exact")
    assert full == ours == [100.0, 100.0]
    assert streaming == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": [255]}, r"lengths \[255\] are too short"),
        (
            {"lengths": [512], "tasks": ["needles"]},
            r"\['needles'\] are unknown; use any of needle,",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=said):
        load_basic(tokenizer, samples=1, **settings)
