"""Choosing an engine: for the process, for a context, or for one call."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from elasticore import (
    AttentionRequest,
    HeadPlan,
    UnknownBackend,
    UnsupportedRequest,
    Verdict,
    choice,
    current_backend,
    hybrid_head_attention,
    register_backend,
    use_backend,
)
from elasticore.backends.serial import SerialAttention
from elasticore.choice import using_engine
from tests.toys import Absent, Ones, call

pytestmark = pytest.mark.usefixtures("clean_registry")


# --- use_backend ---------------------------------------------------------------------------------


def test_the_default_is_auto_and_runs_without_any_setup() -> None:
    assert current_backend() == "auto"
    assert torch.equal(call(), torch.zeros(1, 2, 4, 16))


def test_a_call_chooses_from_now_on() -> None:
    register_backend("ones", Ones)
    use_backend("ones")
    assert current_backend() == "ones"
    assert bool((call() == 1).all())
    use_backend("auto")
    assert bool((call() == 0).all())


def test_a_with_block_restores_what_was_there_before() -> None:
    register_backend("ones", Ones)
    use_backend("serial")
    with use_backend("ones"):
        assert current_backend() == "ones"
        with use_backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "ones"
    assert current_backend() == "serial"


def test_an_exception_in_the_block_restores_too() -> None:
    with pytest.raises(KeyError), use_backend("serial"):
        raise KeyError
    assert current_backend() == "auto"


def test_a_handle_can_be_used_again() -> None:
    handle = use_backend("serial")
    for _ in range(2):
        with handle:
            assert current_backend() == "serial"
        assert current_backend() == "auto"


def test_the_backend_argument_is_for_one_call() -> None:
    register_backend("ones", Ones)
    with use_backend("serial"):
        assert bool((call("ones") == 1).all())
        assert current_backend() == "serial"
        assert bool((call() == 0).all())


def test_a_call_reaches_every_thread_and_a_with_block_only_its_own() -> None:
    """A thread that was started before, one started later, and one with a choice of its own."""
    register_backend("ones", Ones)
    seen: dict[str, tuple[str, float]] = {}
    chosen, looked = threading.Event(), threading.Event()

    def look(name: str) -> None:
        seen[name] = (current_backend(), float(call().max()))

    def early() -> None:
        chosen.wait(timeout=30)
        look("early")
        with use_backend("serial"):
            look("own")
            looked.set()

    first = threading.Thread(target=early)
    first.start()
    use_backend("ones")
    chosen.set()
    looked.wait(timeout=30)
    with use_backend("serial"):
        later = threading.Thread(target=look, args=("later",))
        later.start()
        later.join(timeout=30)
    first.join(timeout=30)
    assert seen == {"early": ("ones", 1.0), "own": ("serial", 0.0), "later": ("ones", 1.0)}
    assert current_backend() == "ones"


def test_a_call_in_a_thread_is_everybodys() -> None:
    thread = threading.Thread(target=use_backend, args=("serial",))
    thread.start()
    thread.join(timeout=30)
    assert current_backend() == "serial"


def test_a_with_block_wins_over_calls_inside_it() -> None:
    with use_backend("serial"):
        use_backend("auto")
        assert current_backend() == "serial"
    use_backend("serial")
    with use_backend("auto"):
        assert current_backend() == "auto"
    assert current_backend() == "serial"


def test_with_blocks_of_several_threads_leave_no_choice_behind() -> None:
    """Each has called before any enters, so that each call has hidden another's."""
    called = threading.Barrier(4)

    def work() -> None:
        handle = use_backend("serial")
        called.wait(timeout=30)
        with handle:
            assert current_backend() == "serial"
            called.wait(timeout=30)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert current_backend() == "auto"


def test_calls_do_not_pile_up() -> None:
    held = use_backend("serial")
    for _ in range(100):
        use_backend("serial")
        use_backend("auto")
    assert len(choice._process) < 5
    with held:
        assert current_backend() == "serial"
    assert current_backend() == "auto"


