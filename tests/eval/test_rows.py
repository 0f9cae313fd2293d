"""Files of benchmarks are checked when they are loaded: the file and the row are named."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

from elasticore.eval.benchmarks import load_longbench_e, load_longbench_v2, load_ruler
from elasticore.eval.evaluate import Evaluation, evaluate

TOKENIZER: Any = SimpleNamespace(name_or_path="somewhere/tiny", eos_token_id=0)
GOOD = {
    "input": "The number is 12345. What is it?",
    "answer_prefix": " It is",
    "outputs": ["12345"],
}
QUESTION = {
    **{"context": "a", "question": "b", "choice_A": "c", "choice_B": "d", "choice_C": "e"},
    **{"choice_D": "f", "answer": "A", "difficulty": "easy", "length": "short"},
    "domain": "Single-Document QA",
}
LONG = {"input": "", "context": "a", "answers": ["b"], "length": 5, "all_classes": None}


def ruler(folder: Path, text: str | bytes) -> list[Any]:
    file = folder / "ruler" / "tiny" / "1024" / "vt" / "validation.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_ruler(TOKENIZER, [1024], folder, ["vt"])


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (without("outputs"), "outputs is missing"),
        (without("input"), "input is missing"),
        ({**GOOD, "outputs": []}, "outputs is empty"),
        ({**GOOD, "input": ""}, "input is empty"),
        ({**GOOD, "outputs": "12345"}, "outputs must be a list of texts, got '12345'"),
        ({**GOOD, "outputs": [12345]}, r"outputs must be a list of texts, got \[12345\]"),
        ({**GOOD, "outputs": None}, "outputs is missing"),
        ({**GOOD, "input": "half \ud83d pair"}, "surrogates not allowed"),
        ([1, 2], "the row must be a mapping"),
    ],
)
def test_a_row_of_ruler_is_refused_by_its_number(row: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"validation.jsonl, row 2: .*{says}.*; make or download"):
        ruler(tmp_path, "\n".join(map(json.dumps, [GOOD, row])))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "vt/validation.jsonl holds no row; make"),
        ("\n \n", "vt/validation.jsonl holds no row; make"),
        (json.dumps(GOOD)[:20], "row 1: Unterminated string"),
        (b'{"input": "gr\xfcn"}', "vt/validation.jsonl is no UTF-8 text"),
    ],
)
def test_a_file_of_ruler_is_refused_by_its_name(text: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        ruler(tmp_path, text)


def test_a_prefix_may_be_missing(tmp_path: Path) -> None:
    for row in (GOOD, without("answer_prefix"), {**GOOD, "answer_prefix": None}):
        (group,) = ruler(tmp_path, json.dumps(row))
        (task,) = group.get_all_tasks()
        assert task.answer_prefix(task.rows[0]) == (row.get("answer_prefix") or "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "E"}, "answer must be one of A, B, C, D, got 'E'"),
        ({"difficulty": "mean"}, "difficulty must be one of easy, hard, got 'mean'"),
        ({"domain": "Law"}, "domain must be one of Single-Document QA, "),
        ({"choice_B": None}, "choice_B is missing"),
        ({"context": ""}, "context is empty"),
    ],
)
def test_a_row_of_longbench_v2_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "longbench-v2").mkdir()
    file = tmp_path / "longbench-v2" / "data.json"
    file.write_text(json.dumps([QUESTION, {**QUESTION, **change}]))
    with pytest.raises(ValueError, match=rf"data.json, row 2: {says}"):
        load_longbench_v2(TOKENIZER, 100, tmp_path)
    for text, why in (
        ("{}", "the file must be a list"),
        ("[", "Expecting value"),
        ("[]", "no row"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"data.json .*{why}"):
            load_longbench_v2(TOKENIZER, 100, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": "b"}, "answers must be a list of texts"),
        ({"length": "5"}, "length must be an int, got '5'"),
        ({"all_classes": "Food"}, "all_classes must be a list of texts, got 'Food'"),
    ],
)
def test_a_row_of_longbench_e_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "longbench").mkdir()
    file = tmp_path / "longbench" / "data.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data/qasper_e.jsonl", "\n".join(map(json.dumps, [LONG, LONG | change])))
    with pytest.raises(ValueError, match=rf"data.zip, data/qasper_e.jsonl, row 2: {says}"):
        load_longbench_e(TOKENIZER, 100, tmp_path, ["qasper"])
    file.write_bytes(file.read_bytes()[:50])  # a download that was cut off
    with pytest.raises(ValueError, match=r"data.zip is damaged: .*download data.zip"):
        load_longbench_e(TOKENIZER, 100, tmp_path, ["qasper"])


def test_nothing_is_asked_if_the_last_file_is_wrong(tmp_path: Path) -> None:
    for task, row in (("niah_single_1", GOOD), ("vt", without("outputs"))):
        file = tmp_path / "ruler" / "backbone" / "1024" / task / "validation.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(row))
    tasks = ("ruler:niah_single_1", "ruler:vt")
    evaluation = Evaluation("tiny", tasks, lengths=(1024,), data=str(tmp_path), dtype="float32")
    with pytest.raises(ValueError, match="row 1: outputs is missing"):
        evaluate(evaluation, tmp_path / "run")
    assert not (tmp_path / "run").exists()
