"""The RULER-like suite: exact lengths, and answers that follow from the text and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import elasticore.eval.corpus as corpus
from elasticore.eval.corpus import Document, is_heldout
from elasticore.eval.ruler_like import RULER_LIKE, make_ruler_sample
from elasticore.eval.ruler_like import text as ruler_text
from elasticore.eval.ruler_like import words as ruler_words

BACKBONE = Path(corpus.__file__).parents[1] / "assets" / "tiny" / "backbone"
NEEDLE = re.compile(r"^The secret (?:number|uuid) of (.+) is (\S+)\.$", re.MULTILINE)
ASSIGNMENT = re.compile(r"^VAR (\w+) = (?:VAR )?(\w+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.fixture(scope="module")
def pieces():
    """One token per character, in SentencePiece's manner: a space before the text, and `<s>`."""
    tokens = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    tokens += [chr(i) for i in range(33, 127)]
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% if not thinking %}(no thoughts)\n{% endif %}"
        "{% endif %}"
    )
    return fast


@pytest.fixture(scope="module")
def regex():
    """Byte-level BPE behind the pattern of Llama 3 and Qwen, in which ".\\n" is one piece."""
    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    text = "".join(ruler_text._paragraphs("heldout")) + "Question: what?\nAnswer: this.\n" * 99
    tokenizer.train_from_iterator([text + " ....\n" * 99], trainer)
    assert tokenizer.token_to_id(".Ċ") and tokenizer.token_to_id("?Ċ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


CASES = [
    (task, name, n)
    for task in RULER_LIKE
    for name, n in [("tiny", 900), ("tiny", 5000), ("pieces", 6000), ("regex", 2000)]
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)), scope="module")
def case(request):
    task, name, length = request.param
    tokenizer = request.getfixturevalue(name)
    return (
        tokenizer,
        length,
        [make_ruler_sample(task, tokenizer, length, seed) for seed in range(4)],
    )


def test_length_is_never_above_and_hardly_below(case):
    tokenizer, length, samples = case
    for sample in samples:
        assert len(sample.input_ids) == sample.stop
        used = sample.start + max(RULER_LIKE[sample.task].tokens, sample.stop - sample.start)
        # What is left has no room for one more word of prose, or entry of a list: "137. word".
        word = 28 if tokenizer.bos_token else 12
        assert length - word < used <= length


def test_tokens_are_those_of_the_whole_text(case):
    tokenizer, _, samples = case
    for sample in samples:
        whole = sample.user + "\n" + sample.prefix + sample.answer
        assert tokenizer(whole)["input_ids"] == sample.input_ids.tolist()
        assert tokenizer.decode(sample.input_ids[sample.start :].tolist()).endswith(
            sample.answer.strip()
        )


def test_answers_follow_from_the_text(case):
    for sample in case[2]:
        assert sorted(solve(sample.task, sample.user)) == sorted(sample.references)
        assert RULER_LIKE[sample.task].metric(sample.answer, sample.references) == 1


def test_evidence_is_where_the_answers_are(case):
    tokenizer, _, samples = case
    for sample in samples:
        lines = [tokenizer.decode(sample.input_ids[a:b].tolist()) for a, b in sample.evidence]
        assert all(0 < a < b <= sample.start for a, b in sample.evidence)
        assert all(any(line.strip() in sample.user for line in lines) for line in lines)
        assert all(any(answer in line for line in lines) for answer in sample.references)
        if RULER_LIKE[sample.task].statements:
            assert len(lines) == len(sample.depths) == RULER_LIKE[sample.task].statements
            assert all(sample.user.count(line.strip()) == 1 for line in lines)
        else:  # each place of each answer in the text that is asked about
            asked = sample.user[sample.user.rindex("Below") :].split()
            assert Counter(line.strip() for line in lines) == {
                answer: asked.count(answer) for answer in sample.references
            }


