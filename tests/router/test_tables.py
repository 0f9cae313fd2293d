"""Head tables: made by hand, by scores or by chance; and the files of DuoAttention and PruLong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore import Elastic, Streaming
from elasticore.errors import RouterMismatch
from elasticore.router import HeadTable, LayerShape, write_duo, write_prulong

CPU = torch.device("cpu")


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("table", [[[True, False], [False, False]], [[1, 0], [1, 1]]])
def test_a_table_makes_a_policy_per_layer(table, as_tensor):
    policy = HeadTable(torch.tensor(table) if as_tensor else table)
    assert policy.sparse.dtype == torch.bool and policy.sparse.tolist() == table
    modules = policy.modules([LayerShape(2, 8, CPU)] * 2)
    assert [module.decisions.tolist() for module in modules] == table


@pytest.mark.parametrize(
    ("layers", "heads"), [(3, 2), (2, 4)], ids=["another number of layers", "of heads"]
)
def test_a_table_of_another_model_is_refused(layers, heads):
    with pytest.raises(RouterMismatch, match=rf"2 layers and 2 KV.*{layers} elastic.*{heads}"):
        HeadTable([[1, 0], [1, 1]]).modules([LayerShape(heads, 8, CPU)] * layers)


@given(
    scores=st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), min_size=1),
    msr=st.floats(0, 1),
)
def test_exactly_the_share_asked_for_is_sparse_and_scores_lowest(scores, msr):
    scores = torch.tensor(scores)
    table = HeadTable.of_scores(scores, msr).sparse
    assert int(table.sum()) == round(msr * scores.numel())
    if table.any() and not table.all():
        assert scores[table].max() <= scores[~table].min()


def test_of_equal_scores_the_first_are_sparse():
    assert HeadTable.of_scores(torch.ones(2, 3), 0.5).sparse.tolist() == [[True] * 3, [False] * 3]


@given(
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 9),
    msr=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_random_table_has_exactly_the_share_asked_for(layers, kv_heads, msr, seed):
    table = HeadTable.random(layers, kv_heads, msr, seed).sparse
    assert table.shape == (layers, kv_heads)
    assert table.dtype == torch.bool
    assert int(table.sum()) == round(msr * layers * kv_heads)
    assert torch.equal(table, HeadTable.random(layers, kv_heads, msr, seed).sparse)


@pytest.mark.parametrize(
    ("layers", "kv_heads", "msr", "count"),
    [(1, 10, 1 - 0.9, 1), (36, 8, 0.7, 202), (32, 8, 0.29, 74), (10, 10, 0.29, 29), (2, 3, 1.0, 6)],
)
def test_random_table_counts_by_hand(layers, kv_heads, msr, count):
    # 0.7 · 288 = 201.6; 0.29 · 256 = 74.24; 0.29 * 100 is 28.999999999999996 in floats.
    assert int(HeadTable.random(layers, kv_heads, msr, 0).sparse.sum()) == count


def test_random_table_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = HeadTable.random(32, 8, 0.5, 0).sparse, HeadTable.random(32, 8, 0.5, 1).sparse
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_duoattention_files_survive_a_round_trip(tmp_path: Path):
    scores = torch.tensor([[0.1, 0.9], [0.4, 0.2], [1.0, 0.6]])
    table = HeadTable.read(write_duo(tmp_path / "a", scores, 128, 256))
    assert torch.equal(table.sparse, scores < 0.5)  # which is all that scores alone can say
    assert table.streaming == Streaming(128, 256)
    third = HeadTable.read(tmp_path / "a", msr=1 / 3)
    assert third.sparse.tolist() == [[True, False], [False, True], [False, False]]
    bare = HeadTable.read(tmp_path / "a" / "full_attention_heads.tsv")
    assert torch.equal(bare.sparse, table.sparse) and bare.streaming is None


def test_a_published_duoattention_file_is_read(tmp_path: Path):
    # As numpy.savetxt writes it; gates lie a little below 0.
    (tmp_path / "full_attention_heads.tsv").write_text(
        "-9.584426879882812500e-05\t5.585937500000000000e-01\n"
        "1.000000000000000000e+00\t7.812500000000000000e-01\n"
    )
    (tmp_path / "config.json").write_text('{"sink_size": 64, "recent_size": 256, "lr": 0.02}')
    table = HeadTable.read(tmp_path)
    assert table.sparse.tolist() == [[True, False], [False, False]]
    assert HeadTable.read(tmp_path, msr=0.5).sparse.tolist() == [[True, True], [False, False]]
    assert table.streaming == Streaming(64, 256)
    # Blocks of 64 tokens are the largest that these sizes allow.
    assert Elastic(table, sparse=table.streaming).block_size == 64


def test_prulong_files_survive_a_round_trip(tmp_path: Path):
    sparse = torch.tensor([[True, False], [False, False]])
    file = write_prulong(tmp_path / "deep" / "masks_sp0.25.tsv", sparse)
    assert file.read_text() == "0.0\t1.0\n1.0\t1.0\n"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))  # as Python's csv module ends lines
    assert torch.equal(HeadTable.read(file).sparse, sparse)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0\t0.0\n1.0\n", "line 2: 1 numbers, but 2 in the first"),
        ("1.0\tfull\n", "line 1: expected numbers between tabs"),
        ("", "must hold a number from 0 to 1"),
        ("4.5\t-3\n", "must hold a number from 0 to 1"),
        ("nan\t1\n", "must hold a number from 0 to 1"),
    ],
)
def test_files_that_are_no_patterns(text: str, message: str, tmp_path: Path):
    (tmp_path / "masks.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        HeadTable.read(tmp_path / "masks.tsv")


def test_missing_parts_of_a_pattern_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a directory with full_att"):
        HeadTable.read(tmp_path)
    (tmp_path / "full_attention_heads.tsv").write_text("1\t0\n")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        HeadTable.read(tmp_path)
    (tmp_path / "config.json").write_text('{"sink_size": 64}')
    with pytest.raises(ValueError, match=r"recent_size.*KeyError"):
        HeadTable.read(tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HeadTable([0, 1]), ValueError, r"sparse must be \[layers, kv_heads\]"),
        (lambda: HeadTable([[0, 3]]), ValueError, "sparse must hold values from 0 to 1"),
        (lambda: HeadTable([[0, -1]]), ValueError, "sparse must hold values from 0 to 1"),
        (lambda: HeadTable([[0.5, 1]]), TypeError, "sparse must be bool or integer"),
        (lambda: HeadTable.random(0, 8, 0.5, 0), ValueError, "layers must be at least 1"),
        (lambda: HeadTable.random(2, 8, 1.5, 0), ValueError, "msr must be from 0 to 1, got 1.5"),
        (lambda: HeadTable.of_scores(torch.ones(2, 2), 1.5), ValueError, "msr must be from 0 to 1"),
        (lambda: HeadTable.of_scores(torch.ones(2), 0.5), ValueError, r"scores must be .*kv_heads"),
        (lambda: HeadTable.of_scores(torch.tensor([[torch.nan]]), 0), ValueError, "be finite"),
        (lambda: HeadTable.of_scores(torch.ones(2, 2).int(), 0), TypeError, "be a float tensor"),
        (lambda: HeadTable.restored({}, {}), ValueError, "holds the decisions of its layers"),
        (
            lambda: HeadTable.restored({}, {"layers.1.decisions": torch.zeros(2)}),
            ValueError,
            "where some are missing",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
