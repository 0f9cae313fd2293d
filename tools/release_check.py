"""What has to hold before a release: `make release-check`, which prints a table.

It builds, installs and runs what a user would get, in folders of its own, and asks the package
index whether everything can be had. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
IN_WHEEL = (
    "elasticore/__init__.py",
    "elasticore/py.typed",
    "elasticore/backends/costs.json",
    "elasticore/assets/tiny/backbone/model.safetensors",
    "elasticore/assets/tiny/router/router.json",
    "elasticore/assets/smollm2/router.safetensors",
)
COMMANDS = (
    ("-c", "import elasticore; print(elasticore.__version__)"),
    ("-m", "elasticore", "--version"),
    ("-m", "elasticore", "doctor"),
    ("-m", "elasticore", "demo", "--model", "tiny", "--length", "512"),
)
PASSED, FAILED, SKIPPED = "[green]passed[/]", "[bold red]failed[/]", "[yellow]not tried[/]"


class Row(NamedTuple):
    """One line of the table."""

    check: str
    state: str
    note: str


class Failure(Exception):
    """What does not hold, in words."""


def run(*command: str | Path, cwd: Path = ROOT, limit: int = 1800) -> str:
    """What a command prints, without modules of this checkout; raises :class:`Failure`."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=kept,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[-1]}: not done after {limit} seconds") from None
    if done.returncode:
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Failure(" ".join(told[-3:])[-400:] or f"exit code {done.returncode}")
    return done.stdout.strip()


def need(holds: object, otherwise: str) -> None:
    """Raise unless something holds."""
    if not holds:
        raise Failure(otherwise)


def clean_tree() -> str:
    """The release is a commit."""
    changed = run("git", "status", "--porcelain")
    need(not changed, f"not committed: {', '.join(changed.splitlines()[:5])}")
    return run("git", "rev-parse", "--short", "HEAD")


def one_version(project: dict[str, Any]) -> str:
    """Whoever reads a version anywhere reads the same one."""
    version = project["project"]["version"]
    package = re.search(
        r'^__version__ = "(.*)"$',
        (ROOT / "elasticore/__init__.py").read_text("utf-8"),
        re.MULTILINE,
    )
    heading = rf"^## \[?{re.escape(version)}\b"
    cited = str(yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"])
    wrong = []
    if package is None or package[1] != version:
        wrong.append(f"elasticore.__version__ is {package and package[1]}")
    if cited != version:
        wrong.append(f"CITATION.cff has {cited}")
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE):
        wrong.append(f"CHANGELOG.md has no heading '## {version}'")
    need(not wrong, f"pyproject.toml has {version}, but {'; '.join(wrong)}")
    return version


def one_address(project: dict[str, Any]) -> str:
    """The project's address, which pyproject.toml decides, is the same wherever it stands."""
    urls = project["project"]["urls"]
    home = urls["Homepage"].rstrip("/")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["url"].rstrip("/")
    need(cited == home, f"[project.urls] has {home}, CITATION.cff {cited}")
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        need(f"({home}/" in rule["replacement"], f"links of the README do not lead to {home}")
    return home


def filled_in(project: dict[str, Any]) -> str:
    """No placeholder is published."""
    open_ones = [name for name, url in project["project"]["urls"].items() if "example.org" in url]
    need(not open_ones, f"placeholders in [project.urls]: {', '.join(open_ones)}")
    return ""


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel from the checkout."""
    run(sys.executable, "-m", "build", "--sdist", "--wheel", "--outdir", out, ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def contents(wheel: Path) -> str:
    """The package with its data, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in IN_WHEEL if name not in names]
    need(not missing, f"missing: {', '.join(missing)}")
    # elasticore/testing belongs to the package: authors of backends need it.
    strange = [name for name in names if not re.match(r"elasticore(-[\d.]+\w*\.dist-info)?/", name)]
    strange += [name for name in names if re.search(r"__pycache__|/tests?/|\.py[co]$", name)]
    need(not strange, f"does not belong there: {', '.join(strange[:5])}")
    return f"{len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB"


