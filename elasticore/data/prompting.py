"""From text to the tokens that a model is asked with: the same in data, evaluation and use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "blanked",
    "chat_text",
    "chat_tokens",
    "end_token",
    "first_tokens",
    "name_of",
    "prompt_tokens",
    "special_words",
]


def first_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text, such as a beginning of text; often nothing."""
    alone: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("x")["input_ids"]
    starts = range(len(whole) - len(alone) + 1)
    found = next((n for n in starts if whole[n : n + len(alone)] == alone), None)
    if found is None:
        raise ValueError(
            f"tokenizer {name_of(tokenizer)} changes a text's own tokens where it adds special "
            "ones, so it cannot be told what comes first; use one with a tokenizer.json."
        )
    return whole[:found]


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt as it stands.

    The tokenizer's first tokens are there once, also where the text begins with them, as one that a
    chat template has written. Nothing comes after the text, where the answer is to follow, even if
    the tokenizer ends every text with an end of text.
    """
    first = first_tokens(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[: len(first)] == first else [*first, *ids]


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    asks: bool = True,
    thinking: bool = False,
) -> str:
    """A conversation as the chat template writes it.

    Parameters
    ----------
    tokenizer
        The model's.
    messages
        ``role`` and ``content`` of each.
    asks
        Whether the model's answer is to follow.
    thinking
        Whether it is to think first, where the template knows of that.

    Raises
    ------
    ValueError
        If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {name_of(tokenizer)} has no chat template; use that of the instruct model, "
            "or ask without one."
        )
    # Templates ignore settings that they do not know.
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=asks, enable_thinking=thinking
    )
    return text


def chat_tokens(tokenizer: Any, prompt: str, *, thinking: bool = False) -> list[int]:
    """Tokens of a user's turn that is to be answered, as training data are built with it.

    Blanks around the prompt are dropped, and special tokens in it become blanks. The template
    writes all special tokens itself.
    """
    messages = [{"role": "user", "content": blanked(prompt, special_words(tokenizer)).strip()}]
    text = chat_text(tokenizer, messages, thinking=thinking)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def special_words(tokenizer: Any) -> re.Pattern[str]:
    """What finds special tokens that are written in a text."""
    added = tokenizer.added_tokens_decoder.values()
    words = sorted({token.content for token in added if token.special}, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def blanked(text: str, words: re.Pattern[str]) -> str:
    """The text with blanks, equally many, in place of what ``words`` finds."""
    return words.sub(lambda found: " " * len(found[0]), text)


def end_token(tokenizer: Any, needed: str, otherwise: str = "") -> int:
    """The end of text.

    Parameters
    ----------
    tokenizer
        The model's.
    needed, otherwise
        For the message: what needs it, and what else would do.

    Raises
    ------
    ValueError
        If the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name_of(tokenizer)} has no end-of-text token, which {needed}; set its "
            f"eos_token{otherwise}."
        )
    return int(tokenizer.eos_token_id)


def name_of(tokenizer: Any) -> str:
    """What to call a tokenizer in a message."""
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
