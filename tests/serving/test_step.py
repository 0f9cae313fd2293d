"""A step of the engine is taken apart rightly, whatever the scheduler put into it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore.patterns import Streaming
from elasticore.serving.vllm.step import Step
from elasticore.serving.vllm.tables import near_pages

PAGE = 16


@st.composite
def rows(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(tokens of the prompt, in the cache before, computed now) of every row."""
    row = st.tuples(st.integers(1, 90), st.integers(0, 120), st.integers(1, 60))
    return draw(st.lists(row, min_size=1, max_size=6))


def step_of(rows: list[tuple[int, int, int]]) -> tuple[Step, torch.Tensor]:
    counts = torch.tensor([count for _, _, count in rows])
    starts = [0, *counts.cumsum(0).tolist()]
    table = torch.randperm(len(rows) * 16).view(len(rows), 16)
    seen = [past + count for _, past, count in rows]
    return Step.of(starts, seen, [prompt for prompt, _, _ in rows], table, PAGE), table


@given(rows())
def test_every_token_is_prompt_or_answer_at_its_position(rows: list[tuple[int, int, int]]) -> None:
    step, table = step_of(rows)
    told: dict[int, tuple[str, int, int]] = {}
    for p in step.prompts:
        told |= {p.start + i: ("prompt", p.row, p.past + i) for i in range(p.count)}
    for token, row, seen in zip(step.answers, step.row, step.seen, strict=True):
        assert int(token) not in told
        told[int(token)] = ("answer", int(row), int(seen) - 1)
    expected, token = {}, 0
    for row, (prompt, past, count) in enumerate(rows):
        for position in range(past, past + count):
            expected[token] = ("prompt" if position < prompt else "answer", row, position)
            token += 1
    assert told == expected
    whole = [row for row, (prompt, past, count) in enumerate(rows) if prompt <= past + count]
    assert list(step.ended) == whole  # nothing was decided before
    assert step.page.tolist() == [
        int(table[row, (prompt - 1) // PAGE]) for row, (prompt, _, _) in enumerate(rows)
    ]


@given(rows())
def test_requests_are_decided_for_once_while_they_run(rows: list[tuple[int, int, int]]) -> None:
    step, table = step_of(rows)
    starts = list(range(len(rows) + 1))  # each goes on by a token
    seen = [past + count + 1 for _, past, count in rows]
    prompts = [prompt for prompt, _, _ in rows]
    after = Step.of(starts, seen, prompts, table, PAGE, step.decided)
    ends = [row for row, (prompt, past, count) in enumerate(rows) if prompt == past + count + 1]
    assert list(after.ended) == ends
    # The same page with a prompt of another length is another prompt; so is one in another page.
    other = frozenset((page, prompt + 1) for page, prompt in step.decided)
    again = Step.of(starts, seen, prompts, table, PAGE, other)
    assert set(again.ended) == {row for row, s in enumerate(seen) if s >= prompts[row]}


@given(
    seen=st.lists(st.integers(1, 16 * PAGE), min_size=1, max_size=5),
    sink=st.integers(0, 3),
    local=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_a_table_of_a_head_holds_what_it_reads_and_nothing_else(
    seen: list[int], sink: int, local: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(len(seen) * 16, generator=generator).view(len(seen), 16)
    streaming = torch.randint(0, 2, (len(seen), 3), generator=generator).bool()
    found, lengths = near_pages(table, torch.tensor(seen), streaming, sink, local, PAGE)
    pattern = Streaming(sink * PAGE, local * PAGE)
    for row, tokens in enumerate(seen):
        block = torch.tensor((tokens - 1) // PAGE)
        near = pattern.blocks_read(block, PAGE)
        for head in range(3):
            count = int(near) if streaming[row, head] else int(block) + 1
            own = found[row, head, :count].tolist()
            assert -(-int(lengths[row, head]) // PAGE) == count
            # The last page is as full as the sequence's own.
            assert (int(lengths[row, head]) - tokens) % PAGE == 0
            blocks = range(int(block) + 1)
            if streaming[row, head]:
                blocks = [b for b in blocks if b < sink or b > int(block) - local]
            assert own == [int(table[row, b]) for b in blocks]
