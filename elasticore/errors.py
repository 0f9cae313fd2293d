"""The errors that elasticore raises, beside ``ValueError`` and ``TypeError`` for bad input."""

from __future__ import annotations

__all__ = [
    "ElasticoreError",
    "OutdatedPackage",
    "RouterMismatch",
    "RouterNotFound",
    "UnknownBackend",
    "UnsupportedModel",
    "UnsupportedRequest",
]


class ElasticoreError(Exception):
    """Base of every error that is elasticore's own."""


class UnsupportedRequest(ElasticoreError, RuntimeError):
    """A correct call that a backend, or this machine, cannot do; the message says why."""


class OutdatedPackage(ElasticoreError, RuntimeError):
    """A package that elasticore needs is installed in a version that is too old."""


class UnknownBackend(ElasticoreError, ValueError):
    """A backend name that is not registered; the message lists the ones that are."""


class UnsupportedModel(ElasticoreError, ValueError):
    """A model, or a part of one, that cannot be made elastic; the message names the family."""


class RouterMismatch(ElasticoreError, ValueError):
    """Routers that were trained for another model than the one they are used with."""


class RouterNotFound(ElasticoreError, FileNotFoundError, ValueError):
    """No routers where they were said to be, neither on disk nor on the hub."""
