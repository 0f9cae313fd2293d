"""Samples and batches: what is learnt is exactly what was marked, padded or packed."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore.data import Encoder, Example, Span, TokenSequence
from elasticore.data.encoding import fingerprint
from elasticore.data.layouts import Header
from elasticore.data.writer import PackedWriter
from elasticore.eval.tasks import Task
from elasticore.train import Collator, JsonLines, OfflineTasks, PackedSamples, TrainingSample
from tests.variants import LLAMA, QWEN, variant


def sample(length: int, learnt: int, task: str = "a", start: int = 0) -> TrainingSample:
    ids = torch.arange(start, start + length)
    labels = torch.full_like(ids, -100)
    labels[length - learnt :] = ids[length - learnt :]
    return TrainingSample(ids, labels, task)


class Words:
    """A stand-in for a tokenizer: one token per word, its length."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [len(word) for word in text.split()]
        return {"input_ids": [99, *ids] if add_special_tokens else ids}

    def __len__(self) -> int:
        return 100

    def get_vocab(self) -> dict[str, int]:
        return {"x" * length: length for length in range(100)}


def test_equal_lengths_need_no_mask() -> None:
    batch = Collator(("a", "b"))([sample(6, 2), sample(6, 1, "b")])
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == (2, 6)
    assert batch["task_ids"].tolist() == [0, 1]


def test_shorter_rows_are_padded_on_the_right_and_masked() -> None:
    batch = Collator(("a",), pad_token_id=7)([sample(4, 1), sample(6, 1)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["input_ids"][0].tolist() == [0, 1, 2, 3, 7, 7]
    assert batch["labels"][0].tolist() == [-100, -100, -100, 3, -100, -100]


def test_token_weights_are_equal_and_sample_weights_are_per_sample() -> None:
    both = [sample(6, 4), sample(6, 1)]
    tokens = Collator(("a",))(both)["loss_weights"]
    assert tokens[tokens > 0].tolist() == pytest.approx([1 / 5] * 5)
    samples = Collator(("a",), reduction="samples")(both)["loss_weights"]
    assert samples.sum(1).tolist() == pytest.approx([0.5, 0.5])
    assert samples[1].max() == 0.5


def test_packing_never_predicts_a_sequence_from_the_one_before_it() -> None:
    batch = Collator(("a",), packed=True)([sample(3, 3), sample(2, 2, start=10)])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 1, 2, -100, 11]]
    assert batch["loss_weights"][0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])


@given(
    lengths=st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=5),
    packed=st.booleans(),
    reduction=st.sampled_from(["tokens", "samples"]),
)
def test_weights_sum_to_one_and_every_learnt_token_has_the_one_before_it(
    lengths: list[tuple[int, int]], packed: bool, reduction: str
) -> None:
    rows = [sample(n, min(k, n - 1)) for n, k in lengths]
    batch = Collator(("a",), packed=packed, reduction=reduction)(rows)  # type: ignore[arg-type]
    assert float(batch["loss_weights"].sum()) == pytest.approx(1)
    before = batch["predicting"]
    assert len(before) == int((batch["labels"] != -100).sum())
    # Tokens of these samples count up, so what predicts a token is that token less one.
    predicted = batch["labels"].flatten()[before + 1]
    assert torch.equal(batch["input_ids"].flatten()[before], predicted - 1)


def test_a_task_without_a_target_is_named() -> None:
    with pytest.raises(ValueError, match=r"samples hold the tasks \['b'\]"):
        Collator(("a",))([sample(3, 1, "b")])


