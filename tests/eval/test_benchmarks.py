"""RULER, LongBench-E and LongBench-v2 from tiny files in their published form, end to end."""

import hashlib
import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import elasticore
from elasticore.eval.benchmarks import (
    data,
    load_longbench_e,
    load_longbench_v2,
    load_ruler,
)
from elasticore.eval.benchmarks.longbench_e import BUCKETS, LONGBENCH_E, LongBenchE, bucket
from elasticore.eval.benchmarks.longbench_v2 import LongBenchV2
from elasticore.eval.benchmarks.prompts import prompts
from elasticore.eval.benchmarks.ruler import RULER, Ruler
from elasticore.eval.benchmarks.task import Average, percent
from elasticore.eval.benchmarks.truncation import cut_middle

BACKBONE = Path(elasticore.__file__).parent / "assets" / "tiny" / "backbone"


class Letters:
    """A tokenizer: a token per character, with one special token in front."""

    name_or_path = "somewhere/letters"
    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [1, *(ord(c) + 2 for c in text)]}

    def encode(self, text, **_):
        return [ord(c) + 2 for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i - 2) for i in ids if i > 1)


class Parrot(LM):
    """Says the answer of the first mark that the prompt contains, and keeps every request."""

    tokenizer_name = "letters"

    def __init__(self, answers):
        super().__init__()
        self.answers, self.seen = answers, []

    def generate_until(self, requests, disable_tqdm=False):
        self.seen += [request.args for request in requests]
        return [
            next(answer for mark, answer in self.answers.items() if mark in request.args[0])
            for request in requests
        ]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, turns, add_generation_prompt=True):
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>"


def evaluate(tasks, answers, **settings):
    model = Parrot(answers)
    tasks = tasks if isinstance(tasks, list) else [tasks]
    settings = {
        "bootstrap_iters": 0,
        "task_manager": TaskManager(include_defaults=False),
        **settings,
    }
    return lm_eval.simple_evaluate(model, tasks=tasks, **settings), model


def numbers(results, name):
    """A task's or group's numbers by metric, without those of no sample."""
    found = results["results"][name]
    kept = {k.split(",")[0]: v for k, v in found.items() if k.endswith(",none")}
    return {k: v for k, v in kept.items() if isinstance(v, float) and not math.isnan(v)}


# ---- LongBench-E ----


def longbench_row(context, answers, length=100, classes=None, question=""):
    return {
        "input": question,
        "context": context,
        "answers": answers,
        "length": length,
        "dataset": "",
        "language": "en",
        "all_classes": classes,
        "_id": context,
    }


def write_longbench(folder, rows):
    (folder / "longbench").mkdir()
    with zipfile.ZipFile(folder / "longbench" / "data.zip", "w") as archive:
        for task in rows:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[task])
            archive.writestr(f"data/{task}_e.jsonl", lines)


def test_longbench_e_end_to_end(tmp_path):
    rows = {
        "qasper": [
            longbench_row("<q1>", ["a cat"], 3999),
            longbench_row("<q2>", ["cat", "dog"], 4000),
            longbench_row("<q3>", ["cat"], 8000),
        ],
        "multifieldqa_en": [longbench_row("<m1>", ["cat"], 100)],
        "trec": [longbench_row("<t1>", ["Food"], 100, ["Food", "Date"])],
        "samsum": [longbench_row("<s1>", ["the cat sat"], 100)],
        "passage_retrieval_en": [longbench_row("<p1>", ["Paragraph 3"], 9000)],
        "lcc": [longbench_row("<l1>", ["return x"], 100)],
    }
    answers = {
        "<q1>": "The cat!",  # 1
        "<q2>": "dog bird",  # 2/3
        "<q3>": "bird",  # 0
        "<m1>": "cat",  # 1
        "<t1>": "\nFood\nDate",  # only the first line counts: 1
        "<s1>": "dogs ran\nthe cat sat",  # only the first line counts: 0
        "<p1>": "Paragraph 3 or 4",  # 1/2
        "<l1>": "# it is:\nreturn x\n",  # 1
    }
    write_longbench(tmp_path, rows)
    tasks = load_longbench_e(Letters(), 10_000, tmp_path, tuple(rows))
    results, model = evaluate(tasks, answers)

    f1 = 2 / 3
    qasper = {"score": 100 * (1 + f1) / 3, "0-4k": 100.0, "4-8k": 100 * f1, "8k+": 0.0}
    assert numbers(results, "longbench-e-qasper") == pytest.approx(qasper, rel=1e-15)
    assert numbers(results, "longbench-e-trec") == {"score": 100.0, "0-4k": 100.0}
    assert numbers(results, "longbench-e-samsum") == {"score": 0.0, "0-4k": 0.0}
    assert numbers(results, "longbench-e-passage_retrieval_en") == {"score": 50.0, "8k+": 50.0}

    # A category is the mean of its tasks, the benchmark that of the categories.
    single = (qasper["score"] + 100.0) / 2
    assert numbers(results, "longbench-e-single-doc-qa")["score"] == pytest.approx(single)
    assert numbers(results, "longbench-e-few-shot")["score"] == 50.0
    whole = numbers(results, "longbench-e")
    assert whole["score"] == pytest.approx((single + 50.0 + 50.0 + 100.0) / 4)
    assert whole["4-8k"] == pytest.approx(100 * f1)  # the only category with such samples
    assert results["groups"]["longbench-e"]["score,none"] == whole["score"]
    assert len(model.seen) == 8


