"""A build holds what its sources hold, the same for any number of workers, or is not there."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from elasticore.data import SOURCES, PackedParquet, build, chunks, show
from elasticore.places import held

LENGTHS = {"min_length": 128, "max_length": 1024, "pack": 2048}


def run(files: dict[str, str], tokenizer: Any, output: Path, names: str, **settings: Any) -> Any:
    return build(
        {name: files[name] for name in names.split()}, tokenizer, output, **(LENGTHS | settings)
    )


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_becomes_sequences_that_decode_to_its_records(
    name, files, tokenizer, tmp_path, records
):
    card = run(files, tokenizer, tmp_path / "data", name)
    about = card["sources"][name]
    assert about["records"] == 40
    assert about["dropped"] == {"short": 0, "long": 0, "unusable": 0}
    if SOURCES[name].company != "spent":
        assert card["sequences"] == 40
    answers = set()
    for row in PackedParquet(tmp_path / "data"):
        assert sum(map(len, row)) <= 2048
        for one in row:
            assert 128 <= len(one) <= 1024
            assert one.source == name
            assert one.task in SOURCES[name].tasks
            (span,) = (span for span in one.spans if span.kind == "answer")
            answers.add(tokenizer.decode(one.input_ids[span.start : span.stop].tolist()))
            assert one.learnt == span.stop - span.start
    (key,) = {"answer", "summary", "middle"} & set(records(name, 1)[0])
    assert answers <= {f"{record[key]}<|endoftext|>" for record in records(name, 40)}


def test_short_records_get_company_up_to_lengths_all_over_the_range(files, tokenizer, tmp_path):
    card = run(files, tokenizer, tmp_path / "data", "musique", max_length=2000, pack=2048)
    lengths = [len(one) for row in PackedParquet(tmp_path / "data") for one in row]
    assert card["sources"]["musique"]["sequences"] == 40  # every question is asked
    assert min(lengths) < 600
    assert max(lengths) > 1400


def test_articles_that_serve_as_examples_are_not_asked_again(files, tokenizer, tmp_path):
    run(files, tokenizer, tmp_path / "data", "xsum", max_length=512)
    rows = PackedParquet(tmp_path / "data")
    texts = [tokenizer.decode(one.input_ids.tolist()) for row in rows for one in row]
    articles = [part.split("\n")[0] for text in texts for part in text.split("Article: ")[1:]]
    assert len(articles) == len(set(articles)) <= 40


def test_workers_do_not_change_a_byte(files, tokenizer, tmp_path):
    names = "musique govreport xsum"
    for workers in (1, 2):
        run(files, tokenizer, tmp_path / str(workers), names, workers=workers)
    one, two = (sorted((tmp_path / name).iterdir()) for name in "12")
    assert [file.name for file in one] == ["README.md", "card.json", "part-00000.parquet"]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_the_seed_changes_what_is_random(files, tokenizer, tmp_path):
    for seed in (0, 1):
        run(files, tokenizer, tmp_path / str(seed), "musique", seed=seed)
    one, two = (
        [x.input_ids.tolist() for row in PackedParquet(tmp_path / s) for x in row] for s in "01"
    )
    assert one != two


def test_the_card_counts_what_is_in_the_files(files, tokenizer, tmp_path):
    output = tmp_path / "data"
    card = run(files, tokenizer, output, "govreport musique", loss="all")
    assert card == json.loads((output / "card.json").read_text()) == show(output)
    rows = list(PackedParquet(output))
    sequences = [one for row in rows for one in row]
    assert card["rows"] == len(rows) == sum(file["rows"] for file in card["files"])
    assert card["sequences"] == len(sequences) == sum(one["sequences"] for one in card["lengths"])
    assert card["tokens"] == sum(map(len, sequences)) == sum(f["tokens"] for f in card["files"])
    assert card["learnt_tokens"] == card["tokens"] - card["sequences"]  # all but the first ones
    for kind in ("tasks", "sources"):
        for name, counts in card[kind].items():
            own = [one for one in sequences if name in (one.task, one.source)]
            assert counts["tokens"] == sum(map(len, own))
    assert card["fill"] == card["tokens"] / (card["rows"] * 2048)
    assert card["tokenizer"]["vocabulary"]
    assert card["settings"]["loss"] == "all"
    (output / "card.json").unlink()  # counted again
    assert show(output)["tasks"] == card["tasks"]
    readme = (output / "README.md").read_text()
    assert f"| musique | {card['sources']['musique']['sequences']:,} |" in readme
    assert "CC BY 4.0" in readme


def test_a_mixture_keeps_its_shares(files, tokenizer, tmp_path):
    card = run(
        files, tokenizer, tmp_path / "a", "govreport colt", mixture={"govreport": 1, "colt": 3}
    )
    tokens = {name: about["tokens"] for name, about in card["sources"].items()}
    assert tokens["colt"] / tokens["govreport"] == pytest.approx(3, rel=0.15)
    card = run(files, tokenizer, tmp_path / "b", "govreport", tokens=3000)
    assert 2000 < card["tokens"] <= 3000


def test_samples_of_other_lengths_are_dropped_and_counted(files, tokenizer, tmp_path):
    run(files, tokenizer, tmp_path / "all", "govreport")
    lengths = sorted(len(one) for row in PackedParquet(tmp_path / "all") for one in row)
    limits = {"min_length": lengths[10], "max_length": lengths[30]}
    card = run(files, tokenizer, tmp_path / "some", "govreport", **limits)
    kept = [len(one) for row in PackedParquet(tmp_path / "some") for one in row]
    assert sorted(kept) == [n for n in lengths if lengths[10] <= n <= lengths[30]]
    assert card["sources"]["govreport"]["dropped"] == {
        "short": sum(n < lengths[10] for n in lengths),
        "long": sum(n > lengths[30] for n in lengths),
        "unusable": 0,
    }


def test_a_source_that_gives_nothing_says_why(files, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"source govreport gave no sample of 900.* 40 samples"):
        run(files, tokenizer, tmp_path / "data", "govreport", min_length=900)
    assert list(tmp_path.glob("data*")) == []
    with pytest.raises(ValueError, match="tokens=20 leaves room for no sample"):
        run(files, tokenizer, tmp_path / "data", "govreport", tokens=20)


def test_a_record_of_the_wrong_form_is_numbered(files, tokenizer, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    lines = Path(files["govreport"]).read_text().splitlines()
    lines[17] = json.dumps({"report": ["a", "list"], "summary": "s"})
    wrong.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"source govreport, record 17: .*expected text, got list"):
        run({"govreport": str(wrong)}, tokenizer, tmp_path / "data", "govreport")


@pytest.mark.parametrize("when", ["write", "close"])
def test_a_full_disk_leaves_nothing_and_names_the_file(
    files, tokenizer, tmp_path, monkeypatch, when
):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, {"write": "write_table", "close": "close"}[when], full)
    with pytest.raises(OSError, match=r"part-00000.parquet: .*No space left.*Free space"):
        run(files, tokenizer, tmp_path / "data", "govreport")
    assert list(tmp_path.glob("data*")) == []


def test_an_interrupted_build_leaves_nothing_that_looks_whole(
    files, tokenizer, tmp_path, monkeypatch
):
    def interrupt(*args: Any) -> None:
        assert not (tmp_path / "data").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(files, tokenizer, tmp_path / "data", "govreport")
    assert not (tmp_path / "data").exists()
    # What a build that was killed leaves behind is in nobody's way.
    (tmp_path / ".data.elasticore-new").mkdir()
    (tmp_path / ".data.elasticore-new" / "part-00042.parquet").write_bytes(b"half")
    card = run(files, tokenizer, tmp_path / "data", "govreport")
    assert [file["name"] for file in card["files"]] == ["part-00000.parquet"]
    assert [p.name for p in tmp_path.iterdir() if "data" in p.name] == ["data"]


def test_nothing_beside_the_output_is_touched(files, tokenizer, tmp_path):
    run(files, tokenizer, tmp_path / "data", "govreport")
    for name in ("data.old", "data.partial", ".data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(name)
    run(files, tokenizer, tmp_path / "data", "govreport", overwrite=True, seed=1)
    for name in ("data.old", "data.partial", ".data"):
        assert (tmp_path / name / "notes.txt").read_text() == name


def test_a_second_build_of_a_place_is_refused_at_once(files, tokenizer, tmp_path):
    with held(tmp_path / "data", beside=True), pytest.raises(OSError, match="is being written by"):
        run(files, tokenizer, tmp_path / "data", "govreport")
    run(files, tokenizer, tmp_path / "data", "govreport")


def test_an_overwriting_build_that_fails_leaves_the_older_data(files, tokenizer, tmp_path):
    before = run(files, tokenizer, tmp_path / "data", "govreport")
    with pytest.raises(ValueError, match="gave no sample"):
        run(files, tokenizer, tmp_path / "data", "govreport", min_length=1000, overwrite=True)
    assert show(tmp_path / "data") == before


def test_the_folder_one_is_in_can_be_built_again(files, tokenizer, tmp_path, monkeypatch):
    run(files, tokenizer, tmp_path / "data", "govreport")
    monkeypatch.chdir(tmp_path / "data")
    card = run(files, tokenizer, Path("."), "govreport", overwrite=True, seed=1)
    assert show(tmp_path / "data") == card


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("report", "half \ud83d pair " * 40, "surrogates not allowed"),
        ("summary", ["a", "b"], "TypeError: expected text, got list"),
        ("report", {"text": "a"}, "TypeError: expected text, got dict"),
    ],
)
def test_a_record_that_is_no_text_is_named(field, value, says, records, tokenizer, tmp_path):
    rows = records("govreport", 3)
    rows[1][field] = value
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"govreport": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=rf"source govreport, record 1: .*{says}") as error:
        run(files, tokenizer, tmp_path / "data", "govreport")
    assert len(str(error.value)) < 300


KILLED = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from elasticore.data import chunks

if __name__ == "__main__":
    start = {"initializer": chunks.start_worker, "initargs": (None,)}
    pool = ProcessPoolExecutor(1, get_context("spawn"), **start)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks into /proc")
def test_workers_end_with_a_build_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, check=False)
    worker = Path("/proc") / done.stdout.decode().strip() / "stat"

    def ended() -> bool:
        try:
            return worker.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    limit = time.monotonic() + 20
    while not ended():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_data_are_replaced_only_on_request_and_only_if_they_are_data(files, tokenizer, tmp_path):
    output = tmp_path / "data"
    first = run(files, tokenizer, output, "govreport")
    with pytest.raises(FileExistsError, match="exists; choose another, or pass overwrite"):
        run(files, tokenizer, output, "colt")
    with pytest.raises(ValueError, match="gave no sample"):
        run(files, tokenizer, output, "colt", min_length=1000, overwrite=True)
    assert show(output) == first
    run(files, tokenizer, output, "colt", overwrite=True)
    assert list(show(output)["sources"]) == ["colt"]
    (tmp_path / "home").mkdir()
    with pytest.raises(FileExistsError, match="it is left as it is"):
        run(files, tokenizer, tmp_path / "home", "colt", overwrite=True)


def test_a_folder_with_a_file_missing_or_of_another_build_is_refused(files, tokenizer, tmp_path):
    output = tmp_path / "data"
    run(files, tokenizer, output, "govreport")
    other = run(files, tokenizer, tmp_path / "other", "govreport", tokens=3000)
    assert other["rows"] != show(output)["rows"]
    part = output / "part-00000.parquet"
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00000.parquet is missing, though card.json"):
        show(output)
    (tmp_path / "other" / "part-00000.parquet").rename(part)
    with pytest.raises(ValueError, match=r"rows, but card.json says"):
        show(output)
    (output / "card.json").write_text("{")
    with pytest.raises(ValueError, match=r"card.json is damaged"):
        show(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, "sources must name some of chatqa2"),
        ({"sources": {"wiki": None}}, "got wiki"),
        ({"min_length": 0}, "min_length"),
        ({"max_length": 64}, "max_length must be at least 128"),
        ({"pack": 512}, "pack must be at least 1024"),
        ({"tokens": 0}, "tokens"),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed"),
        ({"mixture": {"colt": 1}}, "mixture must weigh the sources govreport, got colt"),
        ({"mixture": {"govreport": 0}}, r"mixture\['govreport'\] must be positive"),
        ({"template": "none"}, "template"),
        ({"tokenizer": "/nowhere/at/all"}, "tokenizer /nowhere/at/all"),
    ],
)
def test_bad_settings_end_before_anything_is_written(files, tokenizer, tmp_path, change, message):
    settings = {
        "sources": {"govreport": files["govreport"]},
        "tokenizer": tokenizer,
        "output": tmp_path / "data",
        **LENGTHS,
    }
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        build(**(settings | change))
    assert list(tmp_path.glob("data*")) == []
