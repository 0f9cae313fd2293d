"""Benchmarks: one set of cases, run by ``elasticore bench`` and by ``pytest --benchmark-only``.

A *case* is one piece of work, an *engine* is somebody who can do it: one of our backends, or a peer
from another project. Every engine of a case gets the same tensors, and its output is compared
before its time counts.
"""