def test_a_sample_keeps_its_score_and_the_name_of_its_bucket(tmp_path):
    write_longbench(tmp_path, {"qasper": [longbench_row("<q>", ["cat"], 5000)]})
    tasks = load_longbench_e(Letters(), 10_000, tmp_path, ("qasper",))
    results, _ = evaluate(tasks, {"<q>": "cat"})
    (sample,) = results["samples"]["longbench-e-qasper"]
    found = {name: sample[name] for name in ("score", *BUCKETS)}
    assert found == {"score": 1.0, "0-4k": None, "4-8k": 1.0, "8k+": None}
    assert sample["target"] == ["cat"]
    json.dumps(sample, allow_nan=False)  # a log that any reader of JSON takes


def test_chat_templates_wrap_only_what_they_officially_wrap(tmp_path):
    write_longbench(
        tmp_path, {task: [longbench_row("<x>", ["Paragraph 1"], 1, ["a"])] for task in LONGBENCH_E}
    )
    tasks = load_longbench_e(Letters(), 10_000, tmp_path)
    _, model = evaluate(tasks, {"<x>": ""}, apply_chat_template=True, system_instruction="Hello.")
    by_prompt = [prompt.startswith("<system>Hello.<user>") for prompt, _ in model.seen]
    plain = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    order = [
        name.removeprefix("longbench-e-")
        for name in (task.task_name for task in tasks.get_all_tasks())
    ]
    assert {n for n, chat in zip(order, by_prompt, strict=True) if not chat} == plain
    assert all(
        p.endswith("<assistant>") for (p, _), c in zip(model.seen, by_prompt, strict=True) if c
    )


def test_longbench_e_is_the_published_table():
    assert {name: about.max_new_tokens for name, about in LONGBENCH_E.items()} == {
        "qasper": 128,
        "multifieldqa_en": 64,
        "hotpotqa": 32,
        "2wikimqa": 32,
        "gov_report": 512,
        "multi_news": 512,
        "trec": 64,
        "triviaqa": 32,
        "samsum": 128,
        "passage_count": 32,
        "passage_retrieval_en": 32,
        "lcc": 64,
        "repobench-p": 64,
    }
    assert [bucket(n) for n in (0, 3999, 4000, 7999, 8000)] == [
        "0-4k", "0-4k", "4-8k", "4-8k", "8k+",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "members", "digest"),
    [
        ("longbench-e", tuple(LONGBENCH_E), "7f750e4b26bb05e9"),
        ("longbench-v2", ("0shot",), "68a162252bc9ff71"),
    ],
)
def test_prompts_are_the_published_ones_to_the_letter(name, members, digest):
    found = prompts(name)
    assert set(found) == set(members)
    text = "\0".join(found[member] for member in sorted(found))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_answers_are_greedy_and_stop_as_they_officially_do():
    tasks = {name: LongBenchE(name, [], Letters(), 10) for name in LONGBENCH_E}
    plain = tasks["qasper"].config.generation_kwargs
    assert plain == {"until": [], "do_sample": False, "max_gen_toks": 128}
    # A summary ends at a line break, which may not come first.
    extra = {"eos_token_id": [0, ord("\n") + 2], "min_new_tokens": 1}
    assert tasks["samsum"].config.generation_kwargs == {**plain, **extra}


