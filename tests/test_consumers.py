"""`SessionConsumer`: Channels consumers with a session for each message, or for the connection.

With real commits: it is about when another connection sees what a message did, and what the pool
has between messages.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, ClassVar

import pytest
from channels.consumer import AsyncConsumer
from channels.db import database_sync_to_async
from channels.generic.http import AsyncHttpConsumer
from channels.generic.websocket import (
    AsyncJsonWebsocketConsumer,
    AsyncWebsocketConsumer,
    WebsocketConsumer,
)
from channels.layers import get_channel_layer
from django.db import IntegrityError, connections
from django.test import override_settings

from django_asyncsession import (
    DatabaseInterface,
    Session,
    SessionClosedError,
    SessionConsumer,
    SessionStateError,
    SyncContextError,
    background_session,
    databases,
    inject_session,
    native,
)
from tests.communicators import HttpCommunicator, WebsocketCommunicator
from tests.models import Tag, User
from tests.sessions import names, whole
from tests.threads import sent_to_threads

NATIVE = {"NATIVE_ORM": True}
LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
in_both_modes = pytest.mark.parametrize("mode", [{}, NATIVE], ids=["", "native"], indirect=True)
in_native_mode = pytest.mark.parametrize("mode", [NATIVE], ids=["native"], indirect=True)


@pytest.fixture
async def mode(request: Any) -> AsyncIterator[None]:
    with override_settings(ASYNC_SESSION=getattr(request, "param", {})):
        yield
        await databases.close_all()


@pytest.fixture
async def default(mode: None, empty_tables: None) -> DatabaseInterface:
    return databases["default"]


class Register(SessionConsumer, AsyncJsonWebsocketConsumer):
    """Adds a user at each message, and fails when it is told to."""

    async def connect(self) -> None:
        await self.session.add(User(name="connected"))
        await self.accept()

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        await self.session.add(User(name=content["name"]))
        await self.and_then(content)
        if content.get("fail"):
            raise ValueError("after the insert")
        await self.send_json(
            {"users": await self.session.fetch_value("SELECT COUNT(*) FROM tests_user")}
        )

    async def and_then(self, content: Any) -> None: ...

    async def disconnect(self, code: int) -> None:
        await self.session.add(User(name=f"disconnected {code}"))


async def connected(consumer: Any) -> WebsocketCommunicator:
    communicator = WebsocketCommunicator(consumer.as_asgi(), "/")
    is_accepted, _ = await communicator.connect(5)
    assert is_accepted
    return communicator


async def say(communicator: WebsocketCommunicator, **content: Any) -> Any:
    await communicator.send_json_to(content)
    return await communicator.receive_json_from(5)


async def free(db: DatabaseInterface) -> None:
    """Wait until the handler, which answers before it ends, has given its connection back."""
    await whole(db)


# One session for each message


@in_both_modes
async def test_every_message_is_committed_from_connect_to_disconnect(
    default: DatabaseInterface,
) -> None:
    communicator = await connected(Register)
    await free(default)
    assert await names(default) == ["connected"]
    assert await say(communicator, name="Ada") == {"users": 2}
    await free(default)
    assert await names(default) == ["Ada", "connected"]
    await communicator.disconnect(code=1001)
    assert await names(default) == ["Ada", "connected", "disconnected 1001"]
    await whole(default)


@in_both_modes
@pytest.mark.parametrize("per_connection", [False, True])
async def test_a_session_used_after_its_message_names_the_consumer(
    per_connection: bool, default: DatabaseInterface
) -> None:
    """And its path, but neither the query string nor a line of the server's."""
    sessions: list[Session] = []

    class Consumer(Register):
        session_per_connection = per_connection

        async def and_then(self, content: Any) -> None:
            sessions.append(self.session)

    communicator = WebsocketCommunicator(Consumer.as_asgi(), "/chat/7/?token=secret")
    await communicator.connect(5)
    await say(communicator, name="Ada")
    await communicator.disconnect(code=1001)
    with pytest.raises(SessionClosedError) as caught:
        await sessions[0].fetch_value("SELECT 1")
    said = str(caught.value)
    assert "Consumer at '/chat/7/' is closed; " in said and "for consumer " in said
    assert "@background_session" in said and ".py" not in said and "secret" not in said


