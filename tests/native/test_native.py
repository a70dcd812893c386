"""Native mode: Django's own async methods in the current sessions, their callbacks and signals.

With real commits where callbacks of the commit, other connections, or the pool are the point.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import user_logged_in
from django.contrib.auth.models import User as Account
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import SynchronousOnlyOperation
from django.db import IntegrityError, transaction
from django.db.models.signals import post_save
from django.db.transaction import on_commit as imported_on_commit
from django.http import Http404
from django.shortcuts import aget_list_or_404, aget_object_or_404
from django.test import override_settings

from django_asyncsession import (
    DatabaseInterface,
    PoolTimeout,
    SessionInUseError,
    UnknownAlias,
    bridge,
    databases,
    native,
)
from tests.models import Author, Book, Tag, User
from tests.native.aliases import two_databases
from tests.sessions import names, whole

pytestmark = pytest.mark.usefixtures("native_mode")


# Django's async methods


async def test_async_methods_are_in_the_session_and_in_no_thread(
    database: DatabaseInterface, threads: list[str]
) -> None:
    users = User.objects.using(database.alias)
    async with database.get_session() as session:
        with native.use(session):
            ada = await users.acreate(name="Ada")
            ada.level = 2
            await ada.asave(using=database.alias)
            await ada.arefresh_from_db(using=database.alias)
            await users.abulk_create([User(name="Bob"), User(name="Cy")])
            _, made = await users.aget_or_create(name="Ada", defaults={"level": 9})
            assert not made
            assert [u.name async for u in users.filter(level=2)] == ["Ada"]
            assert await users.acount() == 3 == len([u async for u in users])
            assert (await users.alast()) == await users.aget(name="Cy")
            await users.filter(name="Cy").adelete()
            assert await users.filter(name="Bob").aupdate(level=7) == 1
            assert await users.aexists() and await users.acontains(ada)
            assert await session.fetch_value("SELECT COUNT(*) FROM tests_user") == 2
        await session.rollback()
    assert await names(database) == []
    assert threads == []


async def test_related_managers_are_in_the_session(
    database: DatabaseInterface, threads: list[str]
) -> None:
    authors = Author.objects.using(database.alias)
    async with database.get_session() as session, native.use(session):
        ada = await authors.acreate(name="Ada")
        book = await ada.books.acreate(title="Notes")
        red = await book.tags.acreate(name="red")
        blue = await Tag.objects.using(database.alias).acreate(name="blue")
        await book.tags.aadd(blue)
        assert [t.name async for t in book.tags.order_by("name")] == ["blue", "red"]
        await book.tags.aset([blue])
        await book.tags.aremove(blue)
        assert not await book.tags.aexists()
        await book.tags.aadd(red)
        await book.tags.aclear()
        assert await ada.books.acount() == 1
        found = [a async for a in authors.prefetch_related("books").all()]
        assert found[0].books.all()[0] == book
    assert threads == []


async def test_rows_come_in_chunks_from_one_cursor(
    database: DatabaseInterface, threads: list[str]
) -> None:
    users = User.objects.using(database.alias).order_by("name")
    async with database.get_session() as session, native.use(session):
        await users.abulk_create([User(name=f"{i}") for i in range(8)])
        assert [u.name async for u in users.aiterator(chunk_size=3)] == list("01234567")
        assert [u.name async for u in users[:6].aiterator(chunk_size=3)] == list("012345")
        assert [n async for n in users.values_list("name", flat=True).aiterator()][7] == "7"
        tagged = users.prefetch_related("tags").aiterator(chunk_size=3)
        assert [list(u.tags.all()) async for u in tagged] == [[]] * 8
    assert threads == []


@pytest.mark.parametrize("autocommit", [False, True])
async def test_an_iteration_left_early_closes_its_cursor_and_keeps_the_connection(
    real_database: DatabaseInterface, autocommit: bool
) -> None:
    users = User.objects.using(real_database.alias).order_by("name")
    async with real_database.get_session(autocommit=autocommit) as session, native.use(session):
        await users.abulk_create([User(name=f"{i}") for i in range(8)])
        rows = users.aiterator(chunk_size=3)
        assert (await anext(rows)).name == "0"
        await rows.aclose()  # type: ignore[attr-defined]
        async for user in users.aiterator(chunk_size=3):
            assert user.name == "0"
            break
        assert await users.acount() == 8
    await whole(real_database)
    assert real_database.stats()["connections_lost"] == real_database.stats()["returns_bad"] == 0


async def test_in_autocommit_mode_rows_come_in_chunks_and_calls_run_in_parallel(
    real_database: DatabaseInterface, threads: list[str]
) -> None:
    users = User.objects.using(real_database.alias).order_by("name")
    async with real_database.get_session(autocommit=True) as session, native.use(session):
        await users.abulk_create([User(name=f"{i}") for i in range(8)])
        assert await names(real_database) == list("01234567")
        assert [u.name async for u in users.aiterator(chunk_size=3)] == list("01234567")
        counts = await asyncio.gather(*(users.acount() for _ in range(3)))
    assert counts == [8, 8, 8]
    assert threads == []


async def test_shortcuts_and_pages_are_in_the_session(
    database: DatabaseInterface, threads: list[str]
) -> None:
    users = User.objects.using(database.alias).order_by("name")
    async with database.get_session() as session, native.use(session):
        ada = await users.acreate(name="Ada")
        assert await aget_object_or_404(users, name="Ada") == ada
        with pytest.raises(Http404):
            await aget_object_or_404(users, name="Bob")
        assert await aget_list_or_404(users, name="Ada") == [ada]
        with pytest.raises(Http404):
            await aget_list_or_404(users, name="Bob")
        if django.VERSION >= (6, 0):
            from django.core.paginator import AsyncPaginator

            page = await AsyncPaginator(users, 1).apage(1)
            assert await page.aget_object_list() == [ada]
    assert threads == []


@two_databases
async def test_permissions_are_asked_for_in_the_session(threads: list[str]) -> None:
    """Aliases are resolved as Django does: these models are on the default one."""
    db = databases["default"]
    async with db.get_session() as session, native.use(session):
        ada = await Account.objects.acreate(username="ada")
        kind = await ContentType.objects.aget(app_label="tests", model="book")
        assert not await ada.ahas_perm("tests.add_book")
        await ada.user_permissions.aadd(await kind.permission_set.aget(codename="add_book"))
        ada = await Account.objects.aget(pk=ada.pk)
        assert await ada.ahas_perm("tests.add_book")
    assert threads == []


async def test_tasks_of_one_session_queue_for_it(database: DatabaseInterface) -> None:
    async with database.get_session() as session, native.use(session):
        ada = await Author.objects.using(database.alias).acreate(name="Ada")
        book = await Book.objects.using(database.alias).acreate(title="Notes", author=ada)
        got = await asyncio.gather(
            Book.objects.using(database.alias).aget(), Author.objects.using(database.alias).aget()
        )
    assert got == [book, ada]


async def test_an_error_is_djangos_and_the_transaction_is_over(database: DatabaseInterface) -> None:
    authors = Author.objects.using(database.alias)
    with pytest.raises(transaction.TransactionManagementError):
        async with database.get_session() as session, native.use(session):
            await authors.acreate(name="Ada")
            with pytest.raises(IntegrityError):
                await authors.acreate(name="Ada")
            with pytest.raises(transaction.TransactionManagementError):
                await authors.acount()
    async with database.get_session() as session, native.use(session):
        assert await authors.acount() == 0


async def test_an_errors_traceback_shows_where_it_was_raised(database: DatabaseInterface) -> None:
    def saves_twice() -> None:
        Author.objects.using(database.alias).create(name="Ada")
        Author.objects.using(database.alias).create(name="Ada")

    with pytest.raises(IntegrityError) as caught:
        async with database.get_session() as session, native.use(session):
            await session.run_sync(saves_twice)
    assert "saves_twice" in [entry.name for entry in caught.traceback]


async def test_a_nested_block_takes_an_error_back(database: DatabaseInterface) -> None:
    authors = Author.objects.using(database.alias)
    async with database.get_session() as session, native.use(session):
        await authors.acreate(name="Ada")
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await authors.acreate(name="Ada")
        assert await authors.acount() == 1


async def test_cancelling_rolls_back_and_leaves_the_pool_whole(
    real_database: DatabaseInterface,
) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with real_database.get_session() as session, native.use(session):
            await User.objects.using(real_database.alias).acreate(name="half")
            started.set()
            await native.current().run(lambda: bridge.await_(asyncio.sleep(30)))  # type: ignore[union-attr]

    task = asyncio.create_task(work())
    await started.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await names(real_database) == []


# Callbacks


async def test_on_commit_calls_functions_and_awaits_coroutine_functions(
    real_database: DatabaseInterface, threads: list[str]
) -> None:
    called: list[Any] = []

    async def later() -> None:
        called.append(await User.objects.using(real_database.alias).acount())

    def sync_code() -> None:
        transaction.on_commit(later, using=real_database.alias)

    async with real_database.get_session() as session, native.use(session):
        await User.objects.using(real_database.alias).acreate(name="Ada")
        transaction.on_commit(lambda: called.append("first"), using=real_database.alias)
        transaction.on_commit(later, using=real_database.alias)
        await session.run_sync(sync_code)
        assert called == []
        await session.commit()
        assert called == ["first", 1, 1]
        transaction.on_commit(lambda: called.append("never"), using=real_database.alias)
        await session.rollback()
    assert called == ["first", 1, 1]
    assert threads == []


async def test_on_commit_imported_by_its_name_waits_for_the_commit_too(
    real_database: DatabaseInterface,
) -> None:
    called: list[str] = []
    async with real_database.get_session() as session, native.use(session):
        imported_on_commit(lambda: called.append("saved"), using=real_database.alias)
        assert called == []
        await session.rollback()
        imported_on_commit(lambda: called.append("saved later"), using=real_database.alias)
    assert called == ["saved later"]


async def test_set_rollback_in_async_code_rolls_the_session_back(
    database: DatabaseInterface,
) -> None:
    async with database.get_session() as session, native.use(session):
        await User.objects.using(database.alias).acreate(name="Ada")
        assert not transaction.get_rollback(using=database.alias)
        transaction.set_rollback(True, using=database.alias)
        assert transaction.get_rollback(using=database.alias)
    assert await names(database) == []


async def test_a_sync_block_in_async_code_is_refused_as_ever(database: DatabaseInterface) -> None:
    async with database.get_session() as session, native.use(session):
        with pytest.raises(SynchronousOnlyOperation), transaction.atomic(using=database.alias):
            pass
        await User.objects.using(database.alias).acreate(name="Ada")
    assert await names(database) == ["Ada"]


# Signals


@pytest.fixture
def saves(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Connects receivers to what is sent after a user is saved."""
    connected: list[Callable[..., Any]] = []

    def connect(receiver: Callable[..., Any]) -> None:
        connected.append(receiver)
        post_save.connect(receiver, sender=User, weak=False)

    yield connect
    for receiver in connected:
        post_save.disconnect(receiver, sender=User)


