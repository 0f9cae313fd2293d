"""The rule by which tasks are sensitive or robust, and the levers."""

from __future__ import annotations

import pytest

from elasticore.eval.chat_tasks import TASKS
from elasticore.train import Recipe
from elasticore.train.recipe import parts_of
from recipes.smollm2.levers import CONFIG, LEVERS, summary
from recipes.smollm2.retention import kind_of


@pytest.mark.parametrize(
    ("full", "streaming", "kind"),
    [(89.5, 2.0, "sensitive"), (31.0, 1.0, ""), (49.5, 46.7, ""), (91.9, 91.4, "robust"),
     (20.0, 20.0, ""), (0.0, 0.0, ""), (60.0, 36.0, ""), (50.0, 48.6, "robust")],
)  # fmt: skip
def test_the_rule(full: float, streaming: float, kind: str) -> None:
    assert kind_of(full, streaming) == kind


def test_every_task_counts_once_in_the_means_of_a_lever() -> None:
    found = {
        "needle": {"accuracy": 0.8, "token_accuracy": 1.0, "msr": 0.5},
        "far-sentence": {"accuracy": 0.0, "token_accuracy": 0.4, "msr": 0.7},
        "kind": {"accuracy": 0.3, "token_accuracy": 1.0, "msr": 1.0},
    }
    assert summary(found, {"needle", "far-sentence"}, TASKS) == {
        "sensitive": 60.0,
        "robust": 30.0,
        "msr_sensitive": 0.6,
        "msr_robust": 1.0,
        "msr": 0.7333,
        "gap": 0.4,
    }


def test_levers_change_settings_that_there_are() -> None:
    recipe = Recipe.load(CONFIG)
    assert set(recipe.targets) == set(recipe.data["tasks"]) <= set(TASKS)
    for changes in LEVERS.values():
        changed = Recipe.load(CONFIG, changes)
        assert changes == () or changed != recipe
        parts_of(changed)
