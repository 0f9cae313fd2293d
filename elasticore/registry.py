"""Classes by name: our own, those that were registered, and those that packages bring."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Generic, TypeVar

__all__ = ["Registry"]

Base = TypeVar("Base")


class Registry(Generic[Base]):
    """The classes of one kind by name; none is imported before it is asked for.

    Parameters
    ----------
    kind
        What they are called in messages, such as ``"backend"``.
    base
        What all of them subclass.
    group
        The group of entry points in which packages offer theirs.
    built_in
        Ours by name, each as ``"module:class"``.
    """

    def __init__(
        self, kind: str, base: type[Base], group: str, built_in: Mapping[str, str]
    ) -> None:
        self.kind, self.base, self.group, self.built_in = kind, base, group, dict(built_in)
        self._classes: dict[str, type[Base]] = {}
        # Reading every installed package's metadata takes milliseconds, so once.
        self._entry_points: dict[str, importlib.metadata.EntryPoint] | None = None

    def names(self) -> list[str]:
        """Every name: ours in their order, then registered ones, then those of packages."""
        return list(dict.fromkeys([*self.built_in, *self._classes, *self._offered()]))

    def register(self, name: str, cls: type[Base], *, replace: bool = False) -> None:
        """Give ``name`` to a class.

        Raises
        ------
        TypeError, ValueError
            If the name is no string, empty or taken by another class (unless ``replace``), or
            ``cls`` is no subclass of ``base`` that implements it.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {name!r}.")
        if not name:
            raise ValueError("name must not be empty.")
        self._check(cls)
        if not replace and name in self.names() and self._classes.get(name) is not cls:
            raise ValueError(f"name {name!r} is taken; choose another or pass replace=True.")
        self._classes[name] = cls

    def get(self, name: str) -> type[Base]:
        """The class called ``name``, one of :meth:`names`; loading it may raise anything."""
        if name not in self._classes:
            if name in self.built_in:
                module, _, attribute = self.built_in[name].partition(":")
                found = getattr(importlib.import_module(module), attribute)
            else:
                found = self._offered()[name].load()
            self._check(found)
            self._classes[name] = found
        return self._classes[name]

    def named(self, name: object) -> type[Base]:
        """The class that a file calls ``name``.

        Raises
        ------
        ValueError
            If there is none, or its package cannot be loaded.
        """
        if name not in self.names():
            raise ValueError(
                f"{self.kind} {name!r} is unknown; there are: {', '.join(self.names())}."
            )
        try:
            return self.get(str(name))
        except Exception as error:
            raise ValueError(
                f"{self.kind} {name!r}: its package failed to load "
                f"({type(error).__name__}: {error})."
            ) from error

    def name_of(self, cls: type[Base]) -> str:
        """The name of ``cls``.

        Raises
        ------
        ValueError
            If it has none.
        """
        for name in self.names():
            try:
                if self.get(name) is cls:
                    return name
            except Exception:  # another package that is broken: not the one of this class
                continue
        raise ValueError(
            f"{self.kind} {cls.__name__} has no name; call elasticore.register_{self.kind} first."
        )

    def refresh(self) -> None:
        """Look for packages' classes anew, when next asked."""
        self._entry_points = None

    def _check(self, cls: object) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(
                f"{self.kind} must be a subclass of elasticore.{self.base.__name__}, got {cls!r}."
            )
        if missing := getattr(cls, "__abstractmethods__", None):
            raise TypeError(
                f"{self.kind} {cls.__name__} does not implement {', '.join(sorted(missing))}."
            )

    def _offered(self) -> dict[str, importlib.metadata.EntryPoint]:
        if self._entry_points is None:
            found = importlib.metadata.entry_points(group=self.group)
            self._entry_points = {entry.name: entry for entry in found}
        return self._entry_points