@pytest.mark.parametrize("autocommit", [False, True])
async def test_receivers_of_both_kinds_are_in_the_transaction_of_the_sender(
    database: DatabaseInterface, autocommit: bool, saves: Any, threads: list[str]
) -> None:
    authors = Author.objects.using(database.alias)
    seen: list[Any] = []

    def first(instance: User, **kwargs: Any) -> None:
        seen.append(authors.create(name=f"sync {instance.name}").name)

    async def second(instance: User, **kwargs: Any) -> None:
        seen.append((await authors.acreate(name=f"async {instance.name}")).name)

    async def third(instance: User, **kwargs: Any) -> None:
        seen.append(await authors.acount())
        seen.append([a.name async for a in authors.order_by("name")])
        assert await User.objects.using(database.alias).acontains(instance)

    for receiver in (first, second, third):
        saves(receiver)

    def save_and_fail() -> None:
        with transaction.atomic(using=database.alias):
            User(name="Ada").save(using=database.alias)
            raise ValueError("after the receivers")

    async with database.get_session(autocommit=autocommit) as session, native.use(session):
        with pytest.raises(ValueError, match="after the receivers"):
            await session.run_sync(save_and_fail)
        assert seen == ["sync Ada", "async Ada", 2, ["async Ada", "sync Ada"]]
        assert await authors.acount() == 0
        await User.objects.using(database.alias).acreate(name="Bob")
        assert seen[4:6] == ["sync Bob", "async Bob"]
    assert await names(database) == ["Bob"]
    assert threads == []


