"""Every source asks its own question of its own document, and says where the evidence is."""

from __future__ import annotations

from random import Random

import pytest

from elasticore.data import SOURCES, TASKS


@pytest.mark.parametrize("name", SOURCES)
def test_a_record_becomes_a_prompt_with_its_question_and_its_answer(name, records):
    source = SOURCES[name]
    for record in records(name, 6):
        assert set(source.columns) <= set(record)
        example = source.make(record, [], Random(0))
        assert example.task in TASKS
        assert example.task in source.tasks
        assert example.prompt == example.prompt.strip()
        answer = record.get("answer") or record.get("summary") or record.get("middle")
        assert example.answer == answer


def test_chatqa2_asks_about_the_document_wherever_it_is(records):
    narrative, whole = records("chatqa2", 2)
    example = SOURCES["chatqa2"].make(narrative, [], Random(0))
    assert example.prompt.startswith(narrative["sub-paragraphs"])
    assert example.prompt.endswith(narrative["question"])
    example = SOURCES["chatqa2"].make(whole, [], Random(0))
    assert example.prompt.startswith("Article:")
    assert not example.prompt.endswith("Assistant:")
    listed = SOURCES["chatqa2"].make({**whole, "answer": ["one", "two"]}, [], Random(0))
    assert listed.answer == "one"


def test_musique_marks_exactly_the_supporting_passages_among_all(records):
    asked, *company = records("musique", 4)
    example = SOURCES["musique"].make(asked, company, Random(0))
    found = {example.prompt[start:stop] for start, stop in example.evidence}
    assert found == {
        f"{one['title']}\n{one['paragraph_text']}"
        for one in asked["paragraphs"]
        if one["is_supporting"]
    }
    for one in (asked, *company):
        for passage in one["paragraphs"]:
            assert example.prompt.count(passage["paragraph_text"]) == 1
    # A passage that two questions share stands there once, and is evidence still.
    shared = SOURCES["musique"].make(asked, [asked], Random(0))
    assert len(shared.evidence) == 2


def test_xsum_shows_solved_articles_before_the_one_that_is_asked(records):
    asked, *company = records("xsum", 3)
    example = SOURCES["xsum"].make(asked, company, Random(0))
    assert example.task == "in_context_learning"
    assert all(one["summary"] in example.prompt for one in company)
    assert asked["summary"] not in example.prompt
    ((start, stop),) = example.evidence
    assert example.prompt[start:stop] == asked["document"]
    assert SOURCES["xsum"].make(asked, [], Random(0)).task == "summarization"


def test_colt_keeps_the_code_on_both_sides_of_the_gap_as_it_is(records):
    without, linked = records("colt", 2)
    for record in (without, linked):
        example = SOURCES["colt"].make(record, [], Random(0))
        assert f"{record['prefix']}<gap/>{record['suffix']}" in example.prompt
    assert "def load(n): ..." in example.prompt
    assert SOURCES["colt"].make({**linked, "cross_file_dependency": None}, [], Random(0))


def test_the_official_mixture_names_its_tasks_in_either_form(records):
    record = records("official", 4)[3]
    example = SOURCES["official"].make(record, [], Random(0))
    as_text = {**record, "metadata": str(record["metadata"])}
    assert SOURCES["official"].make(as_text, [], Random(0)) == example
    assert example.task == "code"
    assert "\ufeff" not in example.prompt
    other = {**record, "metadata": {"task": "Other"}}
    assert SOURCES["official"].make(other, [], Random(0)) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chatqa2", {"question": "User:  Assistant:"}),
        ("chatqa2", {"answer": []}),
        ("musique", {"answerable": False}),
        ("musique", {"question": " "}),
        ("colt", {"middle": " \n"}),
        ("govreport", {"report": None}),
        ("xsum", {"document": ""}),
    ],
)
def test_a_record_without_question_or_answer_is_left_out(name, change, records):
    record = {**records(name, 1)[0], **change}
    assert SOURCES[name].make(record, [], Random(0)) is None
