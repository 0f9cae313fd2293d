"""Block lists and block masks say the same thing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore import BlockLists


def test_lists_by_hand() -> None:
    mask = torch.tensor([[[[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]]).bool()
    lists = BlockLists.from_mask(mask)
    assert lists.indices.tolist() == [[[[0, 2, -1, -1], [-1, -1, -1, -1], [0, 1, 2, 3]]]]
    assert lists.counts.tolist() == [[[2, 0, 4]]]
    assert lists.indices.dtype == lists.counts.dtype == torch.int32


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(0, 9)),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    seed=st.integers(0, 2**16),
    wider=st.integers(0, 3),
)
def test_mask_to_lists_and_back(
    shape: tuple[int, int, int, int], share: float, seed: int, wider: int
) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    lists = BlockLists.from_mask(mask)
    for chosen, indices, count in zip(
        mask.flatten(0, 2).tolist(),
        lists.indices.flatten(0, 2).tolist(),
        lists.counts.flatten().tolist(),
        strict=True,
    ):
        ascending = [block for block, is_chosen in enumerate(chosen) if is_chosen]
        assert indices == ascending + [-1] * (shape[3] - len(ascending))
        assert count == len(ascending)
    back = lists.to_mask(shape[3] + wider)  # a longer key axis adds blocks that nobody chose
    assert torch.equal(back[..., : shape[3]], mask)
    assert not back[..., shape[3] :].any()
    again = BlockLists.from_mask(back[..., : shape[3]])
    assert torch.equal(again.indices, lists.indices)
    assert torch.equal(again.counts, lists.counts)