def test_json_lines_reads_texts_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"task": "a", "prompt": "one three", "answer": "x"},
        {"task": "b", "input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    data = JsonLines(path, Words(), max_length=10)
    assert len(data) == 2
    assert data[0].input_ids.tolist() == [99, 3, 5, 1, 0]
    assert data[0].labels.tolist() == [-100, -100, -100, 1, 0]
    assert data[1].task == "b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected a JSON object"),
        ('{"task": "a"}', "line 1: expected a JSON object"),
        ('{"task": "a", "input_ids": [1, 2], "labels": [1]}', "2 input_ids but 1 labels"),
        ('{"task": "a", "input_ids": [1], "labels": [1]}', "1 tokens; accepted are 2 to 4"),
        ('{"task": "a", "prompt": "a b c", "answer": "d"}', "6 tokens; accepted are 2 to 4"),
        ("", "holds no sample"),
    ],
)
def test_json_lines_says_where_a_file_is_wrong(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        JsonLines(path, Words(), max_length=4)


def rows_of(folder: Path, tokenizer: object, *rows: dict[str, object]) -> JsonLines:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return JsonLines(path, tokenizer, max_length=200)


def test_a_prompt_ends_where_learning_begins() -> None:
    assert sample(6, 2).prompt == 4
    # Plain text has no answer, whether or not its first token counts as learnt.
    assert sample(6, 6).prompt == sample(6, 5).prompt == sample(6, 0).prompt == 6
    ids = torch.arange(6)
    assert TrainingSample(ids, ids, "a", prompt=3).prompt == 3
    with pytest.raises(ValueError, match="prompt must be from 0 to the sample's 6 tokens: 7"):
        TrainingSample(ids, ids, "a", prompt=7)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_says_how_long_its_prompts_are(packed: bool) -> None:
    batch = Collator(("a",), packed=packed)([sample(6, 2), sample(9, 1), sample(3, 3)])
    assert batch["prompt"].dtype == torch.int64
    assert batch["prompt"].tolist() == [4, 8, 3]


def test_conversations_are_tokenized_as_data_build_does_it(tmp_path: Path) -> None:
    tokenizer = variant(template=QWEN)
    turns = [("user", "One?"), ("assistant", "1"), ("user", " Two? <|pad|>"), ("assistant", "2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = rows_of(
        tmp_path,
        tokenizer,
        {"task": "a", "messages": messages[2:]},
        {"task": "a", "messages": messages},
    )
    built = Encoder(tokenizer)(Example(" Two? <|pad|>", "2", "a"), "mine")
    assert built is not None
    assert data[0].input_ids.tolist() == built.input_ids.tolist()
    assert data[0].labels.tolist() == built.labels.tolist()
    assert data[0].prompt == built.prompt
    # Of several turns the last one is the answer.
    assert tokenizer.decode(data[1].input_ids[: data[1].prompt]).startswith("[user]\nOne?<|endof")
    assert tokenizer.decode(data[1].input_ids[data[1].prompt :]) == "2<|endoftext|>"


def test_a_rendered_prompt_gets_no_second_first_token(tmp_path: Path) -> None:
    tokenizer = variant(first=True, last=True, template=LLAMA)
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    data = rows_of(
        tmp_path,
        tokenizer,
        {"task": "a", "messages": messages},
        {"task": "a", "prompt": text, "answer": "1"},
    )
    assert data[0].input_ids.tolist() == data[1].input_ids.tolist()
    assert data[0].prompt == data[1].prompt
    first, second = data[1].input_ids[:2].tolist()
    assert first == tokenizer.eos_token_id != second


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "One?", "answer": "1"}, "no end-of-text token, which .*line 1 needs after"),
        ({"messages": [{"role": "user", "content": "One?"}]}, "line 1: messages must end with"),
        ({"messages": [{"role": "user"}] * 2}, "line 1: messages must end with"),
        ({"messages": ["a", "b"]}, "line 1: expected a JSON object"),
        (
            {"messages": [{"role": r, "content": ""} for r in ("user", "assistant")]},
            "line 1: the last message is empty",
        ),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, variant(end=False, template=QWEN), {"task": "a", **row})  # type: ignore[dict-item]


def test_a_packed_prompt_ends_at_the_first_answer(tmp_path: Path) -> None:
    """Whatever is learnt; without an answer's span it ends where learning begins."""
    ids = np.arange(12, dtype=np.int32)
    late = np.where(ids < 9, np.int32(-100), ids)
    spans = (Span("evidence", 1, 3), Span("answer", 8, 12), Span("answer", 4, 6))
    writer = PackedWriter(tmp_path, Header(50, ("a",), ("mine",), fingerprint(Words())))
    writer.add(
        [
            TokenSequence(ids, ids, "a", "mine", spans),
            TokenSequence(ids, late, "a", "mine"),
            TokenSequence(ids, ids, "a", "mine"),
        ]
    )
    writer.close()
    assert [one.prompt for one in PackedSamples(tmp_path, Words())[0]] == [4, 9, 12]


def test_offline_samples_begin_as_every_text_of_the_model_does() -> None:
    plain, first = (
        OfflineTasks(made, {"needle": 1, "code": 1}, 512, 4)
        for made in (variant(), variant(first=True, last=True))
    )
    for a, b in ((plain[i], first[i]) for i in range(4)):
        assert len(a.input_ids) == len(b.input_ids) == 512
        assert b.input_ids[0] == first.tokenizer.eos_token_id != a.input_ids[0]
        assert torch.equal(a.input_ids[a.prompt :], b.input_ids[b.prompt :])


