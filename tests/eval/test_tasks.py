"""The tasks: exact lengths, answers that the prompt holds, spaces that training never sees."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import elasticore.eval.tasks as tasks
from elasticore.eval.corpus import documents, is_heldout
from elasticore.eval.ruler_like import make_ruler_sample
from elasticore.eval.tasks import TASKS, dense_sequence, filler, make_sample
from tests.variants import variant

BACKBONE = Path(tasks.__file__).parents[1] / "assets" / "tiny" / "backbone"
RETRIEVAL = [name for name, task in TASKS.items() if task.sensitive]
NEEDLE = r"The secret number of (\w+ \w+) is (\d{5})"
ASSIGNMENT = r"VAR (\w{3}) = (\w+)"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [512, 2000])
def test_exact_length_and_answer_where_stated(tokenizer, task, length):
    sample = make_sample(task, tokenizer, length, seed=3)
    assert len(sample.input_ids) == sample.stop == length
    assert 0 < sample.start < sample.stop
    assert tokenizer.decode(sample.input_ids[sample.start : sample.stop]) == sample.answer
    assert sample.sensitive == (task in ("needle", "multikey", "tracking"))


@pytest.mark.parametrize("task", [*TASKS, "vt"])
def test_a_first_token_is_there_and_the_length_stays(task):
    """Also of a tokenizer that ends every text: nothing ends before the answer."""
    make = make_sample if task in TASKS else make_ruler_sample
    tokenizer = variant(first=True, last=True)
    plain, sample = make(task, variant(), 1000, seed=3), make(task, tokenizer, 1000, seed=3)
    if task in TASKS:  # others are cut between words
        assert len(sample.input_ids) == 1000
    assert sample.input_ids[0] == tokenizer.eos_token_id != plain.input_ids[0]
    assert sample.input_ids[sample.start - 1] != tokenizer.eos_token_id
    assert sample.answer == plain.answer
    for (a, b), (c, d) in zip(plain.evidence, sample.evidence, strict=True):
        assert plain.input_ids[a:b].tolist() == sample.input_ids[c:d].tolist()


@pytest.mark.parametrize("task", ["needle", "multikey"])
def test_needle_follows_from_the_prompt(tokenizer, task):
    for seed in range(10):
        sample = make_sample(task, tokenizer, 1024, seed)
        prompt = tokenizer.decode(sample.input_ids[: sample.start])
        hidden = dict(re.findall(NEEDLE, prompt))
        assert len(hidden) == {"needle": 1, "multikey": 8}[task]
        asked = re.search(r"is the secret number of (\w+ \w+)\?", prompt)
        assert hidden[asked[1]] == sample.answer.strip()
        ((start, stop),) = sample.evidence
        assert sample.answer in tokenizer.decode(sample.input_ids[start:stop])


def test_chain_follows_from_the_prompt(tokenizer):
    for seed in range(10):
        sample = make_sample("tracking", tokenizer, 1024, seed)
        prompt = tokenizer.decode(sample.input_ids[: sample.start])
        source = dict(re.findall(ASSIGNMENT + r"\n", prompt))
        name = re.search(r"value of VAR (\w{3})\?", prompt)[1]
        first, value = re.fullmatch(r" (\w{3})\nVAR \1 = (\d{5})", sample.answer).groups()
        assert source[name] == first
        assert source[first] == value


def test_question_is_at_the_end_and_needles_are_everywhere(tokenizer):
    depths = []
    for seed in range(60):
        sample = make_sample("needle", tokenizer, 1024, seed)
        prompt = tokenizer.decode(sample.input_ids[-60:])
        assert "Question:" in prompt
        depths.append(sample.evidence[0][0] / sample.start)
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() >= 5


def test_heldout_keys_names_and_values_never_train(tokenizer, monkeypatch):
    # The keys are the point here, and reading the small part of the text is faster.
    monkeypatch.setattr(tasks, "documents", lambda split, kind: documents("heldout", kind))

    def drawn(split):
        keys, names, values = set(), set(), set()
        for seed in range(40):
            for task in ("multikey", "tracking"):
                text = tokenizer.decode(make_sample(task, tokenizer, 700, seed, split).input_ids)
                keys |= {k for k, _ in re.findall(NEEDLE, text)}
                names |= {k for k, _ in re.findall(ASSIGNMENT, text)}
                values |= {v for _, v in re.findall(NEEDLE, text)}
        return keys, names, values

    rng = np.random.default_rng(0)
    text = filler(tokenizer, rng, "heldout", 4096, "code")
    dense = [dense_sequence(tokenizer, text, 4096, rng, 24)[0] for _ in range(20)]
    dense_text = "".join(tokenizer.decode(ids) for ids in dense)
    trained = [*drawn("train"), {k for k, _ in re.findall(NEEDLE, dense_text)}]
    for words in trained:
        assert words
        assert not any(is_heldout(word, 20) for word in words)
    for words in drawn("heldout"):
        assert words
        assert all(is_heldout(word, 20) for word in words)


def test_same_arguments_same_sample(tokenizer):
    first, again, other = (make_sample("multikey", tokenizer, 600, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.input_ids, again.input_ids)
    assert not np.array_equal(first.input_ids, other.input_ids)


def test_dense_questions_come_after_their_facts(tokenizer):
    rng = np.random.default_rng(1)
    text = filler(tokenizer, rng, "heldout", 2048, "code")
    ids, roles = dense_sequence(tokenizer, text, 2048, rng, 12)
    assert len(ids) == len(roles) == 2048
    whole = tokenizer.decode(ids)
    asked = re.findall(r"Answer: " + NEEDLE, whole)
    assert asked
    for key, value in asked:
        said = f"The secret number of {key} is {value}"
        assert whole.index(said + ".") < whole.index(f"Answer: {said}")
    answers = tokenizer.decode(ids[roles == tasks.ANSWER])
    assert all(value in answers for _, value in asked)


def test_errors_name_what_is_wrong(tokenizer):
    with pytest.raises(ValueError, match="task='riddle' is unknown; use one of needle"):
        make_sample("riddle", tokenizer, 512, 0)
    with pytest.raises(ValueError, match=r"length=100 is too short .* at least \d+ tokens"):
        make_sample("multikey", tokenizer, 100, 0)
    with pytest.raises(ValueError, match="split='dev'"):
        make_sample("needle", tokenizer, 512, 0, "dev")
    with pytest.raises(ValueError, match="seed=-1"):
        make_sample("needle", tokenizer, 512, -1)
    with pytest.raises(ValueError, match="give at least length=99"):
        dense_sequence(tokenizer, np.zeros(5, np.int64), 99, np.random.default_rng(0), 1)


def test_shipped_backbone_finds_heldout_needles(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) <= 7_000_000
    for task in RETRIEVAL:
        sample = make_sample(task, tokenizer, 1024, seed=1)
        prompt = torch.from_numpy(sample.input_ids[None, : sample.start])
        size = sample.stop - sample.start
        written = model.generate(prompt, max_new_tokens=size, do_sample=False)
        assert tokenizer.decode(written[0, sample.start :]) == sample.answer
