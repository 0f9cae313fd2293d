"""Prompt and answer into tokens and labels, as the model will see them when it is used."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elasticore.data.prompting import (
    blanked,
    chat_text,
    end_token,
    first_tokens,
    name_of,
    special_words,
)
from elasticore.data.sequence import IGNORED, Span, TokenSequence
from elasticore.data.sources import Example

__all__ = ["Encoder", "fingerprint"]


@dataclass(frozen=True)
class Encoder:
    """Makes token sequences of examples.

    The prompt, up to where the model starts to write, and the answer with its end mark are
    tokenized apart, as they are when the model is used; so no token spans both.

    Parameters
    ----------
    tokenizer
        A fast tokenizer.
    template
        ``"chat"``: the tokenizer's chat template, with thinking off where it knows that.
        ``"plain"``: prompt, blank line, answer, end of text, for models without a template.
    loss
        What is learnt: ``"answer"``, which includes its end mark, or ``"all"`` tokens.

    Raises
    ------
    ValueError
        If the tokenizer cannot do what the settings ask.
    """

    tokenizer: Any
    template: Literal["chat", "plain"] = "chat"
    loss: Literal["answer", "all"] = "answer"

    def __post_init__(self) -> None:
        name = name_of(self.tokenizer)
        if self.template not in ("chat", "plain"):
            raise ValueError(f"template must be 'chat' or 'plain', got {self.template!r}.")
        if self.loss not in ("answer", "all"):
            raise ValueError(f"loss must be 'answer' or 'all', got {self.loss!r}.")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer {name} is no fast tokenizer, so it cannot tell where text lies in its "
                "tokens; use one with a tokenizer.json."
            )
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {name} has no chat template; use that of the instruct model, or "
                "template plain."
            )
        if self.template == "plain":
            end_token(self.tokenizer, "template plain puts after answers", ", or use template chat")
        if self._texts("Question?", "Answer.") is None:
            raise ValueError(
                f"tokenizer {name}: its chat template changes what comes before an answer once "
                "the answer is there, so the two cannot be told apart; set another "
                "tokenizer.chat_template, or use template plain."
            )

    def __call__(self, example: Example, source: str) -> TokenSequence | None:
        """Tokens and labels of an example, with the places of its answer and evidence.

        Special tokens that stand in its text become blanks. None if the template rewrites this
        example, as some do with marks of thinking.
        """
        prompt_text = self._blank(example.prompt)
        texts = self._texts(prompt_text.strip(), self._blank(example.answer).strip())
        if texts is None:
            return None
        before, after, shift = texts
        shift -= len(prompt_text) - len(prompt_text.lstrip())
        # A template writes the special tokens itself.
        first, last = [], []
        if self.template == "plain":
            first, last = first_tokens(self.tokenizer), [self.tokenizer.eos_token_id]
        prompt = self._encode(before, return_offsets_mapping=bool(example.evidence))
        start = len(first) + len(prompt["input_ids"])
        answer_ids = self._encode(after)["input_ids"]
        ids = np.array([*first, *prompt["input_ids"], *answer_ids, *last], dtype=np.int32)
        labels = ids.copy()
        if self.loss == "answer":
            labels[:start] = IGNORED
        spans = [Span("answer", start, len(ids))]
        if example.evidence:
            starts, stops = np.array(prompt["offset_mapping"]).T
            for begin, end in example.evidence:
                begin = int(np.searchsorted(stops, begin + shift, "right"))
                end = int(np.searchsorted(starts, end + shift, "left"))
                spans.append(Span("evidence", len(first) + begin, len(first) + end))
        return TokenSequence(ids, labels, example.task, source, tuple(spans))

    def conversation(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[list[int], list[int]] | None:
        """Tokens of a conversation up to its last message, and of that with its end mark.

        As those of an example with template ``"chat"``, of one or of several turns. None if the
        template rewrites it.
        """
        clean = [{**one, "content": self._blank(one["content"]).strip()} for one in messages]
        texts = self._split(clean)
        if texts is None:
            return None
        before, after = texts
        return self._encode(before)["input_ids"], self._encode(after)["input_ids"]

    def _texts(self, prompt: str, answer: str) -> tuple[str, str, int] | None:
        """Text up to the answer, the answer with its end, and where the prompt starts."""
        if self.template == "plain":
            return f"{prompt}\n\n", answer, 0
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        texts = self._split(messages)
        start = -1 if texts is None else texts[0].find(prompt)
        return None if texts is None or start < 0 else (*texts, start)

    def _split(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str] | None:
        """Text up to the last message, and that with its end mark."""
        before = chat_text(self.tokenizer, messages[:-1])
        whole, answer = chat_text(self.tokenizer, messages, asks=False), messages[-1]["content"]
        after = whole.removeprefix(before).rstrip()
        if not whole.startswith(before) or answer not in after or not answer:
            return None
        return before, after

    def _blank(self, text: str) -> str:
        return blanked(text, self._special)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return special_words(self.tokenizer)

    def _encode(self, text: str, **settings: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **settings)


def fingerprint(tokenizer: Any) -> dict[str, Any]:
    """What tells whether token ids mean the same to another tokenizer: a hash of its vocabulary."""

    def digest(value: object) -> str:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    template = getattr(tokenizer, "chat_template", None)
    name = str(getattr(tokenizer, "name_or_path", ""))
    return {
        "name": Path(name).name if Path(name).is_dir() else name,
        "tokens": len(tokenizer),
        "vocabulary": digest(tokenizer.get_vocab()),
        "chat_template": None if template is None else digest(template),
    }
