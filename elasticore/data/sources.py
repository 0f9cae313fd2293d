"""Where training samples come from: how a record of each source becomes a prompt and an answer.

The five sources are those of the paper (section 4.1); the prompts are our own. Two of them are
short, so several of their records make one long prompt: passages of other questions are hay around
those of a MuSiQue question, and solved articles come before the one of XSum that is asked.

A new source is one more entry of :data:`SOURCES`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

__all__ = ["OFFICIAL_TASKS", "SOURCES", "TASKS", "Example", "Source"]

TASKS = ("single_qa", "multihop_qa", "summarization", "code", "in_context_learning")
"""The paper's tasks, in the order of the official code's task ids."""

OFFICIAL_TASKS = ("Single QA", "MultiHop QA", "Summarization", "Code", "In-Context Learning")
"""The names of :data:`TASKS` in the official code's files."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, as text.

    Attributes
    ----------
    prompt, answer
        What the user says and what the model is to say.
    task
        One of :data:`TASKS`.
    evidence
        Characters ``(start, stop)`` of the prompt that the answer needs, where that is known.
    """

    prompt: str
    answer: str
    task: str
    evidence: tuple[tuple[int, int], ...] = ()


Make = Callable[[Record, Sequence[Record], Random], Example | None]


@dataclass(frozen=True)
class Source:
    """One source.

    Attributes
    ----------
    name
        What users type.
    make
        ``(record, company, random) -> Example``, or None for a record that cannot be asked.
        ``company`` are further records, empty unless the source has some.
    tasks
        The tasks that its examples can have.
    columns
        Fields that every record must have.
    licence
        Of the data, as far as its card says.
    hub, subsets, revision, split
        Where it is on the Hugging Face hub; ``hub`` is None if it is not.
    get
        How to get it, where it is not on the hub.
    company
        Whether an example is made longer with the records after its own: ``"none"``; ``"lent"``,
        they are asked in examples of their own as well; ``"spent"``, they are not.
    """

    name: str
    make: Make
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    licence: str
    hub: str | None = None
    subsets: tuple[str | None, ...] = (None,)
    revision: str | None = None
    split: str = "train"
    get: str = ""
    company: Literal["none", "lent", "spent"] = "none"


class _Evidence(str):
    """A piece of a prompt that its answer needs."""


def _example(pieces: Iterable[str], answer: str, task: str) -> Example | None:
    pieces = list(pieces)
    evidence, at = [], 0
    for piece in pieces:
        if isinstance(piece, _Evidence):
            evidence.append((at, at + len(piece)))
        at += len(piece)
    if not at or not answer:
        return None
    return Example("".join(pieces), answer, task, tuple(evidence))


def _text(value: object) -> str:
    """A text field without byte order marks and outer blanks; a missing one is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__} {str(value)[:60]!r}")
    return value.replace("\ufeff", "").strip()


def _chatqa2(record: Record, company: Sequence[Record], random: Random) -> Example | None:
    """A question about one document.

    In the subset ``long_sft`` the question holds the document, between a speaker's names; in
    ``NarrativeQA_131072`` the document has a field of its own.
    """
    question = _text(record["question"]).removeprefix("User:").removesuffix("Assistant:").strip()
    answer = record["answer"]
    answer = _text(answer[0] if isinstance(answer, list) and answer else answer or None)
    document = _text(record.get("sub-paragraphs"))
    pieces = [document, "\n\nUse the text above to answer: ", question] if document else [question]
    return _example(pieces if question else (), answer, "single_qa")


def _musique(record: Record, company: Sequence[Record], random: Random) -> Example | None:
    """A question whose answer takes several passages, among passages that do not matter."""
    question = _text(record["question"])
    if not question or record.get("answerable") is False:
        return None
    needed: dict[str, bool] = {}
    for one in (record, *company):
        for passage in one["paragraphs"]:
            text = f"{_text(passage['title'])}\n{_text(passage['paragraph_text'])}"
            supporting = one is record and bool(passage.get("is_supporting"))
            needed[text] = needed.get(text, False) or supporting
    passages = list(needed)
    random.shuffle(passages)
    pieces = ["Here are passages from many articles.\n\n"]
    for passage in passages:
        pieces += [_Evidence(passage) if needed[passage] else passage, "\n\n"]
    pieces.append(
        "Some of these passages together tell the answer to the question that follows. Give only "
        f"the answer.\n\nQuestion: {question}"
    )
    return _example(pieces, _text(record["answer"]), "multihop_qa")


