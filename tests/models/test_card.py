"""The model card beside saved routers: the hub can read it, its code runs, and it is the user's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

import elasticore
from elasticore import AllSparse, Elastic, HeadTable, Router, XAttention
from elasticore.assets import tiny as shipped
from elasticore.eval.methods import Method
from elasticore.models.card import CARD

from .tiny import SETTINGS, tiny


def card_of(way: Elastic, folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter of the card that is saved, and its text."""
    text = (way.save(folder) / CARD).read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def based(name: str) -> Elastic:
    base = {**elasticore.fingerprint(tiny()), "name": name}
    return Elastic(HeadTable([[1, 0]] * 3), base=base)


def test_its_code_runs_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backbone").symlink_to(shipped() / "backbone")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    elasticore.way_of(elasticore.elasticize(model, "tiny")).save(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", (tmp_path / CARD).read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert elasticore.is_elastic(names["model"])
    assert elasticore.way_of(names["model"]).to_dict() == elasticore.way_of(model).to_dict()
    assert names["tokenizer"]("def")["input_ids"]


def test_the_hub_learns_the_library_and_the_model(tmp_path: Path) -> None:
    front, body = card_of(based("someone/llama-3"), tmp_path)
    assert front["library_name"] == "elasticore"
    assert front["base_model"] == "someone/llama-3"
    assert {"sparse-attention", "llama"} <= set(front["tags"])
    assert body.count('from_pretrained("someone/llama-3"') == 2
    assert "where the model is" not in body


def test_a_model_on_disk_is_not_taken_for_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "mine", ""):
        front, body = card_of(based(name), tmp_path / f"router-{len(name)}")
        assert "base_model" not in front
        assert "To be filled in: where the model is." in body
    front, body = card_of(Elastic(AllSparse()), tmp_path / "any")
    assert "base_model" not in front and "# Routers for any model" in body


def test_it_says_what_decides_and_what_heads_read(tmp_path: Path) -> None:
    way = Elastic(Router(boundary=7), sparse=XAttention(threshold=0.5), decode="full")
    _, body = card_of(way, tmp_path)
    for told in ("`router`: boundary 7", "`full`", "threshold 0.5", "| tokens per block | 128 |"):
        assert told in body
    for heading in ("Data", "Training", "Figures", "Limits"):
        assert f"\n## {heading}\n\nTo be filled in" in body


def test_a_readme_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("mine")
    SETTINGS.save(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / CARD).symlink_to(tmp_path / "not yet there")
    SETTINGS.save(tmp_path / "link")
    assert (tmp_path / "link" / CARD).is_symlink()
    assert not (SETTINGS.save(tmp_path / "none", card=False) / CARD).exists()


def test_a_card_that_is_filled_in_is_no_other_method_of_an_evaluation(tmp_path: Path) -> None:
    SETTINGS.save(tmp_path)
    method = Method.parse(f"router:path={tmp_path}")
    before = method.digest()
    (tmp_path / CARD).write_text("filled in")
    assert method.digest() == before