@in_both_modes
async def test_between_messages_no_connection_is_held(default: DatabaseInterface) -> None:
    sessions: list[Session] = []

    class Consumer(Register):
        async def and_then(self, content: Any) -> None:
            sessions.append(self.session)
            assert default.stats()["pool_available"] < default.stats()["pool_size"]

    communicator = await connected(Consumer)
    await say(communicator, name="Ada")
    await free(default)
    await say(communicator, name="Bob")
    await free(default)
    first, second = sessions
    assert first is not second and first.closed and second.closed
    await communicator.disconnect()


@in_both_modes
async def test_a_handler_that_raises_is_rolled_back_alone(default: DatabaseInterface) -> None:
    communicator = await connected(Register)
    await say(communicator, name="Ada")
    await communicator.send_json_to({"name": "half", "fail": True})
    with pytest.raises(ValueError, match="after the insert"):
        await communicator.wait(5)
    assert await names(default) == ["Ada", "connected"]
    await whole(default)


async def test_a_commit_that_fails_ends_the_consumer(default: DatabaseInterface) -> None:
    class Consumer(Register):
        async def disconnect(self, code: int) -> None:
            await self.session.add(Tag(name="orphan", owner_id=4711))

    communicator = await connected(Consumer)
    with pytest.raises(IntegrityError):
        await communicator.disconnect()
    assert await names(default) == ["connected"]
    await whole(default)


@in_both_modes
async def test_a_connection_that_is_cancelled_in_a_handler_is_rolled_back(
    default: DatabaseInterface,
) -> None:
    reached = asyncio.Event()

    class Consumer(Register):
        async def and_then(self, content: Any) -> None:
            reached.set()
            await asyncio.Event().wait()

    communicator = await connected(Consumer)
    await communicator.send_json_to({"name": "half"})
    await reached.wait()
    communicator.stop(exceptions=False)
    await asyncio.wait([communicator.future])
    assert communicator.future.cancelled()
    assert await names(default) == ["connected"]
    await whole(default)


async def test_what_waits_for_the_commit_is_sent_after_it(default: DatabaseInterface) -> None:
    class Consumer(Register):
        async def receive_json(self, content: Any, **kwargs: Any) -> None:
            await self.session.add(User(name="Ada"))
            self.session.on_commit(partial(self.report, len(await names(default))))

        async def report(self, before: int) -> None:
            await self.send_json([before, len(await names(default))])

    communicator = await connected(Consumer)
    assert await say(communicator) == [1, 2]
    await communicator.disconnect()


@in_both_modes
async def test_a_message_of_a_group_has_a_session(default: DatabaseInterface) -> None:
    class Consumer(Register):
        groups: ClassVar[list[str]] = ["everybody"]

        async def user_joined(self, message: Any) -> None:
            await self.session.add(User(name=message["name"]))
            await self.send_json("noted")

    with override_settings(CHANNEL_LAYERS=LAYERS):
        communicator = await connected(Consumer)
        layer = get_channel_layer()
        await layer.group_send("everybody", {"type": "user.joined", "name": "Ada"})
        assert await communicator.receive_json_from(5) == "noted"
        await communicator.disconnect()
    assert await names(default) == ["Ada", "connected", "disconnected 1000"]


async def test_options_and_the_database_are_class_attributes(default: DatabaseInterface) -> None:
    class Consumer(Register):
        session_alias = "sqlite"
        session_options: ClassVar[dict[str, Any]] = {"autocommit": True}

    communicator = await connected(Consumer)
    await communicator.send_json_to({"name": "half", "fail": True})
    with pytest.raises(ValueError, match="after the insert"):
        await communicator.wait(5)
    assert await names(databases["sqlite"]) == ["connected", "half"]
    assert await names(default) == []