def readme(wheel: Path) -> str:
    """Links of the package index's page lead somewhere, from anywhere."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    links = re.findall(r"\]\(([^)]*)\)", text)
    relative = [link for link in links if not re.match(r"https?://|#", link)]
    need(links and not relative, f"relative: {', '.join(relative[:5]) or 'there are no links'}")
    home = re.search(r"^Project-URL: Homepage, (.*)$", text, re.MULTILINE)
    need(home, "no Homepage")
    assert home is not None
    # .../blob/v1.0/docs/page.md#part: what follows the version is a file of this repository.
    ours = re.compile(rf"{re.escape(home[1].rstrip('/'))}/(?:blob|raw)/v[^/]+/([^#]+)")
    files = [found[1] for link in links if (found := ours.match(link))]
    lost = [file for file in files if not (ROOT / file).exists()]
    need(files and not lost, f"no such file: {', '.join(lost[:5])}")
    return f"{len(links)} links, {len(files)} of them to files of ours"


def same_wheel(sdist: Path, wheel: Path, scratch: Path) -> str:
    """What the sdist builds is what is published."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    (folder,) = scratch.iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", scratch / "built", folder)
    (other,) = (scratch / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(other) as two:
        mine, theirs = ({i.filename: i.CRC for i in archive.infolist()} for archive in (one, two))
    differing = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    need(not differing, f"differs in {', '.join(differing[:5])}")
    return ""


def find_python(version: str) -> str | None:
    """An interpreter of a version: this one, one on the path, or one of pyenv's; or None."""
    found = [sys.executable, shutil.which(f"python{version}")]
    found += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    told = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, found):
        try:  # pyenv's shims are there for versions that are not chosen, and then fail
            if run(python, "-c", told) == version:
                return python
        except (Failure, OSError):
            continue
    return None


def make_venv(python: str, place: Path) -> str:
    """A clean environment, whose pip reads what packages need without fetching them."""
    run(python, "-m", "venv", place)
    run(place / "bin" / "python", "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    return ""


def resolves(python: Path, wheel: Path, extra: str) -> str:
    """Everything that an installation needs can be had."""
    wanted = f"elasticore{extra} @ {wheel.as_uri()}"
    run(python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", wanted)
    return ""


def installs(python: Path, wheel: Path, scratch: Path) -> str:
    """What is installed works, away from the checkout."""
    run(python, "-m", "pip", "install", "--quiet", wheel)
    for command in COMMANDS:
        try:
            run(python, *command, cwd=scratch)
        except Failure as error:
            raise Failure(f"{' '.join(command[1:])}: {error}") from None
    return "import, --version, doctor, demo"


def main() -> int:
    """Check, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--install",
        nargs="*",
        metavar="VERSION",
        default=[".".join(map(str, sys.version_info[:2]))],
        help="Pythons into which it is installed; by default the one that runs this",
    )
    parser.add_argument(
        "--resolve",
        nargs="*",
        metavar="VERSION",
        default=list(PYTHONS),
        help="Pythons for which the base and every extra are resolved; by default all",
    )
    asked = parser.parse_args()
    project = tomli.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    console, rows = Console(), []

    def check(name: str, function: Callable[..., object], *given: object) -> Any:
        """Add a row; return what the check gives, or None if it fails."""
        if any(value is None for value in given):
            rows.append(Row(name, SKIPPED, "what it needs failed"))
            return None
        try:
            got = function(*given)
        except Exception as error:  # whatever it is, the other checks go on
            told = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            rows.append(Row(name, FAILED, told))
            return None
        finally:
            console.print(f"[dim]{escape(name)}[/]")
        rows.append(Row(name, PASSED, got if isinstance(got, str) else ""))
        return got

    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        check("tree is clean", clean_tree)
        check("one version", one_version, project)
        check("one address", one_address, project)
        check("placeholders filled in", filled_in, project)
        sdist, wheel = check("sdist and wheel build", build, scratch / "dist") or (None, None)
        twine = (sys.executable, "-m", "twine", "check", "--strict")
        check("twine check --strict", lambda *files: run(*twine, *files) and "", sdist, wheel)
        check("wheel holds what it must", contents, wheel)
        check("README leads somewhere", readme, wheel)
        (scratch / "unpacked").mkdir()
        check("sdist builds the same wheel", same_wheel, sdist, wheel, scratch / "unpacked")
        extras = ["", *(f"[{name}]" for name in project["project"]["optional-dependencies"])]
        for version in PYTHONS:
            found = find_python(version)
            if found is None:
                rows.append(Row(f"Python {version}", SKIPPED, "not found"))
                continue
            python = scratch / f"venv-{version}" / "bin" / "python"
            if check(f"Python {version}: a venv", make_venv, found, python.parents[1]) is None:
                continue
            if version in asked.install:
                check(f"Python {version}: installs and runs", installs, python, wheel, scratch)
            else:
                rows.append(
                    Row(f"Python {version}: installs and runs", SKIPPED, f"--install {version}")
                )
            if version not in asked.resolve:
                rows.append(Row(f"Python {version}: resolves", SKIPPED, f"--resolve {version}"))
                continue
            with ThreadPoolExecutor(2) as pool:  # pip mostly waits for the index
                for extra in extras:
                    name = f"Python {version}: resolves elasticore{extra}"
                    pool.submit(check, name, resolves, python, wheel, extra)

    table = Table("check", "", "", title="Release", title_justify="left")
    for row in rows:
        table.add_row(escape(row.check), row.state, escape(row.note))
    console.print(table)
    return int(any(row.state == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
