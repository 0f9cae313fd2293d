"""Scores against golden cases: what the benchmarks' own scripts give, worked out by hand."""

import pytest

from elasticore.eval.metrics import (
    choice,
    classification,
    contains_all,
    contains_any,
    count,
    edit_similarity,
    first_line,
    qa_f1,
    retrieval,
    rouge_l,
)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The Cat.", ["a cat"], 1.0),  # articles, case and punctuation
        ("cat dog", ["cat"], 2 / 3),  # precision 1/2, recall 1
        ("cat cat", ["cat"], 2 / 3),  # a word of the reference is found once
        ("cat cat dog", ["cat cat"], 4 / 5),
        ("dog", ["cat", "the dog"], 1.0),  # the best reference
        ("  cat \n dog ", ["cat\tdog"], 1.0),  # white space
        ("well-known", ["well known"], 0.0),  # punctuation is deleted, not replaced
        ("well-known", ["wellknown"], 1.0),
        ("the U.S.A.", ["usa"], 1.0),
        ("“cat”", ["cat"], 0.0),  # only ASCII punctuation
        ("a.n", ["an"], 0.0),  # both become an article, and nothing is left
        ("the", ["the"], 0.0),
        ("", [""], 0.0),
        ("cat", [], 0.0),
        ("theory", ["ory"], 0.0),  # an article is a whole word
        ("Yes", ["yes"], 1.0),
    ],
)
def test_f1_of_answers(prediction, references, score):
    assert qa_f1(prediction, references) == score


def rouge(same, predicted, wanted):
    """The package's F: words of both, of the prediction, of the reference, each counted once."""
    precision, recall = same / predicted, same / wanted
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("the cat sat", ["the cat sat"], rouge(3, 3, 3)),
        ("the cat sat", ["the dog sat"], rouge(2, 3, 3)),
        ("sat cat the", ["the cat sat"], rouge(1, 3, 3)),  # the order counts
        ("The cat", ["the cat"], rouge(1, 2, 2)),  # case counts
        ("cat, sat", ["cat sat"], rouge(1, 2, 2)),  # so does punctuation
        ("cats sat", ["cat sat"], rouge(1, 2, 2)),  # no stemming
        ("the the the", ["the"], rouge(1, 1, 1)),  # repetitions do not count
        ("b. a", ["a. b"], rouge(2, 2, 2)),  # sentences are compared each with each
        ("a b.c d", ["a b. c d"], rouge(4, 4, 4)),  # every dot ends a sentence
        ("x", ["y", "x y"], rouge(1, 1, 2)),  # the best reference
        ("", ["cat"], 0.0),
        ("...", ["cat"], 0.0),  # nothing but dots
        ("cat", [""], 0.0),
        ("cat", [], 0.0),
    ],
)
def test_rouge(prediction, references, score):
    pytest.importorskip("rouge")
    assert rouge_l(prediction, references) == score


def test_rouge_of_a_sentence_too_long_for_the_package():
    pytest.importorskip("rouge")
    words = [str(i) for i in range(1001)]
    assert rouge_l(" ".join(words), [" ".join(words)]) == 0.0


CLASSES = ["Other entity", "Other", "Food", "Date", "Day"]


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Food", "Food", 1.0),
        ("Type: Food or Date", "Food", 1 / 2),
        ("food", "Food", 0.0),  # case counts
        ("Other entity", "Other entity", 1.0),  # "Other" is a part of the right name
        ("Other entity", "Other", 1 / 2),  # but the longer name counts as named
        ("Other", "Other entity", 0.0),
        ("", "Food", 0.0),
        ("nothing", "Food", 0.0),
        ("Food", "Meal", 0.0),  # no class of the list
    ],
)
def test_classification(prediction, reference, score):
    assert classification(prediction, [reference], CLASSES) == score


def test_classification_steps_over_the_class_after_a_deleted_one():
    assert classification("abc", ["abc"], ["a", "b", "abc"]) == 1 / 2  # "a" goes, "b" stays
    assert classification("abc", ["abc"], ["a", "abc", "b"]) == 1.0  # both go
    assert classification("abc", ["abc"], ["abc", "a", "b"]) == 1 / 2


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("7", ["7"], 1.0),
        ("There are 7 of 30, so 7.", ["7"], 2 / 3),
        ("17", ["7"], 0.0),  # a number is a whole run of digits
        ("7.0", ["7"], 1 / 2),
        ("07", ["7"], 0.0),
        ("seven", ["7"], 0.0),
        ("", ["7"], 0.0),
        ("-7", ["7"], 1.0),
        ("3 7", ["4", "3"], 1 / 2),
    ],
)
def test_count(prediction, references, score):
    assert count(prediction, references) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("Paragraph 12", 1.0),
        ("12", 1.0),  # a bare number is enough
        ("Paragraph 1 and Paragraph 12", 1 / 2),
        ("Paragraph 1", 0.0),
        ("Paragraph twelve", 0.0),
        ("", 0.0),
    ],
)
def test_retrieval(prediction, score):
    assert retrieval(prediction, ["Paragraph 12"]) == score


