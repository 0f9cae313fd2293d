"""Tokens and labels: the answer is learnt, the prompt is not, and spans hold what they say."""

from __future__ import annotations

from copy import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticore.data import Encoder, Example
from elasticore.data.encoding import fingerprint
from elasticore.models.loading import load_tokenizer

EXAMPLE = Example("The sky is blue. What is the sky?", "blue", "single_qa", ((0, 16),))


def texts(tokenizer, sequence):
    return [
        (kind, tokenizer.decode(sequence.input_ids[start:stop].tolist()))
        for kind, start, stop in sequence.spans
    ]


def test_the_chat_template_surrounds_prompt_and_answer(tokenizer):
    sequence = Encoder(tokenizer)(EXAMPLE, "mine")
    assert tokenizer.decode(sequence.input_ids.tolist()) == (
        "<|endoftext|>user\nThe sky is blue. What is the sky?<|endoftext|>\n"
        "<|endoftext|>assistant\nblue<|endoftext|>"
    )
    assert texts(tokenizer, sequence) == [
        ("answer", "blue<|endoftext|>"),
        ("evidence", "The sky is blue."),
    ]
    assert (sequence.task, sequence.source) == ("single_qa", "mine")


def test_the_prompt_is_tokenized_as_it_is_when_the_model_is_used(tokenizer):
    sequence = Encoder(tokenizer)(EXAMPLE, "mine")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": EXAMPLE.prompt}], add_generation_prompt=True
    )["input_ids"]
    assert sequence.input_ids[: len(asked)].tolist() == asked
    assert sequence.spans[0].start == len(asked)


def test_thinking_is_off_and_its_marks_belong_to_the_prompt(tokenizer):
    """As Qwen3's template does it: empty marks before the last answer."""
    marks = "<think>\n\n</think>\n\n"
    thinking = copy(tokenizer)
    thinking.chat_template = (
        "{% for message in messages %}<|endoftext|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}" + marks + "{% endif %}{{ message.content }}"
        "<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<|endoftext|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}" + marks + "{% endif %}"
        "{% endif %}"
    )
    sequence = Encoder(thinking)(EXAMPLE, "mine")
    assert texts(tokenizer, sequence)[0] == ("answer", "blue<|endoftext|>")
    assert marks in tokenizer.decode(sequence.input_ids.tolist())


def test_without_a_template_the_answer_follows_a_blank_line(plain):
    sequence = Encoder(plain, "plain")(EXAMPLE, "mine")
    assert plain.decode(sequence.input_ids.tolist()) == (
        f"{EXAMPLE.prompt}\n\nblue{plain.eos_token}"
    )
    assert texts(plain, sequence)[1] == ("evidence", "The sky is blue.")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_labels_cover_the_answer_or_all(tokenizer, template):
    answer = Encoder(tokenizer, template)(EXAMPLE, "mine")
    start = answer.spans[0].start
    assert (answer.labels[:start] == -100).all()
    assert (answer.labels[start:] == answer.input_ids[start:]).all()
    assert answer.learnt == len(answer) - start
    everything = Encoder(tokenizer, template, "all")(EXAMPLE, "mine")
    assert (everything.labels == everything.input_ids).all()
    assert everything.learnt == len(answer) - 1
    assert (everything.on_answers().labels == answer.labels).all()


words = st.lists(st.sampled_from(["a", "né", "日本", "x=1;", "\n", "🙂"]), min_size=1, max_size=9)


@given(before=words, evidence=words, after=words)
def test_evidence_is_found_again_in_the_tokens(tokenizer, before, evidence, after):
    parts = [" ".join(part) for part in (before, evidence, after)]
    prompt = f"Q{parts[0]}[{parts[1]}]{parts[2]}Q"
    start = 1 + len(parts[0])
    stop = start + len(parts[1]) + 2
    sequence = Encoder(tokenizer)(Example(prompt, "yes", "code", ((start, stop),)), "mine")
    (found,) = (text for kind, text in texts(tokenizer, sequence) if kind == "evidence")
    assert prompt[start:stop] in found


def test_special_tokens_in_a_text_do_not_end_it(tokenizer):
    example = Example("<|endoftext|>Before. <|endoftext|> After.", "no<|pad|>", "code", ((13, 20),))
    sequence = Encoder(tokenizer)(example, "mine")
    ends = (sequence.input_ids == tokenizer.eos_token_id).sum()
    assert ends == 4  # those of the template
    assert texts(tokenizer, sequence) == [("answer", "no<|endoftext|>"), ("evidence", "Before.")]


def test_an_example_that_the_template_rewrites_is_left_out(tokenizer):
    thinking = copy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.content.replace('<think>', '')"
    )
    encoder = Encoder(thinking)
    assert encoder(EXAMPLE, "mine") is not None
    assert encoder(Example("What?", "<think>this", "code"), "mine") is None


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"chat_template": None}, {}, "has no chat template; use that of the instruct model, or"),
        ({"chat_template": "{{ messages | length }}"}, {}, "cannot be told apart"),
        ({"eos_token": None}, {"template": "plain"}, "has no end-of-text token"),
        ({}, {"template": "mine"}, "template must be 'chat' or 'plain'"),
        ({}, {"loss": "none"}, "loss must be 'answer' or 'all'"),
    ],
)
def test_a_tokenizer_that_will_not_do_is_refused_at_once(tokenizer, change, settings, message):
    wrong = copy(tokenizer)
    for name, value in change.items():
        setattr(wrong, name, value)
    with pytest.raises(ValueError, match=message):
        Encoder(wrong, **settings)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="no fast tokenizer"):
        Encoder(object())


def test_a_fingerprint_tells_vocabularies_apart(tokenizer, plain):
    assert fingerprint(tokenizer)["vocabulary"] == fingerprint(plain)["vocabulary"]
    assert fingerprint(tokenizer)["chat_template"] != fingerprint(plain)["chat_template"]
    larger = load_tokenizer("tiny")
    larger.add_tokens(["<new>"])
    assert fingerprint(larger)["vocabulary"] != fingerprint(plain)["vocabulary"]


def test_a_tokenizer_that_is_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory with a tokenizer"):
        load_tokenizer(str(tmp_path))
