"""Training samples from a file of JSON lines, checked as they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from elasticore.data.encoding import Encoder
from elasticore.data.prompting import end_token, prompt_tokens
from elasticore.data.sequence import IGNORED
from elasticore.train.content import check_vocabulary, digest_of
from elasticore.train.data import TrainingSample

__all__ = ["JsonLines"]

FORMS = "messages; prompt and answer; input_ids and labels"


class JsonLines(Dataset[TrainingSample]):
    """Samples from a file with one JSON object a line.

    A line holds ``task`` and one of

    - ``messages``, a list of ``role`` and ``content`` whose last one is the assistant's answer:
      the chat template writes them, as in ``elasticore data build``, and the answer with its end
      mark is learnt;
    - ``prompt`` and ``answer``, which are tokenized as they are, with a beginning of text where the
      model has one; only the answer, and the end of text, is learnt;
    - ``input_ids`` and ``labels``, each the token in its place or -100.

    Parameters
    ----------
    path
        The file.
    tokenizer
        The model's tokenizer.
    max_length
        Longer samples are an error: a cut prompt has lost what its answer needs.

    Attributes
    ----------
    tasks
        The tasks that occur.
    longest
        Tokens of the longest sample.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no file; if a line is not as above, has nothing to learn or tokens outside the
        vocabulary, or needs a chat template or an end of text that the tokenizer does not have. The
        message names the line.
    """

    def __init__(self, path: str | Path, tokenizer: Any, max_length: int) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path {self.path} is no file.")
        vocabulary = None if tokenizer is None else len(tokenizer)
        self.rows: list[TrainingSample] = []
        for where, line in _lines(self.path):
            self.rows.append(_sample(where, line, tokenizer, max_length))
            check_vocabulary(self.rows[-1].input_ids, vocabulary, where)
        if not self.rows:
            raise ValueError(f"path {self.path} holds no sample.")
        self.tasks = tuple(dict.fromkeys(row.task for row in self.rows))
        self.longest = max(len(row.input_ids) for row in self.rows)

    @property
    def digest(self) -> str:
        """A hash of all samples, which tells them from others."""
        return digest_of(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TrainingSample:
        return self.rows[index]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that hold something, each with where it is."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: no UTF-8 text: {error}.") from None
            if text.strip():
                yield where, text


def _sample(where: str, line: str, tokenizer: Any, max_length: int) -> TrainingSample:
    start = 0
    try:
        row = json.loads(line)
        task = row["task"]
        if "input_ids" in row:
            ids, labels = _integers(where, row, "input_ids"), _integers(where, row, "labels")
        else:
            prompt, answer = _asked(row, tokenizer, where)
            start = len(prompt)
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: expected a JSON object with task and one of {FORMS}; got {error!r}."
        ) from error
    if not isinstance(task, str) or not task:
        raise ValueError(f"{where}: task must be the name of a task, got {task!r}.")
    if len(ids) != len(labels):
        raise ValueError(f"{where}: {len(ids)} input_ids but {len(labels)} labels.")
    if not 2 <= len(ids) <= max_length:
        raise ValueError(f"{where}: {len(ids)} tokens; accepted are 2 to {max_length}.")
    if all(label == IGNORED for label in labels[1:]):
        raise ValueError(
            f"{where}: every label is {IGNORED}, so there is nothing to learn; labels of the "
            "answer are its tokens."
        )
    return TrainingSample(torch.tensor(ids), torch.tensor(labels), task, where, start)


def _integers(where: str, row: Any, name: str) -> list[int]:
    values = row[name]
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"{where}: {name} must be a list of whole numbers, got {values!r:.60}.")
    return values


def _asked(row: Any, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Tokens of a row's prompt and of its answer."""
    if "messages" not in row:
        prompt, answer = _text(where, row, "prompt"), _text(where, row, "answer")
        if not answer:
            raise ValueError(f"{where}: answer is empty, so there is nothing to learn.")
        end = end_token(
            tokenizer, f"{where} needs after its answer", ", or give messages for its chat template"
        )
        learnt = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return prompt_tokens(tokenizer, prompt), [*learnt, end]
    messages = row["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: messages must end with the assistant's answer to an earlier one."
        )
    for message in messages:
        _text(where, message, "content")
    found = Encoder(tokenizer).conversation(messages)
    if found is None:
        raise ValueError(
            f"{where}: the last message is empty, or the chat template changes what comes before "
            "it once it is there, so prompt and answer cannot be told apart; give prompt and "
            "answer."
        )
    return found


def _text(where: str, row: Any, name: str) -> str:
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {name} must be text, got {text!r:.60}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {name} holds half of a character pair: {error}.") from None
    return text