def test_retrieval_wants_a_paragraph():
    with pytest.raises(ValueError, match="'12' names no paragraph"):
        retrieval("12", ["12"])


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("return x", "return x", 1.0),
        ("abcd", "bcda", 0.75),  # 2 * 3 / 8
        ("abc", "ab", 0.8),  # 2 * 2 / 5
        ("abcdef", "abcxyzw", 0.46),  # 6 / 13 = 0.4615..., in hundredths
        ("tide", "diet", 0.25),  # difflib; the Levenshtein package would give 0.5
        ("\n\nreturn x\nmore", "return x", 1.0),  # line breaks before it, lines after it
        ("# a comment\nreturn x", "return x", 1.0),
        ("```python\nreturn x\n```", "return x", 1.0),
        ("// a comment\nreturn x", "return x", 1.0),
        ("return x  # why", "return x", 0.0),  # a comment anywhere drops the line
        ("# a comment\n\nreturn x", "return x", 0.0),  # an empty line is a line
        (" return x", "return x", 0.94),  # 16 / 17: indentation counts
        ("", "return x", 0.0),
        ("# nothing else", "", 1.0),  # two empty lines are equal
        ("x", "", 0.0),
    ],
)
def test_edit_similarity(prediction, reference, score):
    assert edit_similarity(prediction, [reference]) == score


def test_edit_similarity_of_long_lines_ignores_frequent_characters():
    # From 200 characters on, difflib sets aside what makes up more than 1 %.
    assert edit_similarity("x" + "a" * 200, ["a" * 200]) == 0.0
    assert edit_similarity("x" + "a" * 199, ["a" * 199]) == 1.0  # 0.997, in hundredths


@pytest.mark.parametrize(
    ("prediction", "line"),
    [
        ("one\ntwo", "one"),
        ("\n\none\ntwo", "one"),
        (" \none", " "),  # spaces are a line
        ("", ""),
        ("\n", ""),
    ],
)
def test_first_line(prediction, line):
    assert first_line(prediction) == line


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("The correct answer is B", "B"),
        ("  Well. The correct answer is (C), because", "C"),
        ("**The correct answer is (D)**", "D"),
        ("The correct answer is **A**.", "A"),
        ("The correct answer is A. No: The correct answer is (B)", "B"),  # brackets come first
        ("The correct answer is (A). The correct answer is (B)", "A"),
        ("The correct answer is Candidate 2", "C"),  # the first letter of a word
        ("The correct answer is (E)", None),
        ("The correct answer is: B", None),
        ("the correct answer is (B)", None),
        ("The correct answer is (b)", None),
        ("The correct answer is\n(B)", None),
        ("(B)", None),
        ("B", None),
        ("", None),
    ],
)
def test_choice(prediction, letter):
    assert choice(prediction) == letter


@pytest.mark.parametrize(
    ("prediction", "references", "all_of_them", "any_of_them"),
    [
        ("1234567", ["1234567"], 1.0, 1.0),
        ("A 1, a 3.", ["1", "2", "3", "4"], 1 / 2, 1.0),
        ("the Eiffel Tower", ["EIFFEL tower"], 1.0, 1.0),
        ("112", ["12"], 1.0, 1.0),  # anywhere, also within a number
        ("nothing", ["1", "2"], 0.0, 0.0),
        ("", ["1"], 0.0, 0.0),
        ("a\x00b", ["a\nb"], 1.0, 1.0),  # control characters are line breaks
        ("a\tb", ["a\tb"], 0.0, 0.0),  # in the prediction only
        (" x ", [" x"], 0.0, 0.0),
        ("x", ["x", "x"], 1.0, 1.0),
    ],
)
def test_ruler_matches(prediction, references, all_of_them, any_of_them):
    assert contains_all(prediction, references) == all_of_them
    assert contains_any(prediction, references) == any_of_them


@pytest.mark.parametrize("metric", [contains_all, contains_any])
def test_ruler_wants_references(metric):
    with pytest.raises(ValueError, match="at least one"):
        metric("1", [])


@pytest.mark.parametrize(
    "metric", [qa_f1, count, retrieval, edit_similarity, contains_all, contains_any]
)
def test_one_string_is_no_list_of_references(metric):
    with pytest.raises(TypeError, match="pass a list"):
        metric("Paragraph 1", "Paragraph 1")
