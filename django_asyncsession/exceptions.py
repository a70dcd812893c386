"""The errors of the package; each also derives from the Django error a caller already catches."""

from __future__ import annotations

from django.core.exceptions import (
    ImproperlyConfigured,
    ObjectDoesNotExist,
    SynchronousOnlyOperation,
)
from django.db import DatabaseError, InterfaceError, OperationalError
from django.utils.connection import ConnectionDoesNotExist


class AsyncSessionError(Exception):
    """The root of every error that this package raises itself."""


class BridgeError(AsyncSessionError, RuntimeError):
    """`bridge.await_` was called where nothing can await: outside `bridge.run`, or in one being
    closed."""


class ConfigurationError(AsyncSessionError, ImproperlyConfigured):
    """A setting or an option cannot work; the message names it and says what would."""


class UnknownAlias(AsyncSessionError, ConnectionDoesNotExist):
    """DATABASES has no such alias."""


class SyncContextError(AsyncSessionError, ImproperlyConfigured):
    """An async-only part was used from a sync view, a WSGI stack or a worker thread."""


class BlockingCallError(AsyncSessionError, SynchronousOnlyOperation):
    """Sync code of Django was called in async code, where it would block the event loop."""


class SessionStateError(AsyncSessionError, InterfaceError):
    """The session cannot do this in the state it is in: not begun yet, already in a transaction."""


class SessionClosedError(SessionStateError):
    """The session, or what it handed out (cursor, savepoint, connection), is used after its end."""


class SessionInUseError(SessionStateError):
    """Another task owns the innermost block of this session; the message names both tasks."""


class WrongLoopError(SessionStateError):
    """A session or a pool of one event loop is used in another one."""


class PoolError(AsyncSessionError, OperationalError):
    """The pool could not give a connection."""


class PoolTimeout(PoolError):
    """No connection came free within the pool's `timeout` seconds."""


class TooManyWaiting(PoolError):
    """`max_waiting` callers are already queued for a connection."""


class PoolClosed(PoolError):
    """The pool was closed, before or while waiting for a connection."""


class QueryTimeout(AsyncSessionError, OperationalError):
    """The server ended a statement that ran, or waited for a lock, for longer than it may."""


class StreamTimeout(AsyncSessionError, OperationalError):
    """A stream was not read for STREAM_TIMEOUT seconds, so it was ended."""


class CommitUnknown(AsyncSessionError, OperationalError):
    """The connection was lost while COMMIT was on its way: the data may or may not be saved."""


class AliasNotInSession(AsyncSessionError, InterfaceError):
    """Code inside a session touched a database alias that the session does not own."""


class MultipleStatements(AsyncSessionError, DatabaseError):
    """`execute()` or `cursor()` was given more than one SQL statement."""


class NotLoadedError(AsyncSessionError, InterfaceError):
    """An unloaded relation or deferred field was touched where nothing can be awaited."""


class RowNotFound(AsyncSessionError, ObjectDoesNotExist, DatabaseError):
    """The row to update or refresh is not in the database."""


class SharedConnectionWarning(RuntimeWarning):
    """A session in a test asked for what a shared connection cannot give, or was left open."""


class UnboundedQueryError(AsyncSessionError, ValueError):
    """`update` or `delete` without `where` was run without `.all_rows()`."""
