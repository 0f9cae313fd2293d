"""Packed parquet gives back what was written, in any order, and never a damaged row."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticore.data import TASKS, PackedParquet, Span, TokenSequence, writer
from elasticore.data.layouts import KEY, Header
from elasticore.data.writer import PackedWriter

HEADER = Header(64, TASKS, ("one", "two"), {"name": "words", "vocabulary": "abc"})


@st.composite
def sequences(draw: Any) -> TokenSequence:
    ids = np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12)), np.int32)
    learnt = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    bounds = st.integers(0, len(ids))
    spans = draw(st.lists(st.tuples(st.sampled_from(["answer", "evidence"]), bounds, bounds)))
    return TokenSequence(
        ids,
        np.where(learnt, ids, np.int32(-100)),
        draw(st.sampled_from(HEADER.tasks)),
        draw(st.sampled_from(HEADER.sources)),
        tuple(Span(kind, min(a, b), max(a, b)) for kind, a, b in spans),
    )


rows = st.lists(st.lists(sequences(), min_size=1, max_size=4), min_size=1, max_size=7)


def write(folder: Path, content: list[list[TokenSequence]], header: Header = HEADER) -> Path:
    """Rows in row groups of about 20 tokens and files of about 40."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "GROUP_TOKENS", 20)
        patch.setattr(writer, "FILE_TOKENS", 40)
        out = PackedWriter(folder, header)
        for row in content:
            out.add(row)
        out.close()
    return folder


def plain(row: list[TokenSequence]) -> list[Any]:
    return [
        (one.input_ids.tolist(), one.labels.tolist(), one.task, one.source, one.spans)
        for one in row
    ]


def some(count: int = 6) -> list[list[TokenSequence]]:
    """Rows of two sequences of 8 and 4 tokens, with an answer at the end of each."""
    made = []
    for number in range(count):
        row = []
        for length, task, source in ((8, "code", "one"), (4, "single_qa", "two")):
            ids = np.arange(length, dtype=np.int32) + 100 * number
            spans = (Span("answer", length - 2, length), Span("evidence", 1, 3))
            row.append(TokenSequence(ids, ids, task, source, spans))
        made.append(row)
    return made


@settings(max_examples=40)
@given(content=rows, data=st.data())
def test_rows_come_back_as_they_were_in_any_order(tmp_path, content, data):
    read = PackedParquet(write(tmp_path / "data", content))
    assert read.header == HEADER
    assert [plain(row) for row in read] == [plain(row) for row in content]
    assert len(read) == len(content)
    order = data.draw(st.permutations(range(len(content))))
    assert [plain(read[index]) for index in order] == [plain(content[index]) for index in order]
    assert set(read.tasks) == {one.task for row in content for one in row}


def test_sequences_lie_one_after_the_other_between_the_boundaries(tmp_path):
    folder = write(tmp_path / "data", some())
    table = pa.concat_tables(pq.read_table(file) for file in sorted(folder.iterdir()))
    first = table.to_pylist()[0]
    assert first["cu_seqlens"] == [0, 8, 12]
    assert first["input_ids"] == [*range(8), *range(4)]
    assert first["task_ids"] == [TASKS.index("code"), TASKS.index("single_qa")]
    assert first["spans"][2] == {"sequence": 1, "kind": "answer", "start": 2, "stop": 4}
    about = json.loads(table.schema.metadata[KEY])
    assert (about["format"], about["version"]) == ("elasticore.packed", 1)
    assert about["tasks"] == list(TASKS)


def test_getting_a_row_reads_its_row_group_only(tmp_path, monkeypatch):
    read = PackedParquet(write(tmp_path / "data", some(8)))
    places: list[int] = []
    original = PackedParquet._read
    monkeypatch.setattr(
        PackedParquet,
        "_read",
        lambda self, place, columns: places.append(place) or original(self, place, columns),
    )
    assert len(read._groups) == 4
    for index in (0, 1, 6, 7):
        read[index]
    assert places == [0, 3]
    with pytest.raises(IndexError):
        read[8]


def test_a_reader_can_be_sent_to_another_process(tmp_path):
    read = PackedParquet(write(tmp_path / "data", some()))
    read[0]
    again = pickle.loads(pickle.dumps(read))
    assert plain(again[5]) == plain(read[5])


def test_labels_can_be_put_on_the_answers_whatever_is_stored(tmp_path):
    folder = write(tmp_path / "data", some())
    row = PackedParquet(folder, loss="answer")[0]
    assert row[0].labels.tolist() == [-100] * 6 + [6, 7]
    with pytest.raises(ValueError, match="loss must be 'stored' or 'answer'"):
        PackedParquet(folder, loss="none")


# ---- The official code's layout ----


def official_rows() -> list[dict[str, Any]]:
    """As its packing writes them: all tokens are labels but the first, ranges name last tokens."""
    return [
        {
            "input_ids": [*range(10, 16), *range(20, 24)],
            "labels": [-100, *range(11, 16), -100, *range(21, 24)],
            "seq_lengths": [0, 6, 10],
            "task_ids": [1, 5],
            "task_type": ["MultiHop QA", "Other"],
            "range_ids": [[0, 0, 0, 3, 0, 3, 4, 5], [0, 0, 0, 1, 0, 1, 2, 3]],
        },
        {
            "input_ids": [1, 2, 3],
            "labels": [-100, 2, 3],
            "seq_lengths": [0, 3],
            "task_ids": [3],
            "task_type": ["Code"],
            "range_ids": [[0, 0, 0, 1, 0, 1, 2, 2]],
        },
    ]


