"""A tokenizer with a chat template, and a few records of every source in its real schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from elasticore.assets import tiny

TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message.role }}\n{{ message.content | trim }}"
    "<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)
WORDS = ("river", "night", "paper", "city", "music", "law", "winter", "stone", "garden", "ship")


@pytest.fixture(scope="session")
def plain() -> Any:
    """The tiny model's tokenizer, which has no chat template."""
    return AutoTokenizer.from_pretrained(tiny() / "backbone")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The same with a chat template, built as those of Llama and Qwen are."""
    made = AutoTokenizer.from_pretrained(tiny() / "backbone")
    made.chat_template = TEMPLATE
    return made


def text(random: Random, words: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(words))


def chatqa2(random: Random, number: int) -> dict[str, Any]:
    """nvidia/ChatQA2-Long-SFT-data: top-level JSON arrays.

    In NarrativeQA_131072 the document is ``sub-paragraphs``; in long_sft that is empty, and the
    question is the whole prompt between the names of two speakers.
    """
    document, question = text(random, 150), f"Who is {text(random, 3)}?"
    if number % 2:
        question, document = f"User: Article: {document}\n\n{question}\n\nAssistant:", ""
    return {
        "paragraph_id": f"p{number}",
        "word count": 150,
        "sub-paragraphs": document,
        "question": question,
        "answer": text(random, 4),
    }


def musique(random: Random, number: int) -> dict[str, Any]:
    """MuSiQue v1.0 (stonybrooknlp/musique; dgslibisey/MuSiQue on the hub): JSON lines."""
    return {
        "id": f"2hop__{number}_{number + 1}",
        "paragraphs": [
            {
                "idx": index,
                "title": text(random, 2),
                "paragraph_text": f"{number}.{index} {text(random, 30)}",
                "is_supporting": index in (1, 4),
            }
            for index in range(6)
        ],
        "question": f"Which {text(random, 4)}?",
        "question_decomposition": [
            {"id": number, "question": "a >> b", "answer": "x", "paragraph_support_idx": 1}
        ],
        "answer": text(random, 2),
        "answer_aliases": [],
        "answerable": True,
    }


def colt(random: Random, number: int) -> dict[str, Any]:
    """CoLT-132K (Zenodo 15019938): JSON lines, with empty dependencies in some languages."""
    return {
        "project_dir": "project",
        "code_file_path": f"project/module{number}.py",
        "namespace": "project.module",
        "function_name": "run",
        "prefix": f"import other\n\n\ndef run():\n    # {text(random, 80)}\n    value = ",
        "middle": f"other.load({number})",
        "suffix": f"\n    return value  # {text(random, 20)}\n",
        "cross_file_dependency": [
            {"code_file_path": "project/other.py", "abstraction": "def load(n): ..."}
        ]
        if number % 2
        else [],
        "similar_functions": [],
    }


def govreport(random: Random, number: int) -> dict[str, Any]:
    """ccdv/govreport-summarization."""
    return {"report": text(random, 180), "summary": text(random, 20)}


def xsum(random: Random, number: int) -> dict[str, Any]:
    """EdinburghNLP/xsum."""
    return {"document": text(random, 50), "summary": text(random, 8), "id": str(number)}


def official(random: Random, number: int) -> dict[str, Any]:
    """LCM_group/qwen_mix_sft_64K6, the authors' mixture before packing."""
    tasks = ("Single QA", "MultiHop QA", "Summarization", "Code", "In-Context Learning")
    about = {"task": tasks[number % 5], "is_prefix": number % 2 == 0, "length": 200}
    return {
        "context": f"\ufeffContext: {text(random, 150)}",
        "question": f"Question: {text(random, 5)}?",
        "answer": text(random, 4),
        "metadata": about,
    }


RECORDS = {make.__name__: make for make in (chatqa2, musique, colt, govreport, xsum, official)}


def records_of(name: str, count: int) -> list[dict[str, Any]]:
    random = Random(name)
    return [RECORDS[name](random, number) for number in range(count)]


@pytest.fixture
def records() -> Callable[[str, int], list[dict[str, Any]]]:
    """``(source, count)`` -> records in that source's schema."""
    return records_of


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A file of records for every source, in a form that the source comes in."""
    folder = tmp_path / "sources"
    folder.mkdir()
    places = {}
    for name in RECORDS:
        rows = records_of(name, 40)
        place = folder / f"{name}.{'json' if name == 'chatqa2' else 'jsonl'}"
        place.write_text(
            json.dumps(rows) if name == "chatqa2" else "\n".join(json.dumps(row) for row in rows)
        )
        places[name] = str(place)
    return places