async def test_an_async_receiver_that_fails_fails_the_sender(
    database: DatabaseInterface, saves: Any
) -> None:
    called: list[str] = []

    async def fails(**kwargs: Any) -> None:
        raise ValueError("from the receiver")

    async def is_not_called(**kwargs: Any) -> None:
        called.append("never")

    saves(fails)
    saves(is_not_called)
    async with database.get_session() as session, native.use(session):
        with pytest.raises(ValueError, match="from the receiver"):
            await User.objects.using(database.alias).acreate(name="Ada")
        results = await session.run_sync(lambda: post_save.send_robust(User, instance=None))
        assert [type(r) for _, r in results] == [ValueError, type(None)]
    assert called == ["never"]


@two_databases
async def test_signals_sent_by_async_code_reach_the_session(threads: list[str]) -> None:
    """Django's own receiver of a log-in updates the user, who is not committed yet."""
    async with databases["default"].get_session() as session, native.use(session):
        ada = await Account.objects.acreate(username="ada")
        await user_logged_in.asend(type(ada), request=None, user=ada)
        await ada.arefresh_from_db()
        assert ada.last_login is not None
    assert threads == []


async def test_async_code_called_from_sync_code_is_awaited(database: DatabaseInterface) -> None:
    """As a sync service does that sends something with a library that is async only."""

    async def count() -> int:
        await asyncio.sleep(0)
        return await User.objects.using(database.alias).acount()

    async with database.get_session() as session, native.use(session):
        assert await session.run_sync(async_to_sync(count)) == 0
    with pytest.raises(RuntimeError, match="same thread as an async event loop"):
        async_to_sync(count)()