def _colt(record: Record, company: Sequence[Record], random: Random) -> Example | None:
    """A gap in a file of code, after what the file uses of other files."""
    pieces = []
    for other in record.get("cross_file_dependency") or ():
        if declared := _text(other.get("abstraction")):
            pieces.append(f"In {_text(other.get('code_file_path')) or 'another file'}:\n\n")
            pieces.append(f"{declared}\n\n")
    path = _text(record.get("code_file_path")) or "the file"
    before, after = record["prefix"] or "", record.get("suffix") or ""
    pieces.append(f"Now {path}, in which <gap/> marks missing code:\n\n{before}<gap/>{after}\n\n")
    pieces.append("Write the missing code and nothing else.")
    return _example(pieces, _text(record["middle"]), "code")


def _govreport(record: Record, company: Sequence[Record], random: Random) -> Example | None:
    """A report and its summary."""
    report, summary = _text(record["report"]), _text(record["summary"])
    ask = "\n\nThat was a government report. Sum up what it examined, found and recommended."
    return _example([report, ask] if report else (), summary, "summarization")


def _xsum(record: Record, company: Sequence[Record], random: Random) -> Example | None:
    """An article and its one-sentence summary, after others that show how it is done."""
    pieces = ["Sum up each article in one sentence.\n\n"]
    pieces += [
        f"Article: {_text(one['document'])}\nSummary: {_text(one['summary'])}\n\n"
        for one in company
    ]
    article = _text(record["document"])
    pieces += ["Article: ", _Evidence(article), "\nSummary:"]
    task = "in_context_learning" if company else "summarization"
    return _example(pieces if article else (), _text(record["summary"]), task)


def _official(record: Record, company: Sequence[Record], random: Random) -> Example | None:
    """A sample of the paper's own mixture, before packing."""
    about = record["metadata"]
    about = ast.literal_eval(about) if isinstance(about, str) else about
    if about.get("task") not in OFFICIAL_TASKS:
        return None
    parts = [_text(record["context"]), _text(record["question"])]
    if about.get("is_prefix", True):
        parts.reverse()
    prompt = "\n\n".join(part for part in parts if part)
    return _example([prompt], _text(record["answer"]), TASKS[OFFICIAL_TASKS.index(about["task"])])


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "chatqa2",
            _chatqa2,
            tasks=("single_qa",),
            columns=("question", "answer"),
            licence="CC BY-NC 2.0; parts under OpenAI's terms of use",
            hub="nvidia/ChatQA2-Long-SFT-data",
            subsets=("long_sft", "NarrativeQA_131072"),
        ),
        Source(
            "musique",
            _musique,
            tasks=("multihop_qa",),
            columns=("paragraphs", "question", "answer"),
            licence="CC BY 4.0",
            hub="dgslibisey/MuSiQue",
            company="lent",
        ),
        Source(
            "colt",
            _colt,
            tasks=("code",),
            columns=("prefix", "middle"),
            licence="CC BY 4.0",
            get="download CoLT-132K.zip from https://zenodo.org/records/15019938 and unpack it",
        ),
        Source(
            "govreport",
            _govreport,
            tasks=("summarization",),
            columns=("report", "summary"),
            licence="CC BY 4.0",
            hub="ccdv/govreport-summarization",
        ),
        Source(
            "xsum",
            _xsum,
            tasks=("in_context_learning", "summarization"),
            columns=("document", "summary"),
            licence="not stated; GEM's copy says CC BY-SA 4.0",
            hub="EdinburghNLP/xsum",
            revision="refs/convert/parquet",
            company="spent",
        ),
        Source(
            "official",
            _official,
            tasks=TASKS,
            columns=("context", "question", "answer", "metadata"),
            licence="that of its sources",
            get="download LCM_group/qwen_mix_sft_64K6 or llama_mix_sft_64K6 from ModelScope",
        ),
    )
}
"""The paper's five sources by name, and ``official``, its authors' own mixture of them."""
