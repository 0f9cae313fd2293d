"""A bad call is refused by name: 1,000 calls that are right but for one argument.

To add a function, append an :class:`Entry` to ``TABLE``: the function, a maker of fresh valid
keyword arguments (the tests check that they are), and for every argument a strategy of values that
are wrong for it *in that valid call*. ``says`` maps an argument to the word that the message must
hold where that is not its name; ``skip`` lists arguments that accept anything.

Each bad call must raise ValueError, TypeError or UnsupportedRequest with a message that names the
argument, and must leave the choice and the list of backends as they were.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from elasticore import (
    AllSparse,
    AttentionRouter,
    BlockLists,
    Elastic,
    Full,
    HeadMode,
    HeadPlan,
    HeadTable,
    HybridHeadAttention,
    LagrangianObjective,
    Router,
    Segments,
    SequenceLayout,
    Streaming,
    UnsupportedRequest,
    Verdict,
    XAttention,
    current_backend,
    elasticize,
    hybrid_head_attention,
    is_elastic,
    pool_boundary,
    register_backend,
    restore,
    use_backend,
)
from elasticore.backends.registry import list_backends
from elasticore.router import FixedPolicy
from elasticore.train import Collator, OfflineTasks, RouterTrainer

pytestmark = pytest.mark.usefixtures("clean_registry")


@dataclass(frozen=True)
class Entry:
    """A function, a valid call of it, and what breaks each of its arguments."""

    function: Callable[..., object]
    valid: Callable[[], dict[str, Any]]
    bad: Mapping[str, SearchStrategy[Any]]
    says: Mapping[str, str] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()


# --- Bad values ----------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats()
KINDS: dict[type, SearchStrategy[Any]] = {
    type(None): st.none(),
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(),
    str: st.text(max_size=5),
    bytes: st.binary(max_size=3),
    list: st.lists(NUMBERS, max_size=3),
    tuple: st.tuples(NUMBERS, NUMBERS),
    dict: st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    type: st.just(object),
    object: st.builds(object),
}


def anything(*accepted: type) -> SearchStrategy[Any]:
    """Values of every plain kind but those that an argument accepts."""
    return st.one_of(*(kind for of, kind in KINDS.items() if of not in accepted))


integer_dtypes = st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
strange_dtypes = st.sampled_from(
    [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.bool]
)


def one_of(*values: Any) -> SearchStrategy[Any]:
    return st.sampled_from(values)


def shapes(axes: int, largest: int = 4) -> SearchStrategy[list[int]]:
    """Shapes of any number of axes but ``axes``."""
    return st.lists(st.integers(1, largest), max_size=6).filter(lambda shape: len(shape) != axes)


def other_text(*accepted: str) -> SearchStrategy[Any]:
    return anything(str) | st.text().filter(lambda text: text not in accepted)


def other_than(*accepted: int, low: int = 1, high: int = 40) -> SearchStrategy[int]:
    return st.integers(low, high).filter(lambda value: value not in accepted)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def integer_vectors(length: int, *accepted: type) -> SearchStrategy[Any]:
    """What is wrong for an argument that wants an integer tensor ``[length]``."""
    return st.one_of(
        anything(*accepted),
        st.builds(torch.zeros, shapes(1), dtype=integer_dtypes),
        st.builds(torch.zeros, other_than(length), dtype=integer_dtypes),
        st.builds(torch.zeros, st.just(length), dtype=strange_dtypes),
        st.just(torch.zeros(length, dtype=torch.int64, device="meta")),
    )


# --- Attention calls: batch 2, 4 query heads, 2 KV heads, 5 queries of 8 keys, dimension 16 -------


def q_like(*shape: int, **kind: Any) -> torch.Tensor:
    return torch.zeros(shape or (2, 4, 5, 16), **kind)


def k_like(*shape: int, **kind: Any) -> torch.Tensor:
    return torch.zeros(shape or (2, 2, 8, 16), **kind)


def attention_call() -> dict[str, Any]:
    return {
        "q": q_like(),
        "k": k_like(),
        "v": k_like(),
        "plan": HeadPlan(torch.zeros(2, 2, dtype=torch.int8)),
        "layout": SequenceLayout.padded(ints(0, 3), ints(7, 7)),
        "scale": 0.25,
        "backend": "serial",
    }


def tensors(like: Callable[..., torch.Tensor]) -> SearchStrategy[Any]:
    """What is wrong for q, k or v, whatever the sizes of the others."""
    batch, heads, positions, dim = like().shape
    return st.one_of(
        anything(),
        st.builds(torch.zeros, shapes(4)),
        st.builds(like, dtype=integer_dtypes),
        st.builds(like, dtype=strange_dtypes.filter(lambda dtype: dtype != torch.float32)),
        st.builds(lambda n: like(n, heads, positions, dim), other_than(batch, low=0)),
        st.builds(lambda n: like(batch, heads, positions, n), other_than(dim, low=0)),
        st.builds(
            lambda shape, axis: like(*shape[:axis], 0, *shape[axis + 1 :]),
            st.just((batch, heads, positions, dim)),
            st.integers(0, 3),
        ),
        one_of(
            like(device="meta"),
            like(batch, heads, positions, 2 * dim)[..., ::2],
            like(batch, heads, dim, positions).transpose(2, 3),
            like().to_sparse(),
        ),
    )


def plans(sequences: int, kv_heads: int) -> SearchStrategy[HeadPlan]:
    return st.just(HeadPlan(torch.zeros(sequences, kv_heads, dtype=torch.int8)))


def unknown_names() -> SearchStrategy[str]:
    return st.text(max_size=8).filter(lambda name: name not in {"auto", *(b.name for b in known)})


known = list_backends()

ATTENTION = Entry(
    hybrid_head_attention,
    attention_call,
    {
        "q": tensors(q_like)
        | st.builds(
            lambda n: q_like(2, n, 5, 16),
            st.integers(0, 20).filter(lambda n: n == 0 or n % 2),
        )
        | st.builds(lambda n: q_like(2, 4, n, 16), st.integers(9, 40)),  # more than keys
        "k": tensors(k_like)
        | st.builds(lambda n: k_like(2, n, 8, 16), other_than(2))
        | st.builds(lambda n: k_like(2, 2, n, 16), other_than(8)),
        "v": tensors(k_like)
        | st.builds(lambda n: k_like(2, n, 8, 16), other_than(2))
        | st.builds(lambda n: k_like(2, 2, n, 16), other_than(8)),
        "plan": anything()
        | other_than(2).flatmap(lambda n: plans(n, 2))
        | other_than(2).flatmap(lambda n: plans(2, n))
        | st.just(HeadPlan(torch.zeros(2, 2, dtype=torch.int8, device="meta"))),
        "layout": anything(type(None))
        | st.builds(lambda n: SequenceLayout.padded(ints(*[0] * n), ints(*[7] * n)), other_than(2))
        | st.builds(lambda n: SequenceLayout.padded(ints(0, 0), ints(7, n)), st.integers(8, 99))
        | st.builds(
            lambda n: SequenceLayout.padded(ints(0, 0), ints(7, 7), ints(n, 0)), st.integers(4, 99)
        )
        | one_of(
            SequenceLayout.padded(*(ints(0, 0).to("meta"),) * 2),
            SequenceLayout.packed(ints(0, 5)),
            SequenceLayout.packed(ints(0, 2, 5), ints(0, 4, 8)),
        ),
        "scale": anything(type(None), int, float)
        | one_of(float("nan"), float("inf"), -float("inf"), 1j, torch.tensor(0.25)),
        "backend": anything(type(None), str) | unknown_names(),
    },
)

PACKED_ATTENTION = Entry(
    hybrid_head_attention,
    lambda: {
        **attention_call(),
        "q": q_like(1, 4, 5, 16),
        "k": k_like(1, 2, 8, 16),
        "v": k_like(1, 2, 8, 16),
        "layout": SequenceLayout.packed(ints(0, 2, 5), ints(0, 4, 8)),
    },
    {
        "plan": other_than(2).flatmap(lambda n: plans(n, 2)),
        "layout": st.builds(lambda n: SequenceLayout.packed(ints(0, 2, n)), st.integers(6, 99))
        | st.builds(
            lambda n: SequenceLayout.packed(ints(0, 2, 5), ints(0, 4, n)), st.integers(9, 99)
        ),
    },
    skip=frozenset({"q", "k", "v", "scale", "backend"}),  # as in ATTENTION
)

# --- Layouts -------------------------------------------------------------------------------------

PADDED = Entry(
    SequenceLayout.padded,
    lambda: {"first": ints(0, 1, 2), "last": ints(7, 7, 7), "query_offset": ints(0, 3, 3)},
    {
        "first": integer_vectors(3) | st.builds(lambda n: ints(0, n, 0), st.integers(-(2**40), -1)),
        "last": integer_vectors(3),
        "query_offset": integer_vectors(3, type(None))
        | st.builds(lambda n: ints(n, 0, 0), st.integers(-(2**40), -1)),
    },
)

MASKED = Entry(
    SequenceLayout.from_attention_mask,
    lambda: {"mask": torch.ones(3, 6), "query_offset": ints(0, 1, 1)},
    {
        "mask": st.one_of(
            anything(),
            st.builds(torch.ones, shapes(2)),
            st.builds(lambda n: torch.ones(n, 0), st.integers(0, 4)),
            st.builds(
                lambda x: torch.full((3, 6), x),
                st.floats(width=32).filter(lambda x: x not in (0, 1)),
            ),
            st.builds(lambda n: torch.full((3, 6), n), st.integers(2, 2**40)),
            st.builds(  # a hole at n
                lambda n: torch.ones(3, 6).index_fill(1, ints(n), 0), st.integers(1, 4)
            ),
        ),
        "query_offset": integer_vectors(3, type(None)),
    },
)

PACKED = Entry(
    SequenceLayout.packed,
    lambda: {"cu_queries": ints(0, 2, 5), "cu_keys": ints(0, 4, 8)},
    {
        "cu_queries": integer_vectors(3)
        | st.builds(lambda n: ints(n, 2, 5), st.integers(-9, 9).filter(bool))
        | st.builds(lambda n: ints(0, n, 5), st.integers(-9, -1) | st.integers(6, 99))
        | st.builds(lambda n: ints(0, 2, n), st.integers(7, 99)),  # more queries than keys
        "cu_keys": integer_vectors(3, type(None))
        | st.builds(lambda n: ints(n, 4, 8), st.integers(-9, 9).filter(bool))
        | st.builds(lambda n: ints(0, n, 8), st.integers(-9, 1) | st.integers(9, 99))
        | st.builds(lambda n: ints(0, 4, n), st.integers(-9, 6)),
    },
)

LAYOUT = Entry(
    SequenceLayout,
    lambda: {"kind": "dense"},
    {"kind": other_text("dense") | one_of("padded", "packed", "ragged")},
    skip=frozenset({"first", "last", "query_offset", "cu_queries", "cu_keys"}),  # by the others
)

# --- Plans ---------------------------------------------------------------------------------------

bad_pattern = st.one_of(
    anything(),
    st.sampled_from([*HeadMode, Streaming, XAttention, Full]),
    st.builds(  # no multiple of the block of 32
        Streaming,
        other_than(*range(0, 999, 32), low=0, high=990),
        other_than(*range(0, 999, 32), low=1, high=990),
    ),
    st.sampled_from([XAttention(64), XAttention(2048)]),
)
bad_block_size = st.one_of(
    anything(int), other_than(16, 32, 64, 128, low=-999, high=999), one_of(16.0, 256, 8, 0)
)


# A pattern that does not fit the blocks names its own sizes.
SAYS = {"retrieval": "retrieval|selector|streaming", "sparse": "sparse|selector|streaming"}


def plan_call() -> dict[str, Any]:
    return {
        "decisions": torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.int8),
        "retrieval": XAttention(32),
        "sparse": Streaming(32, 64),
        "gate": torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
        "block_size": 32,
    }


def gates(*accepted: type) -> SearchStrategy[Any]:
    return st.one_of(
        anything(*accepted),
        st.builds(torch.zeros, shapes(2)),
        st.builds(lambda dtype: plan_call()["gate"].to(dtype), integer_dtypes),
        st.builds(
            lambda x, place: plan_call()["gate"].flatten().index_fill(0, ints(place), x).view(2, 3),
            st.floats(width=32).filter(lambda x: x not in (0, 1)),
            st.integers(0, 5),
        ),
    )


PLAN = Entry(
    HeadPlan,
    plan_call,
    {
        "decisions": st.one_of(
            anything(),
            st.builds(torch.zeros, shapes(2), dtype=st.just(torch.int8)),
            st.builds(
                lambda dtype: plan_call()["decisions"].to(dtype),
                integer_dtypes.filter(lambda dtype: dtype != torch.int8) | strange_dtypes,
            ),
            st.builds(
                lambda n, place: (
                    plan_call()["decisions"].flatten().index_fill(0, ints(place), n).view(2, 3)
                ),
                st.integers(-128, -1) | st.integers(2, 127),
                st.integers(0, 5),
            ),
            st.builds(  # does not fit the gate
                lambda n: torch.zeros(2, n, dtype=torch.int8), other_than(3)
            ),
        ),
        "retrieval": bad_pattern | one_of(Streaming(0, 32)),
        "sparse": bad_pattern | one_of(XAttention(16)),
        "gate": gates(type(None))
        | st.builds(lambda n: torch.zeros(n, 3), other_than(2))
        | one_of(torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
        "block_size": bad_block_size | one_of(16, 128),  # which one of the patterns refuses
    },
    says=SAYS,
    skip=frozenset({"check"}),
)

FROM_GATE = Entry(
    HeadPlan.from_gate,
    lambda: {name: value for name, value in plan_call().items() if name != "decisions"},
    {
        "gate": gates(),
        "retrieval": bad_pattern.filter(lambda x: x is not None) | one_of(Streaming(0, 32)),
        "sparse": bad_pattern.filter(lambda x: x is not None) | one_of(XAttention(16)),
        "block_size": bad_block_size | one_of(16, 128),
    },
    says=SAYS,
)

WITH_DECISIONS = Entry(
    HeadPlan(**plan_call()).with_decisions,
    lambda: {"decisions": torch.zeros(1, 7, dtype=torch.int8)},
    {
        "decisions": anything()
        | st.builds(torch.zeros, shapes(2), dtype=st.just(torch.int8))
        | st.builds(torch.zeros, st.just((2, 3)), dtype=strange_dtypes)
    },
)

ESR = Entry(
    HeadPlan(**plan_call()).esr,
    lambda: {
        "segments": SequenceLayout.dense().segments(2, 5, 8, torch.device("cpu")),
        "definition": "causal",
        "selection": BlockLists.from_mask(torch.ones(2, 6, 1, 1, dtype=torch.bool)),
    },
    {
        "segments": anything()
        | st.builds(
            lambda n: SequenceLayout.dense().segments(n, 5, 8, torch.device("cpu")),
            other_than(2, low=0),
        )
        | one_of(tuple(SequenceLayout.dense().segments(2, 5, 8, torch.device("cpu")))),
        "definition": other_text("causal", "last_query"),
        "selection": anything(type(None))
        | st.builds(
            lambda n, heads: BlockLists.from_mask(torch.ones(n, heads, 1, 1, dtype=torch.bool)),
            other_than(2),
            st.just(6),
        )
        | st.builds(
            lambda heads: BlockLists.from_mask(torch.ones(2, heads, 1, 1, dtype=torch.bool)),
            st.integers(1, 40).filter(lambda heads: heads % 3),
        ),
    },
)

# --- Patterns ------------------------------------------------------------------------------------

no_power_of_two = st.integers(max_value=0) | st.integers(3, 2**40).filter(lambda n: n & (n - 1))

STREAMING = Entry(
    Streaming,
    lambda: {"sink": 128, "local": 2048},
    {
        "sink": anything(int) | st.integers(max_value=-1),
        "local": anything(int) | st.integers(max_value=0),
    },
)

XATTENTION = Entry(
    XAttention,
    lambda: {"stride": 16, "threshold": 0.9, "official_quirk": False, "chunk": 1024},
    {
        "stride": anything(int) | no_power_of_two,
        "threshold": anything(int, float)
        | st.floats(max_value=0)
        | st.floats(min_value=1, exclude_min=True)
        | st.just(float("nan")),
        "official_quirk": anything(bool),
        "chunk": anything(int) | no_power_of_two,
    },
)

# --- Backends ------------------------------------------------------------------------------------


class Works(HybridHeadAttention):
    name = "works"

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)

    def supports(self, request: Any) -> Verdict:
        return Verdict(True)

    def attend(self, q: Any, k: Any, v: Any, plan: Any, **_: Any) -> Any:
        return q


class Unfinished(HybridHeadAttention):
    name = "unfinished"


USE_BACKEND = Entry(
    use_backend,
    lambda: {"name": "serial"},
    {"name": anything(str) | unknown_names()},
    says={"name": "backend"},
)

REGISTER_BACKEND = Entry(
    register_backend,
    lambda: {"name": "mine", "backend": Works, "replace": True},  # again for every example
    {
        "name": anything(str) | one_of("", "auto"),
        "backend": anything()
        | one_of(Works(), Unfinished, HybridHeadAttention, dict, Works.attend),
    },
    skip=frozenset({"replace"}),
)

REGISTER_TAKEN = Entry(
    register_backend,
    lambda: {"name": "untaken", "backend": Works, "replace": False},
    {"name": one_of(*(info.name for info in known))},
    skip=frozenset({"backend", "replace"}),
)

# --- Routers -------------------------------------------------------------------------------------


def segments_of_two() -> Segments:
    return SequenceLayout.dense().segments(2, 8, 8, torch.device("cpu"))


def positive_ints(*accepted: type) -> SearchStrategy[Any]:
    """What is wrong for an argument that wants an int of at least 1."""
    return anything(int, *accepted) | st.integers(max_value=0)


KEYS = st.one_of(
    anything(),
    st.builds(torch.zeros, shapes(4)),
    st.just(torch.zeros(2, 8, 2, 16, dtype=torch.int64)),
    st.just(torch.zeros(2, 8, 2, 16, device="meta")),
)
POOLING = Entry(
    pool_boundary,
    lambda: {"keys": torch.zeros(2, 8, 2, 16), "segments": segments_of_two(), "boundary": 3},
    {
        "keys": KEYS,
        "segments": anything() | st.just(tuple(segments_of_two())),
        "boundary": positive_ints(type(None)),
    },
)
ROUTER = Entry(
    AttentionRouter,
    lambda: {"head_dim": 16},
    {
        "head_dim": positive_ints(),
        "hidden_multiplier": positive_ints(),
        "boundary": positive_ints(type(None)),
        "by": other_text("head", "layer"),
    },
    skip=frozenset({"sampler", "device", "dtype"}),  # PyTorch refuses wrong devices and dtypes
)
ROUTER_POLICY = Entry(
    Router,
    dict,
    {
        "boundary": positive_ints(type(None)),
        "hidden_multiplier": positive_ints(),
        "sampler": other_text("gumbel-softmax", "gumbel-sigmoid"),
        "by": other_text("head", "layer"),
    },
    skip=frozenset({"weights"}),  # checked against the model's layers
)
no_share = anything(int, float, bool) | one_of(-0.1, 1.1, float("nan"), float("inf"))
HEAD_TABLE = Entry(
    HeadTable,
    lambda: {"sparse": [[0, 1], [1, 1]]},
    {
        "sparse": st.one_of(
            anything(list, tuple),
            st.just(torch.tensor([[0.0, 1.0]])),
            st.just(torch.zeros(2, dtype=torch.int8)),
            st.just(torch.tensor([[0, 2]])),
            st.just([[0, 1], [1]]),
        )
    },
    skip=frozenset({"streaming"}),  # what a file says
)
OF_SCORES = Entry(
    HeadTable.of_scores,
    lambda: {"scores": torch.tensor([[0.1, 0.9]]), "msr": 0.5},
    {
        "scores": st.one_of(
            anything(),
            st.builds(torch.zeros, shapes(2)),
            st.just(torch.tensor([[0, 1]])),
            st.just(torch.tensor([[0.0, float("nan")]])),
        ),
        "msr": no_share,
    },
)
RANDOM_TABLE = Entry(
    HeadTable.random,
    lambda: {"layers": 3, "kv_heads": 2, "msr": 0.5, "seed": 0},
    {
        "layers": positive_ints(),
        "kv_heads": positive_ints(),
        "msr": no_share,
        "seed": anything(int, bool) | st.integers(max_value=-1),
    },
)
FIXED = Entry(
    FixedPolicy,
    lambda: {"decisions": torch.tensor([0, 1])},
    {
        "decisions": st.one_of(
            anything(list, tuple),
            st.just(torch.tensor([0.0, 1.0])),
            st.just(torch.zeros(2, 2, dtype=torch.int8)),
            st.just(torch.tensor([0, 2])),
            st.just(torch.tensor([-1, 0])),
        )
    },
)
OBJECTIVE = Entry(
    LagrangianObjective,
    lambda: {"targets": {"qa": 0.7, "code": [0.8, 1.0]}},
    {
        "targets": st.one_of(
            anything(dict),
            st.just({}),
            st.builds(lambda bad: {"qa": bad}, anything(int, float, bool)),
            st.builds(lambda bad: {"qa": bad}, one_of(-0.5, 1.5, float("nan"), [0.9, 0.1])),
        ),
        "init": anything(tuple, list)
        | one_of((1.0, 0.0), (0.0,), (0.0, float("inf")), (float("nan"), 1.0)),
        "seed": anything(int, bool, type(None)),
    },
    skip=frozenset({"signed"}),
)


# --- Models: a tiny one that every bad call must leave alone -------------------------------------


@cache
def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def fresh_elasticize(**arguments: Any) -> None:
    """``elasticize`` whose result is undone, so that every call meets a plain model."""
    restore(elasticize(**arguments))


@cache
def saved_routers() -> Path:
    folder = Path(mkdtemp(prefix="elasticore-bad-calls-"))
    return Elastic(AllSparse()).save(folder)


NO_MODEL = anything() | st.builds(torch.nn.Linear, st.just(2), st.just(2))
NO_POLICY = st.one_of(
    anything(list, tuple),
    st.just(AllSparse),
    st.just([AllSparse(), AllSparse()]),
    st.just([FixedPolicy([0, 1]), None]),
)
WRONG_LAYERS = st.builds(
    lambda layers: Elastic([FixedPolicy([0, 1]) for _ in range(layers)]), other_than(2, low=0)
)
WAY = Entry(
    Elastic,
    lambda: {"retrieval": XAttention(32), "sparse": Streaming(32, 64), "block_size": 32},
    {
        "policy": NO_POLICY,
        "retrieval": bad_pattern | one_of(Streaming(0, 32)),
        "sparse": bad_pattern | one_of(XAttention(16)),
        "block_size": st.one_of(
            anything(int, type(None)),
            other_than(16, 32, 64, 128, low=-5, high=300),
            one_of(16, 128),  # which one of the patterns refuses
        ),
        "prefill": other_text("routed", "full"),
        "decode": other_text("routed", "full"),
        "turn": other_text("renew", "keep"),
        "cache": other_text("dense", "elastic"),
    },
    says=SAYS,
    skip=frozenset({"base"}),  # a fingerprint, compared with the model's
)
WAY_FROM_DICT = Entry(
    Elastic.from_dict,
    lambda: {"data": {"sparse": {"name": "xattention"}}},
    {
        "data": st.one_of(
            anything(dict),
            st.just({"unheard": 1}),
            st.just({"mode": "fa-ssa"}),
            st.just({"sparse": {"name": "unheard"}}),
            st.just({"sparse": {"name": "xattention", "unheard": 1}}),
            st.just({"sparse": 5}),
            st.just({"policy": {"name": "unheard"}}),
            st.just({"policy": 5}),
        )
    },
    says={"data": "data|pattern|sparse|policy"},
    skip=frozenset({"tensors", "base"}),  # what files hold
)
LOAD = Entry(
    Elastic.load,
    lambda: {"name": saved_routers()},
    {"name": anything(str) | st.builds("/nowhere/{}".format, st.integers())},
    says={"name": "path"},
    skip=frozenset({"revision"}),  # of a hub
)
ELASTICIZE = Entry(
    fresh_elasticize,
    lambda: {"model": tiny_model(), "way": Elastic()},
    {"model": NO_MODEL, "way": anything(type(None), str) | WRONG_LAYERS},
    says={"way": "way|policy"},
)
RESTORE = Entry(restore, lambda: {"model": elasticize(deepcopy(tiny_model()))}, {"model": NO_MODEL})

# --- Training ------------------------------------------------------------------------------------

OFFLINE = Entry(
    OfflineTasks,
    lambda: {"tokenizer": None, "tasks": {"code": 1.0}, "length": 64, "samples": 4},
    {
        "tasks": anything(dict) | one_of({}, {"unheard": 1}, {"code": 0}, {"code": float("nan")}),
        "length": positive_ints(),
        "samples": positive_ints(),
        "seed": anything(int) | st.integers(max_value=-1),
        "split": other_text("train", "heldout"),
        "module": anything(str) | one_of("", ".near", "nowhere", "json"),
        "chat": anything(int, float) | one_of(-0.1, 0.5, 1.5, float("nan")),
    },
    skip=frozenset({"tokenizer"}),  # any callable that transformers' tokenizers are like
)
COLLATOR = Entry(
    Collator,
    lambda: {"tasks": ("qa",)},
    {
        "tasks": anything(tuple, list) | st.just(()),
        "pad_token_id": anything(int) | st.integers(max_value=-1),
        "reduction": other_text("tokens", "samples"),
    },
    skip=frozenset({"packed"}),
)


@cache
def training_arguments() -> TrainingArguments:
    return TrainingArguments(output_dir=mkdtemp(), report_to=[], use_cpu=True)


TRAINER = Entry(
    RouterTrainer,
    lambda: {
        "model": elasticize(deepcopy(tiny_model())),
        "args": training_arguments(),
        "objective": LagrangianObjective({"qa": 0.7}, seed=0),
        "train_dataset": [],
    },
    {
        "model": NO_MODEL | st.builds(tiny_model),
        "args": anything(),
        "objective": anything(),
        "collator": anything(type(None)),
        "temperature": anything(type(None), type),
        "multiplier_lr": anything(int, float) | one_of(-1.0, float("nan"), float("inf")),
        "sequence_parallel": anything(int) | one_of(0, -1, 2, True),
        "identity": anything(dict, type(None)),
    },
    skip=frozenset({"train_dataset", "eval_dataset", "callbacks"}),  # the Trainer's own
)

TABLE = {
    "hybrid_head_attention": ATTENTION,
    "hybrid_head_attention, packed": PACKED_ATTENTION,
    "SequenceLayout": LAYOUT,
    "SequenceLayout.padded": PADDED,
    "SequenceLayout.from_attention_mask": MASKED,
    "SequenceLayout.packed": PACKED,
    "HeadPlan": PLAN,
    "HeadPlan.from_gate": FROM_GATE,
    "HeadPlan.with_decisions": WITH_DECISIONS,
    "HeadPlan.esr": ESR,
    "Streaming": STREAMING,
    "XAttention": XATTENTION,
    "use_backend": USE_BACKEND,
    "register_backend": REGISTER_BACKEND,
    "register_backend, taken": REGISTER_TAKEN,
    "pool_boundary": POOLING,
    "AttentionRouter": ROUTER,
    "Router": ROUTER_POLICY,
    "HeadTable": HEAD_TABLE,
    "HeadTable.of_scores": OF_SCORES,
    "HeadTable.random": RANDOM_TABLE,
    "FixedPolicy": FIXED,
    "LagrangianObjective": OBJECTIVE,
    "Elastic": WAY,
    "Elastic.from_dict": WAY_FROM_DICT,
    "Elastic.load": LOAD,
    "elasticize": ELASTICIZE,
    "restore": RESTORE,
    "OfflineTasks": OFFLINE,
    "Collator": COLLATOR,
    "RouterTrainer": TRAINER,
}
WRAPPED = (fresh_elasticize,)  # it takes any arguments and passes them on
ARGUMENTS = [(name, argument) for name, entry in TABLE.items() for argument in entry.bad]

# --- The tests -----------------------------------------------------------------------------------


def check_refused(name: str, argument: str, data: st.DataObject) -> None:
    """The valid call with ``argument`` replaced raises, names it, and changes nothing."""
    entry = TABLE[name]
    before = current_backend(), [info.name for info in list_backends()]
    word = entry.says.get(argument, argument)
    value = data.draw(entry.bad[argument], label=f"{argument} of {name}")
    with pytest.raises((ValueError, TypeError, UnsupportedRequest)) as caught:
        entry.function(**{**entry.valid(), argument: value})
    assert re.search(rf"\b({word})\b", str(caught.value)), f"{word} is not named"
    assert (current_backend(), [info.name for info in list_backends()]) == before
    assert not is_elastic(tiny_model()), "a failed call changed the model"


@pytest.mark.parametrize("name", TABLE)
def test_the_call_is_valid_before_it_is_broken(name: str) -> None:
    entry = TABLE[name]
    entry.function(**entry.valid())


@pytest.mark.parametrize("name", TABLE)
def test_every_argument_is_broken(name: str) -> None:
    entry = TABLE[name]
    if entry.function in WRAPPED:
        return
    parameters = set(inspect.signature(entry.function).parameters) - {"self", "cls"}
    assert parameters == set(entry.bad) | entry.skip


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@settings(max_examples=10)
@given(data=st.data())
def test_each_argument_is_checked(name: str, argument: str, data: st.DataObject) -> None:
    check_refused(name, argument, data)


@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_thousand_bad_calls(data: st.DataObject) -> None:
    name, argument = data.draw(st.sampled_from(ARGUMENTS))
    check_refused(name, argument, data)