def write_official(path: Path, content: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(content), path)
    return path


@pytest.mark.parametrize("as_folder", [False, True])
def test_official_files_are_read(tmp_path, as_folder):
    path = write_official(tmp_path / "demo_packed_maxseq65536.parquet", official_rows())
    read = PackedParquet(tmp_path if as_folder else path)
    assert read.layout == "official"
    assert read.tasks == ("multihop_qa", "code", "other")
    assert read.header.tokenizer is None
    assert plain(read[0]) == [
        (
            [*range(10, 16)],
            [-100, *range(11, 16)],
            "multihop_qa",
            "official",
            (Span("answer", 4, 6),),
        ),
        ([*range(20, 24)], [-100, 21, 22, 23], "other", "official", (Span("answer", 2, 4),)),
    ]
    assert read[1][0].task == "code"


def test_the_answers_of_official_files_can_be_learnt_alone(tmp_path):
    path = write_official(tmp_path / "a.parquet", official_rows())
    row = PackedParquet(path, loss="answer")[0]
    assert [one.labels.tolist() for one in row] == [
        [-100, -100, -100, -100, 14, 15],
        [-100, -100, 22, 23],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_ids": [1, 6]}, r"task ids \[6\] are out of range: there are 6"),
        ({"seq_lengths": [0, 6, 11]}, r"the boundaries \[0, 6, 11\] do not divide its 10 tokens"),
        ({"seq_lengths": [0, 0, 10]}, "do not divide"),
        ({"seq_lengths": []}, "do not divide"),
        ({"seq_lengths": [0, 10]}, "1 sequences, 2 tasks"),
        ({"labels": [1]}, "10 input_ids, but 1 labels"),
        ({"range_ids": [[0, 0, 0, 3, 0, 3, 4, 6]] * 2}, "span 4 to 7 lies outside of sequence 0"),
        ({"range_ids": [[0, 0, 0, 3, 0, 3, 4, 5]]}, "2 tasks, but 1 range_ids"),
        ({"range_ids": [[0, 0]] * 2}, "row 0"),
        ({"input_ids": None}, "row 0"),
    ],
)
def test_a_row_whose_columns_do_not_fit_is_named(tmp_path, change, message):
    rows = official_rows()
    path = write_official(tmp_path / "a.parquet", [{**rows[0], **change}, *rows])
    with pytest.raises(ValueError, match=message) as error:
        list(PackedParquet(path))
    assert "a.parquet, row group 0, row 0" in str(error.value)


# ---- What is wrong with files ----


def test_unknown_task_ids_are_found_without_reading_the_tokens(tmp_path):
    rows = official_rows()
    rows[0]["task_ids"] = [1, 9]
    read = PackedParquet(write_official(tmp_path / "a.parquet", rows))
    with pytest.raises(ValueError, match=r"task ids \[9\] are out of range"):
        read.tasks  # noqa: B018


def test_a_file_that_is_cut_off_is_named(tmp_path):
    folder = write(tmp_path / "data", some())
    file = sorted(folder.iterdir())[1]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-00001.parquet is cut off, or no parquet"):
        PackedParquet(folder)


def test_a_flipped_bit_in_the_tokens_is_found(tmp_path):
    folder = write(tmp_path / "data", some())
    file = sorted(folder.iterdir())[0]
    content = bytearray(file.read_bytes())
    content[60] ^= 16
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"part-00000.parquet, row group 0, is damaged"):
        list(PackedParquet(folder))


def test_another_kind_of_parquet_is_refused_with_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="it has the columns text, which are neither"):
        PackedParquet(tmp_path)


def test_missing_columns_are_named(tmp_path):
    folder = write(tmp_path / "data", some())
    file = sorted(folder.iterdir())[0]
    pq.write_table(pq.read_table(file).drop_columns(["labels", "spans"]), file)
    with pytest.raises(ValueError, match="the columns labels, spans are missing"):
        PackedParquet(file)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (b'{"format": "elasticore.packed", "version": 2}', "it is elasticore.packed version 2"),
        (b'{"format": "elasticore.packed", "version": 1}', "its metadata is wrong"),
        (b"[]", "its metadata is wrong"),
        (b"{", "cannot|can be read"),
    ],
)
def test_metadata_that_cannot_be_understood(tmp_path, about, message):
    file = sorted(write(tmp_path / "data", some()).iterdir())[0]
    pq.write_table(pq.read_table(file).replace_schema_metadata({KEY: about}), file)
    with pytest.raises(ValueError, match=message):
        PackedParquet(file)


def test_files_of_different_builds_are_not_mixed(tmp_path):
    folder = write(tmp_path / "data", some())
    other = write(tmp_path / "other", some(), Header(64, TASKS, ("one", "two"), {"name": "other"}))
    (other / "part-00000.parquet").rename(folder / "part-00009.parquet")
    with pytest.raises(ValueError, match=r"part-00009.parquet is of another build"):
        PackedParquet(folder)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="elasticore data build"):
        PackedParquet(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder that holds one"):
        PackedParquet(tmp_path)
    pq.write_table(pa.Table.from_pylist(official_rows()).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="holds no row"):
        PackedParquet(tmp_path)
