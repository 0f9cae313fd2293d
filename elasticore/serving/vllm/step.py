"""One step of the engine: which tokens are prompt, which are answer, and which prompts end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Prompt", "Step"]


@dataclass(frozen=True)
class Prompt:
    """Tokens of one request's prompt in a step.

    Attributes
    ----------
    row
        The request's place in the step.
    start
        Where the tokens begin, among those of the step.
    count
        How many there are.
    past
        How many the cache held before.
    """

    row: int
    start: int
    count: int
    past: int


@dataclass(frozen=True, eq=False)
class Step:
    """Whose tokens a step computes.

    A request that was preempted comes again with its prompt and what was answered so far. What was
    answered is no prompt then either: it is computed as it was the first time.

    Attributes
    ----------
    prompts
        What each request has of prompt tokens in this step.
    ended
        Rows to decide for: their prompt is complete with this step, or was before, in pages that
        another request has filled, as when a request that was preempted finds its own text there.
    lengths
        Tokens of every row's prompt.
    answers
        int64 ``[n]``: the other tokens of the step.
    row, seen
        int64 ``[n]``: each answer token's row, and how many tokens it sees, itself among them.
    page
        int64 ``[rows]``: the page that holds the last token of a row's prompt. No two requests
        share it: one is shared when it is full, and then the last token of a prompt is computed
        again, in a page of its own. So it names the request for as long as that one runs.
    decided
        The (page, tokens of the prompt) that are decided for after this step.
    """

    prompts: tuple[Prompt, ...]
    ended: tuple[int, ...]
    lengths: tuple[int, ...]
    answers: Tensor
    row: Tensor
    seen: Tensor
    page: Tensor
    decided: frozenset[tuple[int, int]]

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        seen: Sequence[int],
        prompts: Sequence[int],
        table: Tensor,
        page_size: int,
        decided: Collection[tuple[int, int]] = (),
    ) -> Step:
        """The step in which row ``i`` computes the tokens ``starts[i]`` to ``starts[i + 1]``.

        Parameters
        ----------
        starts
            Where each row's tokens begin, and the end.
        seen
            Of every row, how many tokens the cache holds after the step.
        prompts
            Of every row, how many tokens its prompt has.
        table
            int ``[rows, n]``: the pages of each row.
        page_size
            Tokens of a page.
        decided
            As the step before has it.
        """
        last = (torch.tensor(prompts, dtype=torch.int64) - 1).clamp(min=0) // page_size
        page = table.long().gather(1, last[:, None])[:, 0]
        names = list(zip(page.tolist(), prompts, strict=True))
        known: list[tuple[int, int]] = []
        parts: list[Prompt] = []
        ended: list[int] = []
        answers: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        for row, (start, stop, total, prompt) in enumerate(
            zip(starts[:-1], starts[1:], seen, prompts, strict=True)
        ):
            past = total - (stop - start)
            count = min(max(prompt - past, 0), stop - start)
            if count:
                parts.append(Prompt(row, start, count, past))
            if past + count >= prompt:
                known.append(names[row])
                if count or names[row] not in decided:
                    ended.append(row)
            answers += range(start + count, stop)
            rows += [row] * (stop - start - count)
            positions += range(past + count + 1, total + 1)
        token, row_of, sees = torch.tensor([answers, rows, positions], dtype=torch.int64)
        return cls(
            *(tuple(parts), tuple(ended), tuple(prompts), token, row_of, sees, page),
            frozenset(known),
        )
