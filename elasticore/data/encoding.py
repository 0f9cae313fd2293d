"""Prompt and answer into tokens and labels, as the model will see them when it is used."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elasticore.data.sequence import IGNORED, Span, TokenSequence
from elasticore.data.sources import Example

__all__ = ["Encoder", "fingerprint", "load_tokenizer"]


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
        name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
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
        if self.template == "plain" and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name} has no end-of-text token, which template plain puts after "
                "answers; use template chat."
            )
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
        blanked = self._blank(example.prompt)
        texts = self._texts(blanked.strip(), self._blank(example.answer).strip())
        if texts is None:
            return None
        before, after, shift = texts
        shift -= len(blanked) - len(blanked.lstrip())
        # A template writes the special tokens itself.
        prompt = self.tokenizer(
            before,
            add_special_tokens=self.template == "plain",
            return_offsets_mapping=bool(example.evidence),
            verbose=False,
        )
        answer = self.tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        if self.template == "plain":
            answer = [*answer, self.tokenizer.eos_token_id]
        ids = np.array([*prompt["input_ids"], *answer], dtype=np.int32)
        start = len(prompt["input_ids"])
        labels = ids.copy()
        if self.loss == "answer":
            labels[:start] = IGNORED
        spans = [Span("answer", start, len(ids))]
        if example.evidence:
            starts, stops = np.array(prompt["offset_mapping"]).T
            for first, last in example.evidence:
                begin = int(np.searchsorted(stops, first + shift, "right"))
                end = int(np.searchsorted(starts, last + shift, "left"))
                spans.append(Span("evidence", begin, end))
        return TokenSequence(ids, labels, example.task, source, tuple(spans))

    def _texts(self, prompt: str, answer: str) -> tuple[str, str, int] | None:
        """Text up to the answer, the answer with its end, and where the prompt starts."""
        if self.template == "plain":
            return f"{prompt}\n\n", answer, 0
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        # Templates ignore settings that they do not know.
        before, whole = (
            self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=asks, enable_thinking=False
            )
            for turns, asks in ((messages[:1], True), (messages, False))
        )
        start, after = before.find(prompt), whole.removeprefix(before).rstrip()
        if start < 0 or not whole.startswith(before) or answer not in after or not answer:
            return None
        return before, after, start

    def _blank(self, text: str) -> str:
        return self._special.sub(lambda found: " " * len(found[0]), text)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        words = sorted({token.content for token in added if token.special}, reverse=True)
        return re.compile("|".join(map(re.escape, words)) or "(?!)")


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


def load_tokenizer(name: str) -> Any:
    """The tokenizer at a directory, hub id or ``"tiny"``, the model in the package."""
    from transformers import AutoTokenizer

    path = name
    if name == "tiny":
        from elasticore.assets import tiny

        path = str(tiny() / "backbone")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"tokenizer {name} is no directory with a tokenizer, and the hub did not give it: "
            f"{error}"
        ) from error
