"""What is made from tensors is made again when it has to be, and no more often."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from elasticore import SequenceLayout
from elasticore.memo import Memo

CPU = torch.device("cpu")


def test_it_is_made_once_for_the_same_values_of_the_same_tensors() -> None:
    memo: Memo[float] = Memo()
    x = torch.ones(3)

    def total(key: int = 0, tensor: Tensor = x) -> float:
        made.append(key)
        return float(tensor.sum())

    made: list[int] = []
    assert [memo.get(0, (x,), CPU, total) for _ in range(3)] == [3.0] * 3
    assert len(made) == 1
    x.add_(1)
    assert memo.get(0, (x,), CPU, total) == 6.0
    memo.get(1, (x,), CPU, total)
    memo.get(1, (x.clone(),), CPU, total)
    assert len(made) == 4


def test_nothing_is_kept_of_tensors_whose_writes_are_not_counted() -> None:
    memo: Memo[float] = Memo()
    with torch.inference_mode():
        x = torch.ones(3)
        for value in (1.0, 2.0):
            x.fill_(value)
            assert memo.get(0, (x,), CPU, lambda: float(x[0])) == value


def layouts() -> dict[str, SequenceLayout]:
    return {
        "dense": SequenceLayout.dense(),
        "padded": SequenceLayout.padded(torch.tensor([0, 2]), torch.tensor([7, 7])),
        "packed": SequenceLayout.packed(torch.tensor([0, 3, 8])),
    }


@pytest.mark.parametrize("kind", layouts())
def test_a_layouts_segments_are_made_once_for_sizes_and_values(kind: str) -> None:
    layout, batch = layouts()[kind], 1 if kind == "packed" else 2
    one = layout.segments(batch, 8, 8, CPU)
    assert layout.segments(batch, 8, 8, CPU) is one
    if kind != "packed":
        assert layout.segments(batch, 4, 8, CPU).query_length.tolist() == [4, 4]
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        for tensor in (*layout.tensors, *other.tensors):
            tensor[0] = 0  # as many writes to the copy as to the layout
        again = other.segments(batch, 8, 8, CPU)
        assert again is not one
        assert all(map(torch.equal, again, layout.segments(batch, 8, 8, CPU)))


def test_segments_follow_a_layout_that_is_overwritten() -> None:
    ends = torch.tensor([0, 3, 8])
    layout = SequenceLayout.packed(ends)
    assert layout.segments(1, 8, 8, CPU).query_length.tolist() == [3, 5]
    ends[1] = 6
    assert layout.segments(1, 8, 8, CPU).query_length.tolist() == [6, 2]


def test_segments_of_inference_mode_serve_no_training() -> None:
    layout = SequenceLayout.dense()
    with torch.inference_mode():
        assert layout.segments(2, 8, 8, CPU).row.is_inference()
    assert not layout.segments(2, 8, 8, CPU).row.is_inference()


@pytest.mark.gpu
def test_a_captured_graph_makes_its_own() -> None:
    device = torch.device("cuda", 0)
    ends = torch.tensor([0, 3, 8], device=device)
    layout = SequenceLayout.packed(ends)
    layout.segments(1, 8, 8, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lengths = layout.segments(1, 8, 8, device).query_length
    ends[1] = 6
    graph.replay()
    assert lengths.tolist() == [6, 2]


@pytest.mark.gpu
def test_another_stream_makes_its_own() -> None:
    device = torch.device("cuda", 0)
    layout = SequenceLayout.packed(torch.tensor([0, 3, 8], device=device))
    one = layout.segments(1, 8, 8, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert layout.segments(1, 8, 8, device) is not one