async def test_a_consumer_of_http_has_a_session(default: DatabaseInterface) -> None:
    class Consumer(SessionConsumer, AsyncHttpConsumer):
        async def handle(self, body: bytes) -> None:
            await self.session.add(User(name=body.decode()))
            await self.send_response(200, b"added")

    communicator = HttpCommunicator(Consumer.as_asgi(), "POST", "/", body=b"Ada")
    assert (await communicator.get_response(5))["body"] == b"added"
    await communicator.wait(5)
    assert await names(default) == ["Ada"]


async def test_a_task_of_one_message_finds_no_session_of_the_next(
    default: DatabaseInterface,
) -> None:
    tasks: list[asyncio.Task[Any]] = []
    go_on = asyncio.Event()

    class Consumer(Register):
        async def and_then(self, content: Any) -> None:
            if not tasks:
                tasks.append(asyncio.create_task(self.later()))
            else:
                go_on.set()
                await asyncio.wait(tasks)

        async def later(self) -> None:
            await go_on.wait()
            await self.session.add(User(name="foreign"))

    communicator = await connected(Consumer)
    await say(communicator, name="Ada")
    await say(communicator, name="Bob")
    await communicator.disconnect()
    assert isinstance(tasks[0].exception(), SessionClosedError)
    assert "foreign" not in await names(default)


# One session for the connection


class Together(Register):
    session_per_connection = True


@in_both_modes
async def test_one_session_for_the_connection_commits_at_its_end(
    default: DatabaseInterface,
) -> None:
    communicator = await connected(Together)
    assert await say(communicator, name="Ada") == {"users": 2}
    assert await names(default) == []
    await communicator.disconnect()
    assert await names(default) == ["Ada", "connected", "disconnected 1000"]
    await whole(default)


@in_both_modes
async def test_one_session_for_the_connection_is_rolled_back_as_a_whole(
    default: DatabaseInterface,
) -> None:
    communicator = await connected(Together)
    await say(communicator, name="Ada")
    await communicator.send_json_to({"name": "half", "fail": True})
    with pytest.raises(ValueError, match="after the insert"):
        await communicator.wait(5)
    assert await names(default) == []
    await whole(default)


async def test_a_handler_may_commit_the_session_of_the_connection(
    default: DatabaseInterface,
) -> None:
    class Consumer(Together):
        async def and_then(self, content: Any) -> None:
            await self.session.commit()

    communicator = await connected(Consumer)
    await say(communicator, name="Ada")
    assert await names(default) == ["Ada", "connected"]
    await communicator.disconnect()


# Other ways to the database in a handler


@in_native_mode
async def test_in_native_mode_djangos_async_methods_use_the_messages_session(
    default: DatabaseInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = sent_to_threads(monkeypatch)

    class Consumer(Register):
        async def and_then(self, content: Any) -> None:
            assert await User.objects.aget(name=content["name"])
            await User.objects.using("sqlite").acreate(name="there")
            await User.objects.acreate(name=f"{content['name']} natively")

    communicator = await connected(Consumer)
    assert await say(communicator, name="Ada") == {"users": 3}
    await free(default)
    await communicator.send_json_to({"name": "half", "fail": True})
    with pytest.raises(ValueError, match="after the insert"):
        await communicator.wait(5)
    assert await names(default) == ["Ada", "Ada natively", "connected"]
    assert await names(databases["sqlite"]) == ["there"]
    # Nor is there a thread that looks after Django's own connections before each message.
    assert called == []


@in_native_mode
async def test_outside_of_messages_no_session_is_the_current_one(
    default: DatabaseInterface,
) -> None:
    found: list[Any] = []

    class Consumer(Register):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, receive, send)
            found.append(native.current())

    communicator = await connected(Consumer)
    await say(communicator, name="Ada")
    await communicator.disconnect()
    assert found == [None]