def test_a_model_of_the_harness_takes_the_settings():
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    model = AutoModelForCausalLM.from_pretrained(BACKBONE)
    wrapped = huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
    task = LongBenchE("samsum", [longbench_row("Rain fell.", ["Rain."])], tokenizer, 200)
    results = lm_eval.simple_evaluate(
        wrapped, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )
    (sample,) = results["samples"]["longbench-e-samsum"]
    assert "\n" not in sample["resps"][0][0][:-1]


# ---- Middle truncation ----


@pytest.mark.parametrize(
    ("limit", "decode_once", "kept"),
    [
        (11, False, "abcdefghij"),  # with the special token it just fits
        (10, False, "abcdfghij"),  # 5 with the special token, and 5
        (10, True, "abcdfghij"),
        (7, False, "abhij"),  # 3 and 3
        (7, True, "abghij"),  # 3 and 4
        (2, False, "j"),
    ],
)
def test_the_middle_is_cut(limit, decode_once, kept):
    assert cut_middle(Letters(), "abcdefghij", limit, decode_once=decode_once) == kept


def test_a_limit_without_halves_is_refused():
    with pytest.raises(ValueError, match="limit=1"):
        cut_middle(Letters(), "abc", 1, decode_once=True)


def test_prompts_are_cut_before_the_chat_template():
    task = LongBenchE("qasper", [], Letters(), 100)
    prompt = task.fewshot_context(
        longbench_row("x" * 500, []),
        apply_chat_template=True,
        chat_template=Parrot({}).apply_chat_template,
    )
    body = prompt.removeprefix("<user>").removesuffix("<assistant>")
    assert len(body) == 99  # the special token is the hundredth
    assert body.startswith("You are given a scientific article")
    assert body.endswith("Question: \n\nAnswer:")


# ---- LongBench-v2 ----


def v2_row(mark, answer, difficulty, length, domain="Single-Document QA"):
    choices = {f"choice_{letter}": f" {letter.lower()} " for letter in "ABCD"}
    about = {"difficulty": difficulty, "length": length, "domain": domain, "sub_domain": ""}
    question = {"_id": mark, "question": " What? ", "context": f"\n{mark}\n", "answer": answer}
    return {**question, **choices, **about}


