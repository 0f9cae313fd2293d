"""One way from text to tokens: what comes first is there once, and nothing ends a prompt."""

from __future__ import annotations

import numpy as np
import pytest

from elasticore.data import Encoder, Example
from elasticore.data.prompting import chat_tokens, end_token, first_tokens, prompt_tokens
from tests.variants import LLAMA, QWEN, variant

EXAMPLE = Example("What is 6 * 7?", "42", "code", ((5, 9),))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_prompt_has_its_first_token_once_and_no_end(first, last):
    tokenizer = variant(first=first, last=last)
    text = tokenizer("one two", add_special_tokens=False)["input_ids"]
    special = [tokenizer.eos_token_id] * first
    assert first_tokens(tokenizer) == special
    assert prompt_tokens(tokenizer, "one two") == [*special, *text]


def test_a_prompt_that_begins_with_the_first_token_gets_no_second():
    tokenizer = variant(first=True, template=LLAMA)
    turn = [{"role": "user", "content": "one two"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert prompt_tokens(tokenizer, text) == chat_tokens(tokenizer, "one two") == asked


@pytest.mark.parametrize("template", [LLAMA, QWEN])
def test_a_question_is_asked_as_it_is_in_training_data(template):
    """With blanks around it and a special token in it, too."""
    tokenizer = variant(first=template is LLAMA, template=template)
    text = "\n What is <|pad|> this? \n"
    built = Encoder(tokenizer)(Example(text, "42", "code"), "mine")
    assert chat_tokens(tokenizer, text) == built.input_ids[: built.prompt].tolist()


def test_thinking_is_on_only_where_it_is_asked_for():
    tokenizer = variant(template=QWEN)
    off, on = (tokenizer.decode(chat_tokens(tokenizer, "Why?", thinking=t)) for t in (False, True))
    assert off == on + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("first", [False, True])
def test_plain_training_data_have_no_end_before_the_answer(first):
    """Of a tokenizer that ends every text; the evidence is found behind a first token, too."""
    usual, ending = variant(first=first), variant(first=first, last=True)
    one, other = (Encoder(made, "plain")(EXAMPLE, "mine") for made in (usual, ending))
    assert np.array_equal(one.input_ids, other.input_ids)
    assert one.spans == other.spans
    _, (_, start, stop) = other.spans
    assert ending.decode(other.input_ids[start:stop].tolist()) == " is 6"
    assert (other.input_ids == ending.eos_token_id).sum() == 1 + first


def test_a_missing_end_or_template_is_refused_by_name():
    bare = variant(end=False)
    with pytest.raises(ValueError, match="has no end-of-text token, which ends it; set its eos_to"):
        end_token(bare, "ends it")
    with pytest.raises(ValueError, match="has no chat template; use that of the instruct model"):
        chat_tokens(bare, "What?")
