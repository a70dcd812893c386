"""Sessions for Channels consumers: one for each message, or one for the whole connection."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from .exceptions import SessionStateError, SyncContextError
from .origins import RequestSite
from .scope import RequestScope, new_session
from .session.session import Session

if TYPE_CHECKING:

    class _Consumer:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

        async def dispatch(self, message: Any) -> None: ...

        scope: Mapping[str, Any]
else:
    _Consumer = object

# By context: a task that outlives its message must not find the session of the next one.
_handling: contextvars.ContextVar[tuple[SessionConsumer, Session] | None] = contextvars.ContextVar(
    "handling", default=None
)


class SessionConsumer(_Consumer):
    """Gives each message that a consumer handles, from connect to disconnect, a session:
    `self.session`, in native mode the current one.

    Goes before Channels' class: `class Chat(SessionConsumer, AsyncJsonWebsocketConsumer)`. The
    session is committed after the handler and rolled back when it raises. Between messages no
    connection is held. What is sent to the client is sent before the commit; to wait for it, use
    `self.session.on_commit`.
    """

    # Alias of the sessions' database; None is that of the middleware.
    session_alias: str | None = None
    # Options of the sessions, such as {"autocommit": True}; see `Session`.
    session_options: ClassVar[Mapping[str, Any]] = {}
    # True: one session from connect to disconnect, and so one transaction, unless handlers await
    # `self.session.commit()` or it is in autocommit mode.
    session_per_connection = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse sync consumers.

        Raises:
            SyncContextError: the consumer's handlers run in a thread.
        """
        super().__init_subclass__(**kwargs)
        if getattr(cls, "_sync", False):
            raise SyncContextError(
                f"{cls.__qualname__} is a sync consumer; derive it from Channels' async classes, "
                "or use Django's ORM there as usual"
            )

    @property
    def session(self) -> Session:
        """The session of the message that is handled, or of the connection.

        Raises:
            SessionStateError: no message is handled.
        """
        handling = _handling.get()
        if handling is None or handling[0] is not self:
            raise SessionStateError(
                f"{type(self).__qualname__}.session is used where it handles no message; "
                "SessionConsumer must be the first of its base classes"
            )
        return handling[1]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a connection."""
        if not self.session_per_connection:
            await super().__call__(scope, receive, send)
            return
        async with self._within_session(scope):
            await super().__call__(scope, receive, send)

    async def dispatch(self, message: Any) -> None:
        """Handle a message."""
        if self.session_per_connection:
            await super().dispatch(message)
            return
        from channels.exceptions import StopConsumer

        is_last = False
        async with self._within_session(getattr(self, "scope", {})):
            try:
                await super().dispatch(message)
            except StopConsumer:
                # So a consumer says that it has ended, and not that something failed.
                is_last = True
        if is_last:
            raise StopConsumer

    @asynccontextmanager
    async def _within_session(self, scope: Mapping[str, Any]) -> AsyncIterator[None]:
        site = RequestSite.of_consumer(type(self).__qualname__, scope)
        session = new_session(self.session_alias, self.session_options, site=site)
        outer = _handling.get()
        try:
            async with RequestScope(session):
                _handling.set((self, session))
                yield
        finally:
            # By value: a coroutine may be closed in another context than it began in.
            _handling.set(outer)