def test_longbench_v2_end_to_end(tmp_path):
    rows = [
        v2_row("<1>", "A", "easy", "short"),
        v2_row("<2>", "B", "hard", "short"),
        v2_row("<3>", "C", "hard", "medium"),
        v2_row("<4>", "D", "hard", "long", "Code Repository Understanding"),
    ]
    answers = {
        "<1>": "The correct answer is (A).",
        "<2>": "**The correct answer is B**",
        "<3>": "The correct answer is (D).",
        "<4>": "D",  # right, but not in the form that was asked for
    }
    (tmp_path / "longbench-v2").mkdir()
    (tmp_path / "longbench-v2" / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    results, model = evaluate(load_longbench_v2(Letters(), 10_000, tmp_path), answers)
    assert numbers(results, "longbench-v2") == {
        "score": 50.0,
        "easy": 100.0,
        "hard": pytest.approx(100 / 3),
        "short": 100.0,
        "medium": 0.0,
        "long": 0.0,
        "Single-Document QA": pytest.approx(200 / 3),
        "Code Repository Understanding": 0.0,
        "answered": 75.0,
    }
    prompt, settings = model.seen[0]
    assert settings["max_gen_toks"] == 128
    assert "<text>\n<1>\n</text>" in prompt  # stripped
    assert "question: What?\nChoices:\n(A) a\n(B) b\n(C) c\n(D) d\n\n" in prompt


# ---- RULER ----


def write_ruler(folder, length, task, rows):
    place = folder / "ruler" / "letters" / str(length) / task
    place.mkdir(parents=True)
    lines = "".join(json.dumps({"index": i, **row}) + "\n" for i, row in enumerate(rows))
    (place / "validation.jsonl").write_text(lines, encoding="utf-8")


def ruler_row(text, outputs, prefix=" Answer:"):
    return {"input": text, "outputs": outputs, "length": 10, "answer_prefix": prefix}


def test_ruler_end_to_end(tmp_path):
    for length, second in ((4096, "<c>"), (8192, "<d>")):
        needles = [ruler_row("<a>", ["12", "34"]), ruler_row("<b>", ["56"])]
        write_ruler(tmp_path, length, "niah_multivalue", needles)
        write_ruler(tmp_path, length, "qa_1", [ruler_row(second, ["Rome", "the city of Rome"])])
    answers = {"<a>": "34, 12", "<b>": "nothing", "<c>": "ROME", "<d>": "Paris"}
    groups = load_ruler(Letters(), [4096, 8192], tmp_path, ["niah_multivalue", "qa_1"])
    results, model = evaluate(groups, answers, apply_chat_template=True)
    assert numbers(results, "ruler-4096-niah_multivalue") == {"score": 50.0}
    assert numbers(results, "ruler-4096-qa_1") == {"score": 100.0}  # any of the answers
    assert numbers(results, "ruler-4096") == {"score": 75.0}  # tasks weigh the same
    assert numbers(results, "ruler-8192") == {"score": 25.0}
    # The answer begins after the user's turn, with the words that RULER gives.
    assert model.seen[0][0] == "<user><a><assistant> Answer:"


def test_ruler_is_the_published_table():
    tokens = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert len(RULER) == 13
    for name, about in RULER.items():
        family = name.split("_")[0]
        assert about.max_new_tokens == tokens[family]
        assert (about.metric.__name__ == "contains_any") == (family == "qa")


def test_samples_of_older_scripts_hold_the_whole_prompt():
    task = Ruler("qa_2", 4096, [])
    assert task.fewshot_context({"input": "text Answer:", "outputs": [""]}) == "text Answer:"


# ---- Data ----


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (
            lambda folder: load_longbench_e(Letters(), 10, folder),
            ["THUDM/LongBench", "data.zip", "longbench"],
        ),
        (
            lambda folder: load_longbench_v2(Letters(), 10, folder),
            ["THUDM/LongBench-v2", "data.json", "longbench-v2"],
        ),
        (
            lambda folder: load_ruler(Letters(), [8192], folder),
            ["NVIDIA/RULER", "prepare.py", "--max_seq_length 8192", "niah_single_1"],
        ),
    ],
)
def test_missing_data_is_one_line_that_says_what_to_do(tmp_path, load, words):
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert all(word in message for word in words)


def test_an_unknown_task_is_not_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"\['vtt'\] are unknown; use any of niah_single_1"):
        load_ruler(Letters(), [8192], tmp_path, ["vt", "vtt"])
    with pytest.raises(ValueError, match=r"\['narrativeqa'\] are unknown; use any of qasper"):
        load_longbench_e(Letters(), 10, tmp_path, ["narrativeqa"])


def test_without_a_folder_the_cache_is_asked(tmp_path, monkeypatch):
    def absent(repository, file, *, repo_type):
        assert (repository, file, repo_type) == ("THUDM/LongBench-v2", "data.json", "dataset")
        raise LocalEntryNotFoundError("offline")

    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(data, "hf_hub_download", absent)
    with pytest.raises(FileNotFoundError, match="hf download --repo-type dataset THUDM"):
        data.longbench_v2(None, {})

    (tmp_path / "data.json").write_text("[{}]", encoding="utf-8")
    monkeypatch.setattr(data, "hf_hub_download", lambda *_, **__: str(tmp_path / "data.json"))
    assert data.longbench_v2(None, {}) == [{}]


