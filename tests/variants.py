"""The tiny model's tokenizer, as other models have theirs."""

from __future__ import annotations

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from elasticore.assets import tiny

__all__ = ["LLAMA", "QWEN", "variant"]

LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
"""A chat template that writes the beginning of text itself."""

QWEN = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% if enable_thinking is defined and "
    "not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A chat template that lets the model think, unless it is told otherwise."""


def variant(
    *, first: bool = False, last: bool = False, template: str | None = None, end: bool = True
) -> Any:
    """A tokenizer.

    Parameters
    ----------
    first, last
        Whether it puts a special token before, and after, every text.
    template
        Its chat template.
    end
        Whether it has an end of text.
    """
    made = AutoTokenizer.from_pretrained(tiny() / "backbone")
    made.chat_template = template
    if first or last:
        made.bos_token = mark = made.eos_token
        single = f"{mark} $A" if first else "$A"
        single += f" {mark}" if last else ""
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=single,
            pair=f"{single} $B",
            special_tokens=[(mark, made.eos_token_id)],
        )
    if not end:
        made.eos_token = None
    return made
