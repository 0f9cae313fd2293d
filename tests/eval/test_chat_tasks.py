"""Tasks in a chat template over real texts: exact lengths, answers that are there, far or near."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elasticore.eval import chat_tasks as tasks
from elasticore.eval import texts
from elasticore.eval.chat_tasks import FAR, FAR_SHARE, NEAR, NEAR_TOKENS, ROOM, TASKS
from elasticore.eval.tasks import make_sample
from elasticore.train.data import OfflineTasks
from tests.variants import LLAMA, variant

LENGTH = 1500
WORDS = ["nation", "people", "congress", "treaty", "commerce", "river", "peace", "labour", "law"]


def _speech(seed: int) -> str:
    rng = np.random.default_rng(seed)
    sentences = []
    for number in range(120):
        words = [f"{rng.choice(WORDS)}{rng.integers(900)}" for _ in range(26)]
        sentences.append(f"Resolution {seed} {number} says " + " ".join(words) + ".")
    return " ".join(sentences)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Texts of our own in the place of those that are fetched."""
    made = {"train": tuple(map(_speech, range(4))), "heldout": tuple(map(_speech, range(4, 8)))}

    def countries(split: str) -> tuple[texts.Country, ...]:
        first = 0 if split == "train" else 100
        return tuple(
            texts.Country(
                f"Land{number}",
                tuple((f"Field {i}", f"{number}{i:03d} units of {i}") for i in range(30)),
            )
            for number in range(first, first + 40)
        )

    monkeypatch.setattr(tasks, "speeches", made.__getitem__)
    monkeypatch.setattr(tasks, "countries", countries)
    return variant(first=True, template=LLAMA)


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_exact_and_their_answers_are_where_they_are_said_to_be(
    tokenizer: Any, task: str
) -> None:
    for seed in range(3):
        sample = make_sample(task, tokenizer, LENGTH, seed, tasks=TASKS)
        again = make_sample(task, tokenizer, LENGTH, seed, tasks=TASKS)
        assert np.array_equal(sample.input_ids, again.input_ids), "the same in every run"
        assert len(sample.input_ids) == sample.stop == LENGTH
        assert 1 <= sample.stop - sample.start <= 60
        text = tokenizer.decode(sample.input_ids.tolist())
        assert text.startswith("<|endoftext|>[user]") and text.count("[assistant]") == 1
        for first, last in sample.evidence:
            assert 0 < first < last <= sample.start
            shown = tokenizer.decode(sample.input_ids[first - 1 : last + 60].tolist())
            start = sample.answer.split(",")[0].strip()[:12]
            assert start in shown, (task, sample.answer, shown)
            if task in FAR:
                assert first <= FAR_SHARE * LENGTH + ROOM
            else:
                assert first >= LENGTH - NEAR_TOKENS - 2 * ROOM


def test_far_and_near_are_told_apart_by_their_tasks() -> None:
    assert all(task.sensitive for task in FAR.values())
    assert not any(task.sensitive for task in NEAR.values())
    assert len(TASKS) == len(FAR) + len(NEAR) == 17


def test_splits_share_no_text_key_or_value(tokenizer: Any) -> None:
    answers = {
        split: {
            make_sample("needle", tokenizer, LENGTH, seed, split, TASKS).answer for seed in range(9)
        }  # type: ignore[arg-type]
        for split in ("train", "heldout")
    }
    assert not answers["train"] & answers["heldout"]
    assert make_sample("next-words", tokenizer, LENGTH, 0, "train", TASKS).answer not in "".join(
        tasks.speeches("heldout")
    )


def test_what_is_too_short_is_said(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="length=200 is too short for this task; use at least"):
        make_sample("needle", tokenizer, 200, 0, tasks=TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_in_a_chat_the_prompt_ends_with_the_turn_and_the_start_does_not_count(
    tokenizer: Any, task: str
) -> None:
    sample = make_sample(task, tokenizer, LENGTH, 1, tasks=TASKS)
    asked = tasks.as_in_chat(sample, tokenizer)
    assert np.array_equal(asked.input_ids, sample.input_ids)
    assert asked.start + asked.given == sample.start and asked.given > 0
    prompt = tokenizer.decode(asked.input_ids[: asked.start].tolist())
    assert prompt.endswith(tokenizer.decode(tasks.encode(tokenizer, tasks._frame(tokenizer)[1])))
    with pytest.raises(ValueError, match="has no turn of the chat template"):
        tasks.as_in_chat(replace(sample, start=9), tokenizer)


def test_training_on_prompts_of_a_chat_learns_the_same_tokens(tokenizer: Any) -> None:
    module = "elasticore.eval.chat_tasks"
    settings = ({"needle": 1.0, "near-needle": 1.0}, LENGTH, 12)
    given, asked = (OfflineTasks(tokenizer, *settings, module=module, chat=c) for c in (0, 0.5))
    shorter = 0
    for one, other in zip(given, asked, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        shorter += other.prompt < one.prompt
    assert 4 <= shorter <= 8
    with pytest.raises(ValueError, match=r"chat must be 0 for tasks of elasticore\.eval\.tasks"):
        OfflineTasks(tokenizer, {"needle": 1.0}, LENGTH, 1, chat=0.5)
