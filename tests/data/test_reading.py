"""Records come as they are in the file, however it is laid out, or the error names the place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticore.data import SOURCES, reading

XSUM = SOURCES["xsum"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)
objects = st.lists(st.dictionaries(st.text(max_size=2), values, max_size=2), max_size=4)


@given(rows=objects, block=st.integers(1, 40), array=st.booleans(), indent=st.booleans())
def test_json_is_the_same_for_any_block_size(tmp_path, rows, block, array, indent):
    path = tmp_path / "rows.json"
    step = 1 if indent and array else None
    path.write_text(
        json.dumps(rows, indent=step) if array else "\n".join(json.dumps(row) for row in rows)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        assert list(reading._json(path)) == rows


@given(rows=objects.filter(bool), cut=st.integers(1, 10))
def test_a_json_array_that_is_cut_off_is_an_error(tmp_path, rows, cut):
    path = tmp_path / "rows.json"
    whole = json.dumps(rows)
    path.write_text(whole[: max(1, len(whole) - cut)])
    with pytest.raises(ValueError, match=r"rows.json, record \d+: .*cut off"):
        list(reading._json(path))


def test_a_folder_may_mix_forms_and_is_read_in_order_of_names(tmp_path: Path, records) -> None:
    rows = records("xsum", 6)
    (tmp_path / "a.json").write_text(json.dumps(rows[:2]), encoding="utf-8-sig")
    (tmp_path / "deeper").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[2:4]), tmp_path / "b.parquet")
    (tmp_path / "deeper" / "c.jsonl").write_text("\n".join(map(json.dumps, rows[4:])))
    (tmp_path / "notes.txt").write_text("not data")
    assert list(reading.records(XSUM, str(tmp_path))) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"document": "x", "summary": "y"}\nnonsense' + b" " * 99, "record 1"),
        ("a.jsonl", b'{"document": "x"', "record 0: the file ends in the middle"),
        ("a.jsonl", b'"text"', "record 0: expected a JSON object"),
        ("a.jsonl", b'{"document": "\xff\xfe"}', "no UTF-8 text"),
        ("a.jsonl", b'{"text": "x", "id": 1}', "no field document, summary among id, text"),
        ("a.jsonl", b"\n", "holds no record"),
        ("a.json", b"[]", "holds no record"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is damaged, or no parquet"),
        ("a.csv", b"x", "holds no file that ends in .json, .jsonl, .parquet"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_record(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(reading.records(XSUM, str(path)))


@pytest.mark.parametrize("place", ["nowhere/data.jsonl", "./nowhere", "/nowhere/at/all", "nowhere"])
def test_a_place_that_is_nowhere(place):
    with pytest.raises(FileNotFoundError, match="no hub id such as"):
        list(reading.records(XSUM, place))


def test_a_source_that_is_on_no_hub_says_where_to_get_it():
    with pytest.raises(ValueError, match=r"zenodo.*pass --source colt=FOLDER"):
        list(reading.records(SOURCES["colt"]))


@pytest.mark.parametrize(
    ("origin", "called"),
    [
        (None, [("EdinburghNLP/xsum", None, "refs/convert/parquet")]),
        ("EdinburghNLP/xsum", [("EdinburghNLP/xsum", None, "refs/convert/parquet")]),
        ("EdinburghNLP/xsum@abc", [("EdinburghNLP/xsum", None, "abc")]),
        ("me/copy:small@v1.0", [("me/copy", "small", "v1.0")]),
        ("me/copy", [("me/copy", None, None)]),
    ],
)
def test_the_hub_is_asked_for_what_was_named(monkeypatch, records, origin, called):
    rows, calls = records("xsum", 3), []

    def load_dataset(path, name, *, split, revision, streaming):
        assert split == "train"
        assert streaming
        calls.append((path, name, revision))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(reading.records(XSUM, origin)) == rows
    assert calls == called


def test_all_subsets_of_a_source_are_read(monkeypatch, records):
    rows = records("chatqa2", 2)
    subsets = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda path, name, **rest: subsets.append(name) or rows
    )
    assert len(list(reading.records(SOURCES["chatqa2"]))) == 4
    assert subsets == ["long_sft", "NarrativeQA_131072"]


def test_a_hub_that_does_not_answer_is_an_error_with_a_way_out(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"no route.*--source xsum=FOLDER"):
        list(reading.records(XSUM))


def test_what_is_no_data_in_a_folder_is_passed_over(tmp_path: Path, records) -> None:
    rows = records("xsum", 3)
    for name, row in zip(("A.JSONL", "b.Json", "c.jsonl"), rows, strict=True):
        (tmp_path / name).write_text(json.dumps(row))
    for name in (".cache/huggingface/a.json", "._a.jsonl", "deeper/.hidden/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"etag": "x"}')
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert list(reading.records(XSUM, str(tmp_path))) == rows
    assert list(reading.records(XSUM, str(tmp_path / "A.JSONL"))) == rows[:1]


def test_a_folder_that_is_hidden_itself_is_read(tmp_path: Path, records) -> None:
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.jsonl").write_text(json.dumps(records("xsum", 1)[0]))
    assert list(reading.records(XSUM, str(tmp_path / ".data"))) == records("xsum", 1)


def test_a_record_that_lacks_a_field_is_named_with_its_own_file(tmp_path: Path, records) -> None:
    rows = records("xsum", 3)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps(rows[0]), '{"document": "x"}']))
    with pytest.raises(ValueError, match=r"record 1 of .*b.jsonl: no field summary among document"):
        list(reading.records(XSUM, str(tmp_path)))
