"""Cutting the middle out of a prompt that is too long: instructions stand at both ends."""

from __future__ import annotations

from typing import Any

__all__ = ["cut_middle"]


def cut_middle(tokenizer: Any, prompt: str, limit: int, *, decode_once: bool) -> str:
    """Keep the first and the last half of `limit` tokens, as LongBench's `pred.py` does.

    The text goes through the tokenizer once more afterwards, so its length may differ from the
    limit by a few tokens.

    Parameters
    ----------
    tokenizer
        Any transformers tokenizer; special tokens count, and are not in the text that comes back.
    prompt
        A prompt without chat template.
    limit
        Tokens to keep. The scripts of both versions come from the same authors and differ:
    decode_once
        True, as LongBench-v2: an odd limit keeps one token more of the end, and both halves are
        decoded together. False, as LongBench: an odd limit drops a token, and each half is decoded
        on its own.

    Returns
    -------
    str
        The prompt itself if it is no longer than the limit.

    Raises
    ------
    ValueError
        If `limit` is less than 2.
    """
    if limit < 2:
        raise ValueError(
            f"limit={limit} leaves no two halves; give the tokens that a prompt may have"
        )
    ids = tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return prompt
    half = limit // 2
    head, tail = ids[:half], ids[-(limit - half if decode_once else half) :]
    pieces = [head + tail] if decode_once else [head, tail]
    return "".join(tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces)
