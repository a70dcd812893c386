"""The exception that is being handled: sync code that a session runs sees it, as a plain call does.

First in the bridge alone, then in sessions on each database, then in native mode. On real
connections where the driver is the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import DatabaseError, IntegrityError, connections
from django.test import override_settings

from django_asyncsession import DatabaseInterface, native
from django_asyncsession.bridge import await_, await_here, run
from tests.models import Author, User


class Fault(Exception):
    """What the tests raise; can be referred to weakly."""


def nap() -> None:
    await_(asyncio.sleep(0))


def again() -> None:
    nap()
    raise


def fail() -> None:
    nap()
    raise KeyError("second")


def contexts(error: BaseException | None) -> list[type[BaseException]]:
    """The kinds of an error and of all that were being handled when it was raised."""
    found = []
    while error is not None:
        found.append(type(error))
        error = error.__context__
    return found


# The bridge


async def test_the_code_sees_what_its_caller_handles() -> None:
    try:
        raise Fault("first")
    except Fault as first:
        before = traceback.format_exception(first)
        seen = await run(lambda: (nap(), sys.exc_info())[1])
        assert seen[:2] == (Fault, first)
        assert traceback.format_exception(first) == before
        assert first.__context__ is None
    assert await run(sys.exc_info) == (None, None, None)


async def test_a_bare_raise_raises_it_again_with_its_whole_traceback() -> None:
    with pytest.raises(Fault) as caught:
        try:
            raise Fault("first")
        except Fault:
            await run(again)
    first, *_, last = caught.traceback
    assert last.frame.code == first.frame.code
    assert "raise Fault" in str(last.statement)


async def test_an_error_of_the_code_has_it_as_its_context() -> None:
    with pytest.raises(KeyError) as caught:
        try:
            raise Fault("first")
        except Fault:
            await run(fail)
    assert contexts(caught.value) == [KeyError, Fault]


async def test_what_it_had_as_its_own_context_stays() -> None:
    with pytest.raises(KeyError) as caught:
        try:
            try:
                raise ZeroDivisionError
            except ZeroDivisionError:
                raise Fault("first") from None
        except Fault:
            await run(fail)
    assert contexts(caught.value) == [KeyError, Fault, ZeroDivisionError]
    assert caught.value.__context__ is not None and caught.value.__context__.__suppress_context__


async def test_the_code_of_code_sees_it_as_well() -> None:
    """Whatever is handled where the inner call is made, and nothing when that is over."""

    def outer() -> Any:
        try:
            raise KeyError("inner")
        except KeyError:
            inner = await_(run(sys.exc_info))
        return inner[0], sys.exc_info()[0]

    try:
        raise Fault("first")
    except Fault:
        assert await run(outer) == (Fault, Fault)
        assert sys.exc_info()[0] is Fault


async def test_an_error_of_what_is_awaited_has_what_the_code_handles_as_its_last_context() -> None:
    async def reset() -> None:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            raise Fault("lost")  # noqa: B904

    def code() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            await_(reset())

    with pytest.raises(Fault) as caught:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            await run(code)
    assert contexts(caught.value)[:2] == [Fault, ConnectionResetError]
    with pytest.raises(Fault) as caught:
        await run(code)
    assert contexts(caught.value) == [Fault, ConnectionResetError, KeyError]


async def test_an_error_that_is_raised_again_makes_no_circle_of_contexts() -> None:
    async def raises(error: BaseException) -> None:
        raise error

    def code() -> None:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            await_(raises(inner))

    with pytest.raises(KeyError) as caught:
        await run(code)
    assert contexts(caught.value) == [KeyError]


async def test_a_coroutine_that_runs_in_the_code_sees_it() -> None:
    async def asks() -> Any:
        await asyncio.sleep(0)
        return sys.exc_info()[0]

    try:
        raise Fault
    except Fault:
        assert await run(lambda: await_here(asks())) is Fault


@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, StopIteration, SystemExit])
async def test_it_may_be_of_any_kind(kind: type[BaseException]) -> None:
    try:
        raise kind
    except kind:
        assert (await run(lambda: (nap(), sys.exc_info())[1]))[0] is kind


@pytest.mark.parametrize("code", [again, fail])
async def test_nothing_of_it_is_kept(code: Callable[[], None]) -> None:
    """No frame of the bridge refers to an exception that has the frame in its traceback."""
    kept: list[weakref.ref[Any]] = []

    async def call() -> None:
        try:
            raise Fault
        except Fault as first:
            kept.append(weakref.ref(first))
            await run(code)

    gc.disable()
    try:
        with contextlib.suppress(Fault, KeyError):
            await call()
        assert kept[0]() is None
    finally:
        gc.enable()


async def test_each_of_many_tasks_sees_its_own() -> None:
    async def task(number: int) -> bool:
        try:
            raise Fault(number)
        except Fault:
            await asyncio.sleep(0)
            return await run(lambda: (nap(), str(sys.exception()))[1]) == str(number)

    assert all(await asyncio.gather(*map(task, range(200))))


# Sessions


async def test_sync_code_of_a_session_sees_what_is_handled(
    database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    def service() -> Any:
        User.objects.using(database.alias).create(name="noted")
        logging.getLogger("tests.handled").exception("noted")
        return sys.exception()

    async with database.get_session() as session:
        try:
            raise Fault("first")
        except Fault as first:
            assert await session.run_sync(service) is first
            with pytest.raises(Fault):
                await session.run_sync(again)
            with pytest.raises(KeyError) as caught:
                await session.run_sync(fail)
            assert contexts(caught.value) == [KeyError, Fault]
        assert await session.run_sync(sys.exc_info) == (None, None, None)
    assert "Fault: first" in caplog.text


async def test_a_database_error_has_the_one_before_it_in_its_contexts(
    real_database: DatabaseInterface,
) -> None:
    """Also where the driver's own error was raised elsewhere: by a coroutine, or in a thread."""
    database = real_database

    def service() -> None:
        authors = Author.objects.using(database.alias)
        authors.create(name="one")
        try:
            authors.create(name="one")
        except IntegrityError:
            with connections[database.alias].cursor() as cursor:
                cursor.execute("SELECT nothing FROM nowhere")

    async with database.get_session(autocommit=True) as session:
        with pytest.raises(DatabaseError) as caught:
            await session.run_sync(service)
    assert IntegrityError in contexts(caught.value)