def test_asyncio_tasks_do_not_see_each_others_blocks() -> None:
    register_backend("ones", Ones)

    async def look() -> str:
        return current_backend()

    async def work(name: str) -> tuple[str, str]:
        with use_backend(name):
            await asyncio.sleep(0)  # the other task runs and chooses
            return current_backend(), await asyncio.create_task(look())

    async def main() -> list[object]:
        seen = await asyncio.gather(work("ones"), work("serial"), look())
        return [*seen, current_backend()]

    use_backend("serial")
    expected = [("ones", "ones"), ("serial", "serial"), "serial", "serial"]
    assert asyncio.run(main()) == expected
    assert current_backend() == "serial"


def test_a_call_in_an_asyncio_task_outlives_it() -> None:
    async def main() -> None:
        use_backend("serial")

    asyncio.run(main())
    assert current_backend() == "serial"


# --- Names that do not work ----------------------------------------------------------------------


@pytest.mark.parametrize("choose", [use_backend, call])
def test_an_unknown_name_raises_at_once_with_the_names_there_are(
    choose: Callable[[str], object],
) -> None:
    register_backend("ones", Ones)
    register_backend("absent", Absent)
    with pytest.raises(UnknownBackend, match=r"'tritn' is unknown.*auto,.*serial.*ones") as caught:
        choose("tritn")
    assert isinstance(caught.value, ValueError)
    assert "absent" not in str(caught.value), "only what can be used here"
    assert current_backend() == "auto"


@pytest.mark.parametrize("choose", [use_backend, call])
def test_an_unavailable_backend_raises_at_once_with_its_reason(
    choose: Callable[[str], object],
) -> None:
    register_backend("absent", Absent)
    with pytest.raises(UnsupportedRequest, match=r"pip install absent\. Available: auto, .*serial"):
        choose("absent")
    assert current_backend() == "auto"


@pytest.mark.parametrize("name", [None, 3, b"serial", SerialAttention])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match="backend must be a name"):
        use_backend(name)
    assert current_backend() == "auto"


def test_a_chosen_backend_never_falls_back() -> None:
    register_backend("ones", Ones)
    with pytest.raises(UnsupportedRequest, match=r"'ones' cannot do this call: head_dim must be"):
        call("ones", dim=32)
    with use_backend("ones"), pytest.raises(UnsupportedRequest, match="head_dim must be 16"):
        call(dim=32)
    assert bool((call(dim=32) == 0).all()), "auto finds another"


def test_auto_refuses_with_everybodys_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SerialAttention, request: AttentionRequest) -> Verdict:
        return Verdict(False, "not today.")

    monkeypatch.setattr(SerialAttention, "supports", refuse)
    register_backend("ones", Ones)
    register_backend("absent", Absent)
    with pytest.raises(UnsupportedRequest, match="no backend can do this call") as caught:
        call(dim=32)
    message = str(caught.value)
    for reason in ("serial: not today.", "ones: head_dim must be 16.", "absent: package 'absent'"):
        assert reason in message
    assert bool((call() == 1).all()), "the next call is tried afresh"


def test_an_engine_of_a_with_block_is_not_kept() -> None:
    """It may hold all that it was called with."""
    engine = Ones()
    with using_engine(engine):
        assert bool((call() == 1).all())
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_what_is_remembered_lets_no_wrong_call_pass() -> None:
    q = torch.zeros(1, 2, 4, 16)
    plan = HeadPlan(torch.zeros(1, 2, dtype=torch.int8))
    for _ in range(2):
        hybrid_head_attention(q, q, q, plan, scale=1.0)
    with pytest.raises(TypeError, match="scale must be a float"):
        hybrid_head_attention(q, q, q, plan, scale=True)
    with pytest.raises(TypeError, match="layout must be a SequenceLayout"):
        hybrid_head_attention(q, q, q, plan, layout="dense", scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plan must be a HeadPlan"):
        hybrid_head_attention(q, q, q, None, scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q and k must agree"):
        hybrid_head_attention(q[..., :8].contiguous(), q, q, plan, scale=1.0)
