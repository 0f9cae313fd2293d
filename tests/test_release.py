"""What a package index and a citation show: one version, one address, and links that lead on."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import elasticore

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
(HOME,) = re.findall(r'^Homepage = "(.*)"$', PROJECT, re.MULTILINE)


def test_one_version_everywhere() -> None:
    (told,) = re.findall(r'^version = "(.*)"$', PROJECT, re.MULTILINE)
    assert told == elasticore.__version__ == CITATION["version"]


def test_the_software_and_the_paper_can_be_cited() -> None:
    assert CITATION["url"] == HOME
    assert [one["identifiers"][0]["value"] for one in CITATION["references"]] == [
        "arXiv:2601.17367"
    ]


def test_the_readme_of_the_package_leads_from_anywhere_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    patterns = re.findall(r"^pattern = '(.*)'$", PROJECT, re.MULTILINE)
    replacements = re.findall(r"^replacement = '(.*)'$", PROJECT, re.MULTILINE)
    assert len(patterns) == len(replacements) == 2
    for pattern, replacement in zip(patterns, replacements, strict=True):
        text = re.sub(pattern, replacement, text)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    assert not [link for _, link in links if not link.startswith("https://")]
    ours = [(image, link) for image, link in links if link.startswith(f"{HOME}/")]
    assert len(ours) > 20
    for image, link in ours:
        kind, _, file = link.removeprefix(f"{HOME}/").partition("/v$HFPR_VERSION/")
        assert kind == ("raw" if image else "blob")
        assert (ROOT / file.partition("#")[0]).is_file(), link