async def test_a_rollback_that_an_error_causes_shows_that_error_only(
    database: DatabaseInterface,
) -> None:
    with pytest.raises(Fault) as caught:
        async with database.get_session() as session:
            await session.add(User(name="x"))
            raise Fault("first")
    assert contexts(caught.value) == [Fault]


# Native mode


@pytest.fixture
def native_mode() -> Iterator[None]:
    with override_settings(ASYNC_SESSION={"NATIVE_ORM": True}):
        yield


async def test_sync_code_of_native_mode_sees_what_is_handled(
    native_mode: None, database: DatabaseInterface
) -> None:
    """Before it has a connection and after, and async code that it waits for too."""

    async def receiver() -> Any:
        return sys.exception()

    def service() -> Any:
        before = sys.exception()
        User.objects.using(database.alias).create(name="noted")
        return before, sys.exception(), async_to_sync(receiver)()

    def handles() -> Any:
        try:
            raise KeyError("inner")
        except KeyError:
            User.objects.using(database.alias).count()
            return type(async_to_sync(receiver)()), type(sys.exception())

    async with database.get_session() as session:
        with native.use(session):
            try:
                raise Fault("first")
            except Fault as first:
                assert await session.run_sync(service) == (first, first, first)
                assert await session.run_sync(handles) == (KeyError, KeyError)
                with pytest.raises(Fault):
                    await session.run_sync(again)
                with pytest.raises(KeyError) as caught:
                    await session.run_sync(fail)
                assert contexts(caught.value) == [KeyError, Fault]
            assert await session.run_sync(sys.exc_info) == (None, None, None)


async def test_an_error_of_native_mode_keeps_its_own_contexts(
    native_mode: None, database: DatabaseInterface
) -> None:
    def service() -> None:
        authors = Author.objects.using(database.alias)
        try:
            raise KeyError("inner")
        except KeyError:
            assert not authors.exists()
            raise ValueError("last")  # noqa: B904

    async with database.get_session() as session:
        with native.use(session), pytest.raises(ValueError) as caught:
            try:
                raise Fault("first")
            except Fault:
                await session.run_sync(service)
        assert contexts(caught.value) == [ValueError, KeyError, Fault]