def test_a_filled_cache_is_enough_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "datasets--THUDM--LongBench-v2"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    rows = [v2_row("<1>", "A", "easy", "short")]
    (snapshot / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    assert data.longbench_v2(None, {}) == rows
    with pytest.raises(
        FileNotFoundError, match=r"hf download --repo-type dataset THUDM/LongBench d"
    ):
        data.longbench_e("qasper", None, {})


def test_every_benchmark_from_a_folder_to_a_table_with_its_parts(tmp_path):
    """The command line, on files in their published form, with what a part of the samples cost."""
    from typer.testing import CliRunner

    from elasticore.cli import app

    write_longbench(
        tmp_path,
        {
            "hotpotqa": [
                longbench_row("word " * 60, ["cat"], 3999),
                longbench_row("word " * 400, ["cat"], 8000),
            ]
        },
    )
    place = tmp_path / "ruler" / "backbone" / "512" / "vt"
    place.mkdir(parents=True)
    (place / "validation.jsonl").write_text(json.dumps(ruler_row("VAR A = 1 " * 30, ["A"])) + "\n")
    (tmp_path / "longbench-v2").mkdir()
    questions = [v2_row("word " * 50, "A", "easy", "short"), v2_row("<2>", "B", "hard", "long")]
    (tmp_path / "longbench-v2" / "data.json").write_text(json.dumps(questions), encoding="utf-8")
    out = str(tmp_path / "run")
    names = "ruler:vt,longbench-e:hotpotqa,longbench-v2"
    options = ["--lengths", "512", "--data", str(tmp_path), "--dtype", "float32", "--output", out]
    chosen = ["--router", "tiny", "--batch-size", "2", "--tasks", names]
    result = CliRunner().invoke(app, ["eval", "--model", "tiny", *options, *chosen])
    assert result.exit_code == 0, result.output

    def table(*settings):
        shown = CliRunner().invoke(app, ["eval", "report", out, "--json", *settings])
        (row,) = json.loads(shown.stdout)
        return row

    lines = (tmp_path / "run" / "elastic" / "samples.jsonl").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in lines.splitlines()]
    short, long = (s for s in samples if s["task"] == "longbench-e-hotpotqa")
    every = table("--metric", "score,msr")
    assert {"ruler-512", "ruler-512-vt", "longbench-e", "longbench-v2"} <= set(every)
    assert every["longbench-e-multi-doc-qa Ω_MSR"] == (short["msr"] + long["msr"]) / 2
    for part, one in (("0-4k", short), ("8k+", long)):
        shown = table("--metric", "prompt_tokens,msr", "--part", part)
        assert shown["longbench-e prompt_tokens"] == one["prompt_tokens"]
        assert shown["longbench-e Ω_MSR"] == shown["Ω_MSR"] == one["msr"]
    hard = table("--metric", "score,prompt_tokens", "--part", "hard")
    (asked,) = (s for s in samples if "hard" in s["scores"])
    assert hard["longbench-v2 prompt_tokens"] == asked["prompt_tokens"]
    assert hard["longbench-v2"] == 100 * asked["scores"]["hard"]
    assert "ruler-512" not in hard  # has no such samples
    assert {s["task"]: s["batch_size"] for s in samples}["longbench-v2"] == 2


def test_an_archive_without_the_task_is_named(tmp_path):
    write_longbench(tmp_path, {"qasper": []})
    with pytest.raises(FileNotFoundError, match=r"data\.zip holds no data/trec_e\.jsonl"):
        data.longbench_e("trec", tmp_path, {})


def test_a_row_may_hold_any_unicode(tmp_path):
    row = longbench_row("one\u2028line\x85still", ["é"])  # no line breaks of JSON lines
    write_longbench(tmp_path, {"qasper": [row]})
    assert data.longbench_e("qasper", tmp_path, {}) == [row]


def test_percent_of_nothing_is_no_number():
    assert math.isnan(percent([None, None]))
    assert percent([None, 1.0, 0.5]) == 75.0


def test_an_average_weighs_children_alike_and_skips_those_without_the_metric():
    children = [SimpleNamespace(name=name) for name in "ab"]
    group = Average.of("g", children)
    found = group.aggregate(
        {
            "a": {
                "sample_len": 9,
                "score,none": 10.0,
                "x,none": math.nan,
                "score_stderr,none": 1.0,
            },
            "b": {"sample_len": 1, "score,none": 20.0, "x,none": 5.0},
        }
    )
    assert found["score,none"] == 15.0
    assert found["x,none"] == 5.0
    assert found["sample_len"] == 10
    assert "score_stderr,none" not in found


def test_every_definition_is_complete():
    for name in LONGBENCH_E:
        fields = {"context": "<c>", "input": "<i>"}
        assert "<c>" in prompts("longbench-e")[name].format(**fields)
    assert LongBenchV2([], Letters(), 10).doc_to_target({"answer": "A"}) == ["A"]