@in_both_modes
async def test_code_in_a_thread_has_djangos_own_connection_and_commits_by_itself(
    default: DatabaseInterface,
) -> None:
    @database_sync_to_async
    def in_thread() -> list[str]:
        User.objects.create(name="of the thread")
        try:
            return sorted(User.objects.values_list("name", flat=True))
        finally:
            connections.close_all()

    def in_session() -> list[str]:
        return sorted(User.objects.values_list("name", flat=True))

    class Consumer(Register):
        async def and_then(self, content: Any) -> None:
            await self.send_json([await in_thread(), await self.session.run_sync(in_session)])

    communicator = await connected(Consumer)
    await communicator.send_json_to({"name": "half", "fail": True})
    seen = await communicator.receive_json_from(5)
    assert seen == [["connected", "of the thread"], ["connected", "half", "of the thread"]]
    with pytest.raises(ValueError, match="after the insert"):
        await communicator.wait(5)
    assert await names(default) == ["connected", "of the thread"]


@in_both_modes
async def test_a_background_task_outlives_the_connection(default: DatabaseInterface) -> None:
    tasks: list[asyncio.Task[Any]] = []
    go_on = asyncio.Event()

    @background_session
    async def later(session: Session) -> None:
        await go_on.wait()
        await session.add(User(name="later"))

    class Consumer(Register):
        async def and_then(self, content: Any) -> None:
            tasks.append(asyncio.create_task(later()))

    communicator = await connected(Consumer)
    await say(communicator, name="Ada")
    await communicator.disconnect()
    go_on.set()
    await tasks[0]
    assert "later" in await names(default)
    await whole(default)


async def test_the_decorator_gives_a_single_handler_a_session(default: DatabaseInterface) -> None:
    class Consumer(AsyncJsonWebsocketConsumer):
        @inject_session
        async def receive_json(self, content: Any, session: Session) -> None:
            await session.add(User(name=content["name"]))
            await self.send_json("added")

    communicator = await connected(Consumer)
    assert await say(communicator, name="Ada") == "added"
    await communicator.disconnect()
    assert await names(default) == ["Ada"]


@pytest.mark.django_db
async def test_in_a_test_messages_share_its_transaction(mode: None) -> None:
    communicator = await connected(Register)
    assert await say(communicator, name="Ada") == {"users": 2}
    await communicator.disconnect()
    assert await User.objects.acount() == 3


# The class


def test_a_sync_consumer_is_refused() -> None:
    with pytest.raises(SyncContextError, match=r"Chat is a sync consumer; derive it from"):

        class Chat(SessionConsumer, WebsocketConsumer): ...


async def test_the_session_is_refused_where_no_message_is_handled() -> None:
    with pytest.raises(SessionStateError, match="handles no message"):
        _ = Register().session


async def test_the_wrong_order_of_base_classes_is_explained() -> None:
    class Consumer(AsyncWebsocketConsumer, SessionConsumer):
        async def connect(self) -> None:
            _ = self.session

    communicator = WebsocketCommunicator(Consumer.as_asgi(), "/")
    with pytest.raises(SessionStateError, match="must be the first of its base classes"):
        await communicator.connect(5)


async def test_a_message_without_a_handler_fails_as_ever() -> None:
    class Consumer(SessionConsumer, AsyncConsumer): ...

    with pytest.raises(ValueError, match="No handler for message type"):
        await Consumer().dispatch({"type": "websocket.receive"})


def test_importing_it_imports_no_channels() -> None:
    code = (
        "import sys, django; django.setup(); import django_asyncsession.consumers; "
        "sys.exit('channels' in sys.modules)"
    )
    env = {"DJANGO_SETTINGS_MODULE": "testproject.settings", "DATABASE_URL": "sqlite://:memory:"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)