def solve(task: str, user: str) -> list[str]:
    """The answers, from the text of the prompt alone; fails where there are two."""
    text, question = user.rsplit("Question: ", 1)
    if task.startswith("niah"):
        hidden = defaultdict(list)
        for key, value in NEEDLE.findall(text):
            hidden[key].append(value)
        everything = [value for values in hidden.values() for value in values]
        assert len(set(everything)) == len(everything)
        assert {len(values) for values in hidden.values()} == {4 if "multivalue" in task else 1}
        count = {"niah_multikey_1": 4, "niah_multiquery": 4}.get(task, 1)
        assert (
            len(hidden) > 5
            if task in ("niah_multikey_2", "niah_multikey_3")
            else len(hidden) == count
        )
        asked = re.search(r"secret \w+ of (.+) in the text above", question)[1]
        return [value for key in re.split(", | and ", asked) for value in hidden[key]]
    if task == "vt":
        pairs = ASSIGNMENT.findall(text)
        assigned = dict(pairs)
        assert len(pairs) == len(assigned) == 10  # five in the example
        value = re.search(r"the value (\d+)", question)[1]
        found = []
        for name in assigned:
            source = name
            while source in assigned:
                source = assigned[source]
            found += [name] if source == value else []
        return found
    if task == "cwe":
        counts = Counter(
            re.findall(r"^\d+\. (\S+)$", text[text.rindex("Below is") :], re.MULTILINE)
        )
        often, seldom = (6, 1) if max(counts.values()) == 6 else (30, 3)
        found = [word for word, count in counts.items() if count == often]
        assert sorted(counts.values())[1:-10] == [seldom] * (len(counts) - 11)
        assert not any(word in other for word in found for other in counts if other != word)
        return found
    if task == "fwe":
        words = Counter(text.split("\n")[1].split())
        (dots, _), *ranked = words.most_common()
        assert dots == "...."
        assert ranked[2][1] > ranked[3][1]
        return [word for word, _ in ranked[:3]]
    return [answer_question(text, question)]


def answer_question(text: str, question: str) -> str:
    name = re.search(r"([A-Z]\w{6})(?: born)?\?", question)[1]

    def one(pattern: str) -> str:
        (found,) = set(re.findall(f"^{pattern}$", text, re.MULTILINE))
        return found

    company = lambda: one(rf"{name} works for the company (\w+)\.")  # noqa: E731
    spouse = lambda: one(rf"{name} is married to (\w+)\.")  # noqa: E731
    book = lambda: one(rf"{name} wrote the book (\w+)\.")  # noqa: E731
    if "head office" in question:
        return one(rf"The company {company()} has its head office in (\w+)\.")
    if "was the spouse" in question:
        return one(rf"The birthplace of {spouse()} is the town of (\w+)\.")
    if "hero" in question:
        return one(rf"The hero of the book {book()} is called (\w+)\.")
    if "employer" in question:
        return company()
    if "spouse" in question:
        return spouse()
    if "title" in question:
        return book()
    return one(rf"{name} was born in the town of (\w+)\.")


