"""Places are written by one process at a time, and what appears in them is whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elasticore.places import append, check_writable, held, whole_folder, write_text

HOLDER = """
import signal, sys
from pathlib import Path
from elasticore.places import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_held_by_one_process_and_let_go_of_when_that_is_killed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    says = rf"run is being written by process {child.pid} on .* since \d{{4}}-.*choose another"
    with pytest.raises(BlockingIOError, match=says), held(tmp_path / "run"):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with held(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"]  # which the child had made
    assert names(tmp_path / "run") == []


def test_a_held_folder_goes_if_it_was_made_for_nothing_and_stays_otherwise(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert names(tmp_path / "a" / "b") == ["file"]
    (tmp_path / "empty").mkdir()
    with held(tmp_path / "empty"):
        pass
    assert names(tmp_path) == ["a", "empty"]


def test_one_place_is_held_under_all_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with (
        held(tmp_path / "run"),
        pytest.raises(BlockingIOError),
        held(tmp_path / "sub" / ".." / "link"),
    ):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def fail() -> None:
        with whole_folder(final) as folder:
            (folder / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []
    with whole_folder(final) as folder:
        (folder / "first").touch()
        assert not final.exists()
    with whole_folder(final) as folder:
        (folder / "second").touch()
        assert names(final) == ["first"]
    assert names(tmp_path) == ["final"]
    assert names(final) == ["second"]


def test_what_was_replaced_comes_back_if_its_successor_never_arrived(tmp_path: Path) -> None:
    (tmp_path / ".final.elasticore-old").mkdir()  # killed between two renames
    (tmp_path / ".final.elasticore-old" / "first").touch()
    with pytest.raises(KeyError), whole_folder(tmp_path / "final"):
        raise KeyError
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["first"]


def test_a_full_disk_leaves_the_old_file_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.json"
    write_text(file, "old")

    def full(self: Path, text: str, **_: Any) -> None:
        with self.open("w") as opened:
            opened.write(text[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    says = r"file.json cannot be written: No space left on device; [\d,.]+ MB are free there"
    with pytest.raises(OSError, match=says):
        write_text(file, "a new one")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_a_line_is_added_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines"
    append(file, "one ü\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="lines cannot be written: No space left on device; "):
            append(file, "two\n")
    append(file, "three\n")
    assert file.read_text("utf-8") == "one ü\nthree\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(OSError, match=r"file/x.png cannot be written: File exists; choose"):
        check_writable(tmp_path / "file" / "x.png")
    with pytest.raises(OSError, match=r"picture.png cannot be written: it is a folder; choose"):
        check_writable(tmp_path / "picture.png")
    with (
        pytest.raises(OSError, match=r"file cannot be written: File exists"),
        held(tmp_path / "file"),
    ):
        pass
    check_writable(tmp_path / "new" / "x.png")
    assert os.listdir(tmp_path / "new") == []