def test_on_commit_without_a_session_is_djangos() -> None:
    called: list[str] = []
    transaction.on_commit(lambda: called.append("at once"))
    assert called == ["at once"]


# Several databases


@two_databases
async def test_an_alias_without_a_session_is_used_in_autocommit_mode(threads: list[str]) -> None:
    async with databases["default"].get_session() as session, native.use(session):
        await User.objects.acreate(name="half")
        await User.objects.using("sqlite").acreate(name="whole")
        await session.rollback()
    assert await names(databases["default"]) == []
    assert await names(databases["sqlite"]) == ["whole"]
    assert threads == []


class UsersApart:
    """A router: users are in the other database, and authors are read there."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "sqlite" if model in (User, Author) else None

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        return "sqlite" if model is User else None


@two_databases
async def test_an_alias_is_found_as_the_routers_say(threads: list[str]) -> None:
    first, second = databases["default"].get_session(), databases["sqlite"].get_session()
    with override_settings(DATABASE_ROUTERS=[f"{__name__}.UsersApart"]):
        async with first, second:
            with native.use(first, second):
                user = await User.objects.acreate(name="Ada")
                author = await Author.objects.acreate(name="Ada")
                assert (user._state.db, author._state.db) == ("sqlite", "default")
                assert await Author.objects.acount() == 0
                assert [u.name async for u in User.objects.aiterator()] == ["Ada"]
            assert await second.fetch_value("SELECT COUNT(*) FROM tests_user") == 1
            assert await first.fetch_value("SELECT COUNT(*) FROM tests_user") == 0
            assert await first.fetch_value("SELECT COUNT(*) FROM tests_author") == 1
    assert threads == []


@two_databases
async def test_sync_code_of_a_session_uses_other_aliases_too() -> None:
    def audited() -> int:
        User.objects.create(name="Ada")
        User.objects.using("sqlite").create(name="Ada was here")
        return User.objects.using("sqlite").count() + User.objects.count()

    async with databases["default"].get_session() as session:
        with native.use(session):
            assert await session.run_sync(audited) == 2
        await session.rollback()
    assert await names(databases["sqlite"]) == ["Ada was here"]


@two_databases
async def test_two_sessions_are_used_each_for_its_alias() -> None:
    first, second = databases["default"].get_session(), databases["sqlite"].get_session()
    async with first, second:
        with native.use(first, second):
            await User.objects.acreate(name="one")
            await User.objects.using("sqlite").acreate(name="two")
        await second.rollback()
    assert await names(databases["default"]) == ["one"]
    assert await names(databases["sqlite"]) == []


@pytest.mark.usefixtures("empty_tables")
async def test_calls_that_would_wait_for_each_other_are_refused() -> None:
    """One has the first database and needs the second, the other the other way round."""
    meeting = asyncio.Barrier(2)

    def touch(first: str, second: str) -> int:
        User.objects.using(first).count()
        bridge.await_(meeting.wait())
        return User.objects.using(second).count()

    a, b = databases["default"].get_session(), databases["sqlite"].get_session()
    async with asyncio.timeout(5), a, b:
        with native.use(a, b):
            sessions = native.current()
            assert sessions is not None
            outcomes = await asyncio.gather(
                sessions.run(touch, "default", "sqlite"),
                sessions.run(touch, "sqlite", "default"),
                return_exceptions=True,
            )
    refused = [o for o in outcomes if isinstance(o, SessionInUseError)]
    assert len(refused) == 1 and "uses while it waits" in str(refused[0])
    assert 0 in outcomes
    await databases.close_all()


@pytest.mark.usefixtures("empty_tables")
async def test_code_that_gets_no_connection_is_told_so_once() -> None:
    db = databases["default"]
    pools = {"default": {"max_size": 1, "timeout": 0.1}}
    await db.close()
    with override_settings(ASYNC_SESSION={"NATIVE_ORM": True, "POOLS": pools}):
        lease = await db.acquire()
        session = db.get_session(begin_on_use=True)
        with native.use(session), pytest.raises(PoolTimeout):
            await User.objects.acreate(name="Ada")
        assert db.stats()["requests_errors"] == 1
        lease.release()
        await session.close()
        await databases.close_all()


@two_databases
async def test_an_unknown_alias_is_djangos_error() -> None:
    async with databases["default"].get_session() as session, native.use(session):
        with pytest.raises(UnknownAlias):
            await User.objects.using("nowhere").acount()


@pytest.mark.usefixtures("empty_tables")
async def test_code_that_touches_no_database_takes_no_connection() -> None:
    db = databases["default"]
    async with db.get_session() as session:
        with native.use(session):
            sessions = native.current()
            assert sessions is not None
            assert await sessions.run(lambda: 7) == 7
    assert db.stats()["pool_size"] == 0
    await databases.close_all()