@pytest.mark.parametrize("task", [task for task in RULER_LIKE if RULER_LIKE[task].statements])
def test_depths_are_as_asked_for(tiny, task):
    count = RULER_LIKE[task].statements
    wanted = [0.0, 1.0, 0.5, 0.25, 0.75][:count]
    wanted = sorted(wanted) if task == "vt" else wanted
    sample = make_ruler_sample(task, tiny, 4000, 1, depths=wanted)
    # As near as the lines allow; a paragraph has at most 500 characters.
    assert np.abs(np.subtract(sample.depths, wanted)).max() < 0.03
    starts = [start for start, _ in sample.evidence]
    assert np.argsort(starts, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()


def test_drawn_depths_are_everywhere(tiny):
    depths = [make_ruler_sample("niah_single_2", tiny, 3000, seed).depths[0] for seed in range(60)]
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() >= 5


def test_the_same_seed_hides_the_same_at_any_length(tiny):
    short, again, long, other = (
        make_ruler_sample("niah_multikey_1", tiny, length, seed)
        for length, seed in [(900, 7), (900, 7), (2000, 7), (900, 8)]
    )
    assert np.array_equal(short.input_ids, again.input_ids)
    assert short.references == long.references != other.references


def test_a_corpus_and_a_seed_fix_every_bit(pieces, monkeypatch):
    def documents(split, kind):
        words = [f"{a}{b}{c}ing" for a in "bdgkm" for b in "aeiou" for c in "lnprs"]
        half = words[: len(words) // 2] if split == "train" else words[len(words) // 2 :]
        lines = [" ".join(half[i : i + 12]).capitalize() + "." for i in range(0, len(half), 12)]
        return (Document("made.py", "prose", "\n\n".join(lines)),)

    caches = ruler_words.words, ruler_text._paragraphs
    for module in (ruler_words, ruler_text):
        monkeypatch.setattr(module, "documents", documents)
    for cache in caches:
        cache.cache_clear()
    digest = hashlib.sha256()
    for task in RULER_LIKE:
        for split in ("train", "heldout"):
            sample = make_ruler_sample(task, pieces, 3000, 0, split)
            digest.update(sample.input_ids.astype("<i8").tobytes())
            digest.update(repr(sample.evidence).encode())
    for cache in caches:
        cache.cache_clear()
    assert digest.hexdigest() == (
        "e99800977932eee6ead3c12130b9801c7a25d2657c972b39c5e73a402884f4e3"
    )


def test_splits_share_no_words_names_or_numbers():
    assert set(ruler_words.words("heldout")).isdisjoint(ruler_words.words("train"))
    for split in ("train", "heldout"):
        source = ruler_words.Source(np.random.default_rng(0), split)
        for kind in ("number", "value", "uuid", "variable", "coded", "name"):
            drawn = source.draw(kind, 50)
            assert len(set(drawn)) == 50
            assert all(is_heldout(item, 20) == (split == "heldout") for item in drawn)
        known = set(ruler_words.words(split))
        assert all(set(key.split()) <= known for key in source.draw("key", 50))


def test_more_words_than_the_corpus_has():
    source = ruler_words.Source(np.random.default_rng(0), "heldout")
    found = source.words(5000)
    assert len(set(found)) == 5000
    assert sum("-" in word for word in found) == 5000 - len(ruler_words.words("heldout"))


@pytest.mark.parametrize("task", ["niah_multivalue", "vt", "cwe", "fwe", "qa_2"])
def test_chat_template(pieces, task):
    plain = make_ruler_sample(task, pieces, 4000, 2)
    sample = make_ruler_sample(task, pieces, 4000, 2, template={"thinking": False})
    prompt = pieces.apply_chat_template(
        [{"role": "user", "content": sample.user}], add_generation_prompt=True, tokenize=False
    )
    whole = pieces(prompt + sample.prefix + sample.answer, add_special_tokens=False)["input_ids"]
    text = pieces.decode(sample.input_ids.tolist())
    assert text == pieces.decode(whole)
    assert "(no thoughts)" in text
    assert "(no thoughts)" not in pieces.decode(
        make_ruler_sample(task, pieces, 4000, 2, template={"thinking": True}).input_ids.tolist()
    )
    assert sample.references == plain.references
    assert (
        4000 - 28 < sample.start + max(RULER_LIKE[task].tokens, sample.stop - sample.start) <= 4000
    )
    assert all(
        any(answer in pieces.decode(sample.input_ids[a:b].tolist()) for a, b in sample.evidence)
        for answer in sample.references
    )


def test_the_shortest_length_named_is_the_shortest(tiny):
    for task in RULER_LIKE:
        with pytest.raises(ValueError, match=f"too short for task='{task}'") as error:
            make_ruler_sample(task, tiny, 20, 0)
        least = int(re.search(r"at least (\d+)", str(error.value))[1])
        if RULER_LIKE[task].statements == 0:  # a count of words needs a text as well
            with pytest.raises(ValueError, match="too short") as error:
                make_ruler_sample(task, tiny, least, 0)
            least = int(re.search(r"at least (\d+)", str(error.value))[1])
        assert make_ruler_sample(task, tiny, least, 0).stop <= least
        with pytest.raises(ValueError, match=f"use at least {least} "):
            make_ruler_sample(task, tiny, least - 1, 0)


def test_errors_name_what_is_wrong(tiny):
    with pytest.raises(ValueError, match="task='niah' is unknown; use one of niah_single_1"):
        make_ruler_sample("niah", tiny, 512, 0)
    with pytest.raises(ValueError, match="split='dev'"):
        make_ruler_sample("vt", tiny, 512, 0, "dev")
    with pytest.raises(ValueError, match="seed=-1"):
        make_ruler_sample("vt", tiny, 512, -1)
    for wrong in ([0.5], [0.1, 1.2], [0.1] * 3):
        with pytest.raises(ValueError, match="must be 2 numbers from 0 to 1"):
            make_ruler_sample("qa_2", tiny, 900, 0, depths=wrong)
    with pytest.raises(ValueError, match="5 numbers from 0 to 1 that ascend"):
        make_ruler_sample("vt", tiny, 900, 0, depths=[0.1, 0.2, 0.3, 0.5, 0.4])
    with pytest.raises(ValueError, match="needs a chat template"):
        make_ruler_sample("qa_2", tiny, 900, 0, template={})
