"""The scores of RULER, LongBench and LongBench-v2, as the benchmarks' own scripts define them.

Every function scores one answer from 0 to 1. The odd corners of the originals are kept, for their
numbers are what published results are made of: https://github.com/THUDM/LongBench
(`LongBench/metrics.py`, `LongBench/eval.py`, and `pred.py` for v2) and
https://github.com/NVIDIA/RULER (`scripts/eval`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

__all__ = [
    "choice",
    "classification",
    "contains_all",
    "contains_any",
    "count",
    "edit_similarity",
    "first_line",
    "qa_f1",
    "retrieval",
    "rouge_l",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_COMMENT = re.compile(r"`|#|//")
_CONTROL = re.compile(r"[\x00-\x1f]")


def _listed(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str):
        raise TypeError(f"references={references!r} is one string; pass a list: [references]")
    return references


def _best(score: Callable[[str], float], references: Sequence[str]) -> float:
    """The best of the scores against each reference; 0 if there is none."""
    return max(map(score, _listed(references)), default=0.0)


# ---- LongBench ----


def first_line(prediction: str) -> str:
    """The first line that is not empty: all that counts in the few-shot tasks.

    Parameters
    ----------
    prediction
        What the model wrote for `trec`, `triviaqa` or `samsum`. A line of spaces is not empty.
    """
    return prediction.lstrip("\n").split("\n")[0]


def _words(text: str) -> list[str]:
    """Lower case, without punctuation, then without articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def qa_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words that prediction and reference share, with their multiplicity.

    ASCII punctuation is deleted, not replaced: "well-known" is one word. Two texts that are empty
    after that score 0.

    Parameters
    ----------
    prediction
        The answer.
    references
        Right answers; the one that fits best counts.
    """
    words = Counter(_words(prediction))

    def score(reference: str) -> float:
        wanted = Counter(_words(reference))
        same = (words & wanted).total()
        if not same:
            return 0.0
        precision, recall = same / words.total(), same / wanted.total()
        return 2 * precision * recall / (precision + recall)

    return _best(score, references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (F) over sentences, as the package `rouge` computes it.

    Case and punctuation count; sentences end at every "."; a word counts once however often it
    comes. Not the numbers of `rouge-score`, which stems or lowers and counts repetitions.

    Parameters
    ----------
    prediction
        The summary.
    references
        Right summaries; the one that fits best counts.

    Returns
    -------
    float
        At most 1 - 5e-9, for the package keeps its denominator from 0. What the package refuses
        is 0, as in the benchmark: no text but dots, or a sentence too long for its recursion.
    """
    from rouge import Rouge  # of the extra "eval"; the other scores do without

    package = Rouge(metrics=["rouge-l"])

    def score(reference: str) -> float:
        try:
            return float(package.get_scores(prediction, reference)[0]["rouge-l"]["f"])
        except (ValueError, RecursionError):
            return 0.0

    return _best(score, references)


def classification(prediction: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them.

    A named class that is a part of the right class's name does not count as named. The original
    deletes such classes from the list it walks through, so the class after a deleted one is not
    looked at; so it is here.

    Parameters
    ----------
    prediction
        The answer's :func:`first_line`.
    references
        Right classes.
    classes
        All classes, in the order of the data set.
    """

    def score(reference: str) -> float:
        named = [name for name in classes if name in prediction]
        place = 0
        while place < len(named):
            if named[place] in reference and named[place] != reference:
                named.remove(named[place])
            place += 1
        return 1 / len(named) if reference in named else 0.0

    return _best(score, references)


def count(prediction: str, references: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the right one.

    Parameters
    ----------
    prediction
        The answer; every run of digits is a number.
    references
        Right counts, in digits.
    """
    numbers = _NUMBER.findall(prediction)
    return _best(lambda right: numbers.count(str(right)) / max(len(numbers), 1), references)


def retrieval(prediction: str, references: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the right paragraph's.

    Parameters
    ----------
    prediction
        The answer; every run of digits is a number.
    references
        Right paragraphs, as "Paragraph 7".

    Raises
    ------
    ValueError
        If a reference is not of that form.
    """
    right = [(_PARAGRAPH.search(reference), reference) for reference in _listed(references)]
    wrong = [reference for found, reference in right if not found]
    if wrong:
        raise ValueError(f"reference {wrong[0]!r} names no paragraph; use 'Paragraph <number>'")
    return count(prediction, [found[1] for found, _ in right if found])


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """`fuzzywuzzy.fuzz.ratio` of the first line of code, rounded to hundredths.

    The first line without "`", "#" or "//" is taken, even if it is empty; line breaks before the
    first line are skipped. LongBench's requirements install fuzzywuzzy without python-Levenshtein,
    where the ratio is `difflib`'s; with that package present fuzzywuzzy computes another one.

    Parameters
    ----------
    prediction
        The completion.
    references
        Right next lines; the most similar one counts.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not _COMMENT.search(line)), "")
    return _best(lambda r: round(100 * SequenceMatcher(None, code, r).ratio()) / 100, references)


# ---- LongBench-v2 ----


def choice(prediction: str) -> str | None:
    """The letter of a multiple-choice answer, or None if there is none of the agreed form.

    "The correct answer is (A)" anywhere comes before "The correct answer is A" anywhere; asterisks
    are ignored, case is not. The second form takes the first letter of a word, as in "Candidate".

    Parameters
    ----------
    prediction
        The answer.

    Returns
    -------
    str or None
        "A", "B", "C" or "D". None is a wrong answer: it earns nothing.
    """
    text = prediction.strip().replace("*", "")
    for form in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if found := re.search(form, text):
            return found[1]
    return None


# ---- RULER ----


def _contained(prediction: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference is in the prediction, whatever the case."""
    if not _listed(references):
        raise ValueError("references is empty; RULER's scores need at least one")
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def contains_all(prediction: str, references: Sequence[str]) -> float:
    """RULER's `string_match_all`: the share of the references that the prediction contains.

    Parameters
    ----------
    prediction
        The answer; control characters are line breaks.
    references
        What should be in it, whatever the case.

    Raises
    ------
    ValueError
        If there is no reference.
    """
    found = _contained(prediction, references)
    return sum(found) / len(found)


def contains_any(prediction: str, references: Sequence[str]) -> float:
    """RULER's `string_match_part`: 1 if the prediction contains any of the references.

    Parameters
    ----------
    prediction
        The answer; control characters are line breaks.
    references
        Any of these is right, whatever the case.

    Raises
    ------
    ValueError
        If there is no reference.
    """
    return float(any(_contained(prediction, references)))
