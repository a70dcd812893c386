"""The bridge: sync code awaits the loop it was called from. No database here."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import greenlet
import pytest
from django.core.exceptions import SynchronousOnlyOperation

from django_asyncsession.bridge import await_, await_here, get_running_loop, in_bridge, run
from django_asyncsession.exceptions import BridgeError
from tests.faults import LoopProbe, cancel_at, outcome_of, watchdog

T = TypeVar("T")
var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="unset")


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Only reference counts end what is not used any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def nap(seconds: float = 0) -> None:
    await_(asyncio.sleep(seconds))


class Parting:
    """Notes how sync code was left."""

    def __init__(self) -> None:
        self.with_error: BaseException | None = None
        self.left = False

    def __call__(self) -> None:
        try:
            await_(asyncio.get_running_loop().create_future())
        except BaseException as error:
            self.with_error = error.with_traceback(None)
            raise
        finally:
            self.left = True


# Results, exceptions, cancellation


async def test_arguments_go_in_and_the_result_comes_out() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return number * 2

    assert await run(lambda a, *, b: (await_(double(a)), b), 21, b="b") == (42, "b")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no task is eager before Python 3.12")
async def test_an_eager_task_that_sync_code_makes_goes_on_beside_it() -> None:
    """It begins inside that code, and whoever wakes it up later is somebody else."""

    async def value(of: T) -> T:
        await asyncio.sleep(0)
        return of

    def numbers() -> list[int]:
        return [await_(value(number)) for number in range(3)]

    def letters() -> tuple[list[str], asyncio.Task[list[int]]]:
        task = asyncio.create_task(run(numbers))
        return [await_(value(letter)) for letter in "abcde"], task

    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    try:
        found, task = await run(letters)
        assert (found, await task) == ([*"abcde"], [0, 1, 2])
    finally:
        loop.set_task_factory(None)


async def test_code_that_awaits_nothing_needs_no_suspension() -> None:
    assert await cancel_at(run(lambda: "x"), {1}) == "x"


async def test_any_awaitable_is_awaited() -> None:
    async def answer() -> int:
        return 3

    def awaits() -> tuple[int, ...]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(future.set_result, 2)
        return (
            await_(loop.create_task(answer())),
            await_(future),
            await_(asyncio.gather(answer()))[0],
        )

    assert await run(awaits) == (3, 2, 3)


async def test_an_exception_of_the_code_reaches_the_caller_with_cause_and_traceback() -> None:
    cause = KeyError("cause")

    def fail() -> None:
        nap()
        raise ValueError("x") from cause

    with pytest.raises(ValueError, match="x") as caught:
        await run(fail)
    assert caught.value.__cause__ is cause
    assert "fail" in [entry.name for entry in caught.traceback]


async def test_an_exception_of_the_awaitable_is_raised_in_the_code_which_may_handle_it() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    def handle() -> str:
        try:
            await_(fail())
        except KeyError as error:
            nap()
            return f"handled {error}"
        return "not raised"

    assert await run(handle) == "handled 'x'"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_a_base_exception_of_the_code_reaches_the_caller(kind: type[BaseException]) -> None:
    def fail() -> None:
        nap()
        raise kind

    with pytest.raises(kind):
        await run(fail)


async def test_cancelling_the_task_raises_cancelled_error_in_the_code() -> None:
    parting = Parting()
    task = asyncio.create_task(run(parting))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(parting.with_error, asyncio.CancelledError) and task.cancelled()


async def test_code_that_is_cancelled_may_await_while_it_cleans_up() -> None:
    def clean_up() -> str:
        try:
            nap(10)
        except asyncio.CancelledError:
            nap()
            return "cleaned"
        return "not cancelled"

    assert await outcome_of(cancel_at(run(clean_up), {1})) == "cleaned"


async def test_a_timeout_around_the_code_works_as_around_a_coroutine() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run(nap, 10)


async def test_cancelled_error_of_the_awaitable_alone_does_not_cancel_the_task() -> None:
    def awaits_a_cancelled_future() -> str:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await_(future)
        return "went on"

    assert await run(awaits_a_cancelled_future) == "went on"
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0


async def test_the_loop_goes_on_while_the_code_waits() -> None:
    async with LoopProbe() as probe:
        await asyncio.gather(*(run(nap, 0.05) for _ in range(100)))
    assert probe.worst < 0.05


async def test_the_code_runs_in_the_callers_task_and_thread() -> None:
    def where() -> tuple[Any, ...]:
        nap()
        return asyncio.current_task(), threading.get_ident()

    assert await run(where) == (asyncio.current_task(), threading.get_ident())


# Context variables


async def test_context_variables_pass_both_ways() -> None:
    async def change() -> str:
        seen = var.get()
        await asyncio.sleep(0)
        var.set("by the awaitable")
        return seen

    def code() -> list[str]:
        seen = [var.get()]
        var.set("by the code")
        seen.append(await_(change()))
        return [*seen, var.get()]

    var.set("by the caller")
    assert await run(code) == ["by the caller", "by the code", "by the awaitable"]
    assert var.get() == "by the awaitable"


async def test_500_tasks_see_only_their_own_variables() -> None:
    def code(name: str) -> bool:
        var.set(name)
        for _ in range(5):
            nap()
            if var.get() != name:
                return False
        return True

    async def task(name: str) -> bool:
        return await run(code, name) and var.get() == name

    before = var.get()
    assert all(await asyncio.gather(*(task(str(n)) for n in range(500))))
    assert var.get() == before


async def test_a_token_of_the_caller_can_be_reset_in_the_code() -> None:
    token = var.set("x")
    await run(lambda: (nap(), var.reset(token)))
    assert var.get() == "unset"


# Nesting


async def test_run_nests() -> None:
    def inner(depth: int) -> int:
        nap()
        return 1 + await_(run(inner, depth - 1)) if depth else 0

    assert await run(inner, 50) == 50


async def test_an_inner_error_passes_through_each_level() -> None:
    def inner(depth: int) -> None:
        nap()
        if not depth:
            raise KeyError("deep")
        await_(run(inner, depth - 1))

    with pytest.raises(KeyError):
        await run(inner, 10)


async def test_in_bridge_is_true_in_the_code_only() -> None:
    seen = []

    async def outside() -> None:
        seen.append(in_bridge())

    assert await run(lambda: (await_(outside()), in_bridge())[1]) is True
    assert seen == [False] and not in_bridge()


async def test_there_is_no_running_loop_in_the_code_for_those_who_guard_against_one() -> None:
    def asks() -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            get_running_loop()

    await run(asks)
    # Who asks there would block the loop, and is told so in the words of this package.
    with pytest.raises(SynchronousOnlyOperation, match="would block the event loop"):
        get_running_loop()


# Outside


async def test_await_outside_says_what_to_do_and_closes_the_coroutine() -> None:
    coroutine = asyncio.sleep(0)
    with pytest.raises(BridgeError, match=r"outside bridge.run\(\); call it from .*run_sync"):
        await_(coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        coroutine.send(None)
    task = asyncio.create_task(asyncio.sleep(10))
    with pytest.raises(BridgeError):
        await_(task)
    await asyncio.wait([task])
    assert task.cancelled()


def test_await_outside_of_a_loop_says_what_to_do() -> None:
    with pytest.raises(BridgeError, match=r"outside bridge.run"):
        await_(asyncio.sleep(0))


async def test_await_in_a_thread_or_greenlet_of_the_codes_own_is_refused() -> None:
    def other_greenlet() -> None:
        with pytest.raises(BridgeError):
            greenlet.greenlet(nap).switch()

    await run(other_greenlet)
    with pytest.raises(BridgeError):
        await asyncio.to_thread(nap)


# A suspended run that nobody resumes


def suspended(fn: Any) -> Any:
    """A coroutine of `run(fn)` that is suspended in its first await."""
    coroutine = run(fn)
    coroutine.send(None)
    return coroutine


async def test_closing_a_suspended_run_unwinds_the_code() -> None:
    parting = Parting()
    suspended(parting).close()
    assert parting.left and isinstance(parting.with_error, GeneratorExit)


async def test_collecting_a_suspended_run_unwinds_the_code(no_gc: None) -> None:
    parting = Parting()
    coroutine = suspended(parting)
    del coroutine
    assert parting.left


async def test_nothing_can_be_awaited_while_a_suspended_run_is_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors: list[BaseException] = []

    def clean_up() -> None:
        try:
            nap(10)
        finally:
            try:
                nap()
            except BridgeError as error:
                errors.append(error)
                raise

    with caplog.at_level(logging.WARNING, "django_asyncsession"):
        suspended(clean_up).close()
    assert "nothing can be awaited" in str(errors[0])
    assert "error ignored" in caplog.text


async def test_code_that_ignores_generator_exit_does_not_make_close_fail() -> None:
    def stubborn() -> None:
        for _ in range(3):
            with contextlib.suppress(BaseException):
                nap(10)

    suspended(stubborn).close()


async def test_closing_unwinds_nested_runs_from_the_inside() -> None:
    order = []

    def inner() -> None:
        try:
            nap(10)
        finally:
            order.append("inner")

    def outer() -> None:
        try:
            await_(run(inner))
        finally:
            order.append("outer")

    suspended(outer).close()
    assert order == ["inner", "outer"]


@pytest.mark.parametrize("end", ["close", "collect"])
async def test_ending_it_in_another_thread_unwinds_the_code_in_its_own(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    threads = []

    def code() -> None:
        try:
            await_(asyncio.get_running_loop().create_future())
        finally:
            threads.append(threading.get_ident())
            nap()  # refused, and that is not heard of

    holder = [suspended(code)]

    def let_go() -> None:
        coroutine = holder.pop()
        if end == "close":
            coroutine.close()

    thread = threading.Thread(target=let_go)
    with watchdog(10):
        thread.start()
        thread.join()
        # A greenlet that another thread let go of ends at the next switch of its own.
        await run(nap)
        await run(nap)
    assert threads == [threading.get_ident()]


def test_a_loop_that_is_closed_with_suspended_code_unwinds_it() -> None:
    parting = Parting()
    loop = asyncio.new_event_loop()

    async def main() -> asyncio.Task[None]:
        task = asyncio.ensure_future(run(parting))
        await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(main())
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    del task, loop
    gc.collect()
    assert parting.left


# What remains


class Canary:
    """Something whose end can be seen."""


async def test_no_cycle_keeps_a_result_an_argument_or_an_error_alive(no_gc: None) -> None:
    def code(canary: Canary, fail: bool) -> None:
        nap()
        if fail:
            raise ValueError(canary)

    for fail in (False, True):
        canary = Canary()
        alive = weakref.ref(canary)
        with contextlib.suppress(ValueError):
            await run(code, canary, fail)
        del canary
        assert alive() is None, fail


async def test_no_cycle_keeps_a_cancelled_or_closed_run_alive(no_gc: None) -> None:
    def code(canary: Canary) -> None:
        nap(10)

    for end in ("cancel", "close"):
        canary = Canary()
        alive = weakref.ref(canary)
        if end == "cancel":
            await outcome_of(cancel_at(run(code, canary), {1}))
        else:
            coroutine: Any = run(code, canary)
            coroutine.send(None)
            coroutine.close()
            del coroutine
        del canary
        await asyncio.sleep(0)
        assert alive() is None, end


def live(kind: type) -> int:
    # isinstance() would ask Django's lazy objects for their class, and so make them.
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


async def test_10000_runs_a_third_of_them_cancelled_leave_nothing_behind() -> None:
    def code() -> None:
        nap()
        nap()

    async def hundred(offset: int) -> None:
        awaitables = [
            cancel_at(run(code), {1 + n % 2}) if n % 3 == offset % 3 else run(code)
            for n in range(100)
        ]
        await asyncio.gather(*map(outcome_of, awaitables))

    await hundred(0)
    gc.collect()
    before = live(greenlet.greenlet), live(asyncio.Task), live(asyncio.Future)
    for offset in range(100):
        await hundred(offset)
    gc.collect()
    after = live(greenlet.greenlet), live(asyncio.Task), live(asyncio.Future)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


async def test_nothing_warns_of_a_coroutine_never_awaited() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            with contextlib.suppress(BridgeError):
                await_(asyncio.sleep(0))
            suspended(lambda: nap(10)).close()
        gc.collect()


# Coroutines in the bridge


async def test_a_coroutine_runs_in_the_bridge_where_its_sync_code_may_wait() -> None:
    async def hook() -> list[Any]:
        found: list[Any] = [in_bridge()]
        nap()
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            found.append(await asyncio.ensure_future(asyncio.sleep(0, "from a task")))
        found.append(asyncio.current_task())
        return found

    assert await run(await_here, hook()) == [True, "from a task", asyncio.current_task()]


async def test_errors_of_a_coroutine_in_the_bridge_pass_both_ways() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async def hook() -> str:
        with pytest.raises(ZeroDivisionError):
            await asyncio.ensure_future(fails())
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await run(await_here, hook())


async def test_any_other_awaitable_is_awaited_as_ever() -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 3)
    assert await run(await_here, future) == 3


async def test_a_coroutine_in_the_bridge_is_cancelled_with_its_task() -> None:
    seen: list[str] = []

    async def hook() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            nap()
            seen.append("cleaned up")
            raise

    task = asyncio.create_task(run(await_here, hook()))
    await asyncio.sleep(0)
    task.cancel()
    assert isinstance(await outcome_of(task), asyncio.CancelledError)
    assert seen == ["cleaned up"]


async def test_closing_a_suspended_run_ends_its_coroutine() -> None:
    seen: list[BaseException] = []

    async def hook() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except BaseException as error:
            seen.append(error.with_traceback(None))
            raise

    suspended = run(await_here, hook())
    suspended.send(None)
    suspended.close()
    assert [type(error) for error in seen] == [GeneratorExit]


async def test_a_coroutine_outside_the_bridge_is_refused_and_closed() -> None:
    with pytest.raises(BridgeError, match="outside"):
        await_here(asyncio.sleep(0))


async def test_a_coroutine_in_the_bridge_is_freed_without_the_garbage_collector(
    no_gc: None,
) -> None:
    class Result:
        pass

    async def hook(fails: bool) -> Result:
        result = Result()
        refs.append(weakref.ref(result))
        await asyncio.sleep(0)
        if fails:
            raise ValueError(result)
        return result

    refs: list[weakref.ref[Result]] = []
    await run(await_here, hook(False))
    with contextlib.suppress(ValueError):
        await run(await_here, hook(True))
    assert [ref() for ref in refs] == [None, None]
