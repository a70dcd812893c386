"""Native mode where no session is current: what Django does, with the same results, errors and
threads. On Django's own connections, with real commits."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.contrib.auth import aauthenticate, aget_user, alogin
from django.contrib.auth.models import User as Account
from django.contrib.sessions.backends.db import SessionStore
from django.db import connections, transaction
from django.db.models import Model, Sum
from django.dispatch import Signal
from django.http import HttpRequest
from django.shortcuts import aget_list_or_404, aget_object_or_404
from django.test import override_settings

from django_asyncsession import native
from tests.models import Author, Book, Tag, User

OFF: dict[str, Any] = {}
ON = [{"NATIVE_ORM": True}, {"NATIVE_ORM": True, "NATIVE_MIDDLEWARE": True}]
USERS = User.objects.order_by("pk")


async def every(rows: Any) -> list[Any]:
    return [row async for row in rows]


async def in_chunks() -> list[Any]:
    return await every(USERS.prefetch_related("tags").aiterator(chunk_size=2))


async def failed_in_a_loop() -> None:
    async for user in USERS:
        raise ValueError(user.name)


async def at_the_same_time() -> list[int]:
    return await asyncio.gather(User.objects.acount(), Author.objects.acount())


async def a_row() -> Any:
    user = await User.objects.aget(pk=2)
    user.name = "changed"
    await user.asave()
    await user.arefresh_from_db()
    return user, await user.adelete()


async def relations() -> Any:
    ada = await Author.objects.acreate(pk=1, name="Ada")
    book = await ada.books.acreate(pk=1, title="Notes")
    tag = await book.tags.acreate(pk=1, name="maths")
    await book.tags.aset([])
    await book.tags.aadd(tag)
    return await every(book.tags.all()), await ada.books.acount()


async def users() -> Any:
    ada = await Account.objects.acreate_user("ada", password="secret")
    request = HttpRequest()
    request.session = SessionStore()
    await alogin(request, ada)
    wrong = await aauthenticate(username="ada", password="wrong")
    right = await aauthenticate(username="ada", password="secret")
    allowed = await ada.ahas_perm("tests.add_book"), await ada.aget_all_permissions()
    return wrong, right == ada, allowed, (await aget_user(request)) == ada


async def sessions() -> Any:
    first = SessionStore()
    await first.aset("color", "red")
    await first.asave()
    second = SessionStore(first.session_key)
    found = await second.aget("color"), await second.aexists(first.session_key)
    await second.aflush()
    return found, await second.aexists(first.session_key)


signal = Signal()


@signal.connect
def _plain(**kwargs: Any) -> int:
    return User.objects.count()


@signal.connect
async def _async(**kwargs: Any) -> int:
    return await User.objects.acount()


async def answers(send: Callable[..., Awaitable[Any]]) -> list[Any]:
    return [(receiver.__name__, answer) for receiver, answer in await send(None)]


async def in_async_code(fn: Callable[[], Any]) -> Any:
    return fn()


async def connections_there_are() -> Any:
    found = {type(connection) for connection in connections.all()}
    return found, connections.all(initialized_only=True) == [], type(connections["default"])


async def by_way_of_a_thread() -> Any:
    return await sync_to_async(async_to_sync(at_the_same_time))()


OPERATIONS: dict[str, Callable[[], Awaitable[Any]]] = {
    "aget": lambda: User.objects.aget(pk=1),
    "nothing to get": lambda: User.objects.aget(pk=7),
    "too much to get": lambda: User.objects.aget(level=1),
    "acreate": lambda: User.objects.acreate(pk=9, name="new"),
    "what cannot be created": lambda: Tag.objects.acreate(name="tag", owner_id="no number"),
    "a constraint": lambda: User.objects.abulk_create([User(pk=1, name="again")]),
    "aupdate": lambda: USERS.filter(name="0").aupdate(xp=3),
    "aget_or_create": lambda: User.objects.aget_or_create(name="0"),
    "afirst": USERS.afirst,
    "ain_bulk": lambda: User.objects.ain_bulk([1, 2]),
    "aaggregate": lambda: User.objects.aaggregate(Sum("level")),
    "async for": lambda: every(USERS),
    "of nothing": lambda: every(User.objects.none()),
    "raw": lambda: every(User.objects.raw("SELECT * FROM tests_user ORDER BY id")),
    "no chunk": lambda: every(USERS.aiterator(chunk_size=0)),
    "prefetch": lambda: every(Book.objects.prefetch_related("nothing").aiterator(chunk_size=2)),
    "object or 404": lambda: aget_object_or_404(User, pk=7),
    "list or 404": lambda: aget_list_or_404(User, pk=7),
    "asend": lambda: answers(signal.asend),
    "asend_robust": lambda: answers(signal.asend_robust),
    "on_commit": lambda: in_async_code(lambda: transaction.on_commit(print)),
    "set_rollback": lambda: in_async_code(lambda: transaction.set_rollback(True)),
    "get_autocommit": lambda: in_async_code(transaction.get_autocommit),
    "atomic": lambda: in_async_code(transaction.atomic().__enter__),
    "a sync query": lambda: in_async_code(User.objects.count),
    "async_to_sync": lambda: in_async_code(async_to_sync(at_the_same_time)),
    "the rest": connections_there_are,
}
for operation in (in_chunks, failed_in_a_loop, at_the_same_time, a_row, relations):
    OPERATIONS[operation.__name__] = operation
for operation in (users, sessions, by_way_of_a_thread):
    OPERATIONS[operation.__name__] = operation


def plain(value: Any) -> Any:
    """What can be compared with another try."""
    if isinstance(value, Model):
        return type(value), value.pk, str(value)
    if isinstance(value, BaseException):
        frames = traceback.extract_tb(value.__traceback__)
        where = [frame.name for frame in frames if "django_asyncsession" not in frame.filename]
        return type(value), str(value), where, type(value.__cause__), type(value.__context__)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


async def outcome(operation: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return plain(await operation())
    except Exception as error:
        return plain(error)
    finally:
        await sync_to_async(connections.close_all)()


def tried(operation: Callable[[], Awaitable[Any]], called: list[str]) -> tuple[Any, list[str]]:
    """What it gave, and what it called in threads."""
    with suppress(Author.DoesNotExist):
        Author.objects.get(pk=1).delete()
    for model in (Tag, User, Account):
        model.objects.all().delete()
    User.objects.bulk_create(User(pk=number + 1, name=str(number)) for number in range(5))
    called.clear()
    return asyncio.run(outcome(operation)), [*called]


@pytest.mark.usefixtures("empty_tables")
@pytest.mark.parametrize("name", OPERATIONS)
def test_without_a_session_all_is_as_without_native_mode(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    in_thread = SyncToAsync.thread_handler

    def note(self: Any, loop: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(self.func.__qualname__)
        return in_thread(self, loop, *args, **kwargs)

    monkeypatch.setattr(SyncToAsync, "thread_handler", note)
    with override_settings(ASYNC_SESSION=OFF):
        assert not native.is_installed()
        expected = tried(OPERATIONS[name], called)
    for setting in ON:
        with override_settings(ASYNC_SESSION=setting):
            assert native.is_installed()
            assert tried(OPERATIONS[name], called) == expected