def test_json_lines_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        JsonLines(tmp_path / "nowhere.jsonl", Words(), max_length=4)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"unheard": 1}}, "tasks"),
        ({"tasks": {"code": 0}}, "tasks"),
        ({"length": 0}, "length"),
        ({"samples": True}, "samples"),
    ],
)
def test_offline_tasks_name_the_bad_argument(settings: dict[str, object], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        OfflineTasks(None, **{"tasks": {"code": 1.0}, "length": 64, "samples": 4, **settings})  # type: ignore[arg-type]


def packed(folder: Path, tokenizer: object) -> Path:
    """Two rows: sequences of 5 and 3 tokens, and one of 4; the last two tokens are answers."""
    folder.mkdir()
    writer = PackedWriter(folder, Header(8, ("a", "b"), ("mine",), fingerprint(tokenizer)))
    for row in ([(5, 10, "a"), (3, 20, "b")], [(4, 30, "a")]):
        sequences = []
        for length, start, task in row:
            ids = np.arange(start, start + length, dtype=np.int32)
            labels = np.where(np.arange(length) < length - 2, np.int32(-100), ids)
            spans = (Span("answer", length - 2, length),)
            sequences.append(TokenSequence(ids, labels, task, "mine", spans))
        writer.add(sequences)
    writer.close()
    return folder


def test_packed_rows_keep_the_boundaries_of_their_sequences(tmp_path: Path) -> None:
    data = PackedSamples(packed(tmp_path / "data", Words()), Words())
    assert len(data) == 2
    assert data.tasks == ("a", "b")
    batch = Collator(("b", "a"), packed=True)([data[0], data[1]])
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 12]
    assert batch["max_length_q"] == 5
    assert batch["input_ids"].tolist() == [[*range(10, 15), *range(20, 23), *range(30, 34)]]
    assert batch["position_ids"].tolist() == [[*range(5), *range(3), *range(4)]]
    assert batch["task_ids"].tolist() == [1, 0, 1]
    assert batch["labels"][0].tolist() == [*[-100] * 3, 13, 14, -100, 21, 22, -100, -100, 32, 33]
    assert batch["predicting"].tolist() == [2, 3, 5, 6, 9, 10]


def test_packed_rows_make_the_batch_that_their_samples_make(tmp_path: Path) -> None:
    data = PackedSamples(packed(tmp_path / "data", Words()), Words())
    rows = [data[index] for index in range(len(data))]
    for collator in (Collator(("a", "b"), packed=True), Collator(("a", "b"))):
        together, apart = collator(rows), collator([one for row in rows for one in row])
        assert together.keys() == apart.keys()
        assert all(
            torch.equal(torch.as_tensor(together[k]), torch.as_tensor(apart[k]))
            for k in set(apart) - {"origins"}
        )


def test_packed_rows_reach_loader_processes(tmp_path: Path) -> None:
    data = PackedSamples(packed(tmp_path / "data", Words()), Words())
    data[1]  # a row group is held here already
    loader = torch.utils.data.DataLoader(
        data, batch_size=1, collate_fn=Collator(("a", "b"), packed=True), num_workers=1
    )
    assert [batch["cu_seq_lens_q"].tolist() for batch in loader] == [[0, 5, 8], [0, 4]]


def test_packed_data_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    class Other(Words):
        def get_vocab(self) -> dict[str, int]:
            return {"y" * length: length for length in range(100)}

    path = packed(tmp_path / "data", Other())
    with pytest.raises(ValueError, match="whose tokens are not those of the backbone"):
        PackedSamples(path, Words())


def test_tasks_of_a_module_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("own_tasks")

    def build(tokenizer: Any, rng: Any, length: int, split: str) -> Any:
        return np.arange(length), length - 2, ()

    own.TASKS = {"count": Task(True, build)}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_tasks", own)
    tokenizer = types.SimpleNamespace(decode=lambda ids: "text")
    data = OfflineTasks(tokenizer, {"count": 1}, 8, 2, module="own_tasks")
    pickle.dumps(OfflineTasks(None, {"count": 1}, 8, 2, module="own_tasks"))  # for workers
    assert data[1].input_ids.tolist() == list(range(8)) and data[1].prompt == 6
    with pytest.raises(ValueError, match="tasks must name some of count, got"):
        OfflineTasks(None, {"needle": 1}, 8, 2, module="own_tasks")
    with pytest.raises(ValueError, match="module 'nowhere' has no TASKS"):
        OfflineTasks(None, {"needle": 1}, 8, 2, module="nowhere")
