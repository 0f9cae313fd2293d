"""Tables and sentences of a reproduction follow from its figures, whatever they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("recipes.tiny", reason="the recipes are not here")

import elasticore as ec
from elasticore.eval.methods import Method
from elasticore.eval.tasks import TASKS
from recipes.study import scores
from recipes.study.scores import Scorer, Static, Stretched
from recipes.tiny.plan import SENSITIVE
from recipes.tiny.sentences import answer, here, meaning, verdict
from recipes.tiny.summary import Spread, fronts, label, paired, summarise

LENGTH = 4096


def figures(accuracy: float, loss: float, msr: float, text_msr: float | None = None) -> Any:
    """Figures per task: one accuracy on retrieval, one loss and one share on each kind."""
    return {
        task: {
            "accuracy": accuracy if kind.sensitive else 0.0,
            "token_accuracy": 0.5,
            "loss": 0.0 if kind.sensitive else loss,
            "msr": msr if kind.sensitive or text_msr is None else text_msr,
            "esr": 0.9 * msr,
        }
        for task, kind in TASKS.items()
    }


def report(*groups: tuple[str, list[Any]]) -> dict[str, Any]:
    records = [
        {"group": group, "seed": seed, "length": LENGTH, "figures": one}
        for group, found in groups
        for seed, one in enumerate(found)
    ]
    return {
        "settings": {
            "length": LENGTH,
            "recipe": {"targets": dict.fromkeys(SENSITIVE, 0.75)},
        },
        "heads": 32,
        "results": summarise(records),
        "routing": {},
        "analyses": {},
        "speed": {"attention": None, "router": None, "e2e": None},
    }


FULL = ("full", [figures(1.0, 2.0, 0.0)])
STREAMING = ("streaming", [figures(0.0, 2.2, 1.0)])


def test_spread_is_the_sample_deviation() -> None:
    assert Spread.of([1.0, 2.0, 3.0]) == (2.0, 1.0, [1.0, 2.0, 3.0])
    assert Spread.of([4.0]).spread == 0


def test_every_task_weighs_the_same() -> None:
    found = report(FULL, ("elastic-t0.75", [figures(1.0, 2.1, 0.5, 1.0)]))["results"]
    own = found["elastic-t0.75"]["4096"]["all"]
    assert own["msr"]["mean"] == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)
    assert own["retrieval"]["mean"] == 1
    assert own["added_loss"]["mean"] == pytest.approx(0.05)
    assert found["full"]["4096"]["all"]["added_loss"]["mean"] == 0


def test_random_tables_are_a_best_and_a_median() -> None:
    tables = [figures(accuracy, 0, 0.8) for accuracy in (0.1, 0.4, 0.2)]
    tables = [{task: one[task] for task in SENSITIVE} for one in tables]
    found = fronts(report(FULL, ("random@elastic-t0.75", tables)))
    assert found["random, best"][0]["retrieval"]["mean"] == pytest.approx(0.4)
    assert found["random, median"][0]["retrieval"]["mean"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1, 0.12, 0.11], "ahead"),
        ([-0.1, -0.12, -0.11], "behind"),
        ([0.1, -0.1, 0.05], "level"),  # within its own spread
        ([0.001, 0.001, 0.001], "level"),  # steady, and nothing
        ([0.0], "level"),
    ],
)
def test_a_difference_is_one_only_beyond_its_spread(
    differences: list[float], expected: str
) -> None:
    assert verdict(Spread.of(differences)._asdict()) == expected


def test_the_answer_says_what_the_figures_say_whoever_is_ahead() -> None:
    def said(elastic: float, duo: float) -> str:
        found = report(
            FULL,
            STREAMING,
            ("elastic-t0.75", [figures(elastic, 2.02, 0.75)] * 2),
            ("duo", [figures(duo, 2.01, 0.75)] * 2),
        )
        return " ".join(answer(found) + meaning(found))

    assert "DuoAttention 50.0 % (elastic is ahead)" in said(0.9, 0.5)
    assert "DuoAttention 90.0 % (elastic is behind)" in said(0.5, 0.9)
    assert "(elastic is level)" in said(0.7, 0.7)
    assert "adds 1.00 % to the loss of full attention; DuoAttention 0.50 %" in said(0.7, 0.7)


def test_methods_are_compared_at_the_share_of_the_same_routers() -> None:
    found = report(
        FULL,
        ("elastic-t0.6", [figures(1.0, 2.0, 0.6)] * 3),
        ("elastic-t0.75", [figures(0.9, 2.0, 0.75)] * 3),
        ("duo", [figures(0.8, 2.0, 0.75)] * 3),
        ("duo@elastic-t0.6", [figures(0.95, 2.0, 0.6)] * 3),
    )
    rows = paired(found)
    assert [row["group"] for row in rows] == ["elastic-t0.6", "elastic-t0.75"]
    ahead = [row["methods"]["duo"]["ahead"]["mean"] for row in rows]
    assert ahead == pytest.approx([0.05, 0.1])


def test_what_was_not_measured_is_not_spoken_of() -> None:
    found = report(FULL, STREAMING)
    assert set(here(found)) <= {"speed"}
    assert "no routers" in answer(found)[0].lower()
    assert meaning(found) == []


def test_labels_name_people_and_shares() -> None:
    assert label("duo@elastic-t0.6") == "DuoAttention at Ω of elastic, t = 0.6"
    assert label("full+yarn") == "full attention, with YaRN"
    assert label("unheard-of") == "unheard-of"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(tmp_path_factory.mktemp("scores"), dtype="float32")


def test_a_score_is_kept_until_its_way_changes(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = ec.Elastic(ec.AllSparse(), sparse=ec.Streaming(32, 32))
    table = torch.zeros(8, 4, dtype=torch.bool)

    def way(table: torch.Tensor) -> Static:
        return Static("table", ec.HeadTable(table), streams)

    first = scorer.score(way(table), 192, 1, ["needle"])
    assert first["needle"]["msr"] == 0
    calls = []
    measure = scores.score
    monkeypatch.setattr(scores, "score", lambda *a, **k: calls.append(1) or measure(*a, **k))
    assert scorer.score(way(table), 192, 1, ["needle"]) == first
    assert not calls
    other = scorer.score(way(~table), 192, 1, ["needle"])
    assert calls
    assert other["needle"]["msr"] == 1


def test_a_score_is_of_its_backbone(scorer: Scorer, tmp_path: Path) -> None:
    other = tmp_path / "backbone"
    scorer.tokenizer.save_pretrained(other)
    changed = copy.deepcopy(scorer.model)
    with torch.no_grad():
        changed.get_input_embeddings().weight.zero_()
    changed.save_pretrained(other)
    full = Method("full", "full")
    first = scorer.score(full, 192, 1, ["prose"])
    second = Scorer(scorer.folder, backbone=str(other), dtype="float32")
    assert second.score(full, 192, 1, ["prose"])["prose"]["loss"] > first["prose"]["loss"]


def test_positions_are_stretched_inside_only(scorer: Scorer) -> None:
    plain = scorer.model.base_model.rotary_emb
    with Stretched(Method("full", "full"), 4.0).on(scorer.model):
        stretched = scorer.model.base_model.rotary_emb
        assert not torch.equal(stretched.inv_freq, plain.inv_freq)
        assert stretched.inv_freq[-1] == pytest.approx(float(plain.inv_freq[-1]) / 4)
    assert scorer.model.base_model.rotary_emb is plain
