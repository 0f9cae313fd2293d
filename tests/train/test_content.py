"""What cannot be trained on is refused when it is read, with where it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from elasticore.assets import tiny
from elasticore.data import TokenSequence
from elasticore.data.layouts import Header
from elasticore.data.writer import PackedWriter
from elasticore.train import (
    JsonLines,
    LagrangianObjective,
    OfflineTasks,
    PackedSamples,
    Recipe,
    TrainingSample,
    train,
)
from elasticore.train.content import check_samples
from elasticore.train.preview import preview

from .cut_runs import trainer_in
from .test_recipe import backbone as backbone  # a fixture
from .test_recipe import settings, write


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny() / "backbone")


IDS = {"input_ids": [5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**IDS, "labels": [-100] * 4}, "every label is -100, so there is nothing to learn"),
        ({**IDS, "labels": [5, -100, -100, -100]}, "every label is -100"),  # nothing comes before
        (
            {**IDS, "labels": [6, 7, 8, -100]},
            "label 0 is 6, and token 0 is 5. They are not",
        ),
        ({**IDS, "labels": [0, 0, 7, 8]}, "label 0 is 0, and token 0 is 5"),
        ({**IDS, "labels": [-1, -1, 7, 8]}, "label 0 is -1"),
        ({**IDS, "labels": [-100, 6.5, 7, 8]}, "labels must be a list of whole numbers"),
        ({**IDS, "labels": [-100, True, 7, 8]}, "labels must be a list of whole numbers"),
        ({"input_ids": [[5, 6]], "labels": [[5, 6]]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": "567", "labels": "567"}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [5, 6, 99999], "labels": [-100, 6, 99999]}, "token 99999 is not in the"),
        ({"input_ids": [5, -6, 7], "labels": [-100, -6, 7]}, "token -6 is not in the tokenizer's"),
        ({"prompt": ["a", "b"], "answer": "c"}, "prompt must be text, got ['a', 'b']"),
        ({"prompt": None, "answer": "c"}, "prompt must be text, got None"),
        ({"prompt": "a", "answer": 12}, "answer must be text, got 12"),
        ({"prompt": "a", "answer": ""}, "answer is empty, so there is nothing to learn"),
        ({"prompt": "half \ud83d pair", "answer": "c"}, "prompt holds half of a character pair"),
        ({"task": None, "prompt": "a", "answer": "c"}, "task must be the name of a task, got None"),
        ({"task": 3, "prompt": "a", "answer": "c"}, "task must be the name of a task, got 3"),
        (["task", "prompt"], "expected a JSON object with task"),
    ],
)
def test_a_row_of_json_lines_is_refused_by_its_line(
    row: Any, says: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"task": "code", "prompt": "def f(x):\n", "answer": "    return x\n"}
    wrong = {"task": "code", **row} if isinstance(row, dict) else row
    path.write_text("\n".join(map(json.dumps, [good, wrong, good])))
    with pytest.raises(ValueError, match=rf"line 2.*{re.escape(says)}"):
        JsonLines(path, tokenizer, 100)


def test_a_file_that_is_no_utf8_is_refused_by_its_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"task": "code", "prompt": "gruen", "answer": "ja"})
    path.write_bytes(good.encode() + b"\n" + good.replace("ue", "ü").encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no UTF-8 text: .* 0xfc"):
        JsonLines(path, tokenizer, 100)
    path.write_bytes(b"\xef\xbb\xbf" + good.encode())  # as editors on Windows begin a file
    assert len(JsonLines(path, tokenizer, 100)) == 1


@pytest.mark.parametrize("text", [["a", "b"], None, 5])
def test_a_message_that_is_no_text_is_refused(text: Any, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    path.write_text(json.dumps({"task": "code", "messages": turns}))
    with pytest.raises(ValueError, match="line 1: content must be text, got"):
        JsonLines(path, tokenizer, 100)


def test_packed_tokens_outside_the_vocabulary_are_refused_by_their_row(
    tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    writer = PackedWriter(folder, Header(64, ("code",), ("mine",), None))
    for high in (50, 90_000):
        ids = np.arange(high - 20, high, dtype=np.int32)
        writer.add([TokenSequence(ids, ids, "code", "mine")])
    writer.close()
    data = PackedSamples(folder, tokenizer)
    assert len(data[0]) == 1
    with pytest.raises(ValueError, match=r"row 1, sequence 0: token 89980 is not in the"):
        data[1]


def test_samples_of_ones_own_are_checked_too() -> None:
    ids = torch.tensor([5, 6, 7])
    with pytest.raises(ValueError, match=r"labels of mine .* must be as many as its tokens: 2"):
        TrainingSample(ids, torch.tensor([-100, 6]), "code", "mine")
    with pytest.raises(ValueError, match="label 2 is 8, and token 2 is 7"):
        TrainingSample(ids, torch.tensor([-100, 6, 8]), "code", "mine")


def late(folder: Path) -> dict[str, Any]:
    """A file with a slip in the name of one task of forty."""
    rows = [
        {"task": "q" if i == 17 else "qa", "prompt": "w1 w2 " * 5, "answer": "w3"}
        for i in range(40)
    ]
    (folder / "late.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"kind": "jsonl", "path": str(folder / "late.jsonl"), "max_length": 100}


@pytest.mark.parametrize("where", ["data", "validation"])
@pytest.mark.parametrize("start", [preview, train])
def test_a_task_without_a_target_is_refused_at_the_start(
    start: Any, where: str, backbone: Path, tmp_path: Path
) -> None:
    recipe = Recipe.load(write(tmp_path, settings(backbone, **{where: late(tmp_path)})))
    arguments = () if start is preview else (tmp_path / "run",)
    with pytest.raises(ValueError, match=rf"{where} .*late.jsonl holds the tasks q, which have no"):
        start(recipe, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_ones_own_refuses_it_too(tokenizer: Any, tmp_path: Path) -> None:
    data = OfflineTasks(tokenizer, {"needle": 1, "prose": 1}, 256, 8)
    with pytest.raises(ValueError, match="train_dataset holds the tasks prose, which have no"):
        trainer_in(tmp_path / "run", data=data)


@pytest.mark.parametrize("start", [preview, train])
def test_samples_beyond_the_positions_are_refused(
    start: Any, backbone: Path, tmp_path: Path
) -> None:
    row = {"task": "qa", "prompt": "w1 " * 150, "answer": "w2"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    data = {"kind": "jsonl", "path": str(tmp_path / "long.jsonl"), "max_length": 1000}
    recipe = Recipe.load(write(tmp_path, settings(backbone, data=data)))
    arguments = () if start is preview else (tmp_path / "run",)
    says = "long.jsonl holds samples of up to 152 tokens, but the backbone has 128 positions"
    with pytest.raises(ValueError, match=says):
        start(recipe, *arguments)


def test_offline_tasks_are_tried_before_a_run(tokenizer: Any) -> None:
    targets = LagrangianObjective({"needle": 0.7, "tracking": 0.7}).tasks
    data = OfflineTasks(tokenizer, {"needle": 1, "tracking": 0.001}, 60, 8)
    with pytest.raises(ValueError, match="validation: length=60 is too short for this task"):
        check_samples("validation", data, targets)
