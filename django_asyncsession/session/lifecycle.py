"""The life of a session: it begins, commits or rolls back, nests blocks, and ends."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from weakref import ref

from django_asyncsession import threadlocals
from django_asyncsession.backends.options import NO_OPTIONS, TransactionOptions
from django_asyncsession.exceptions import SessionStateError, StreamTimeout
from django_asyncsession.observe.slow import Watch
from django_asyncsession.origins import Site, creation_site, made, task_reference
from django_asyncsession.transactions.blocks import Block
from django_asyncsession.transactions.checkout import (
    ConnectionSource,
    State,
    check_loop,
    nothing_can_wait,
    session_closed,
)
from django_asyncsession.transactions.hooks import call_now
from django_asyncsession.transactions.transaction import Outcome, Transaction

if TYPE_CHECKING:
    from django.http import HttpRequest

T = TypeVar("T")
# Options of a session of which none is given.
NOT_GIVEN = (None,) * 6


class Database(ConnectionSource, Protocol):
    """What a session needs of its database."""

    @property
    def transaction_class(self) -> type[Transaction]: ...


class Session:
    """What a session is without a statement: its options, its transaction, and how that ends.

    The arguments are those of the whole `Session`. This part has its name because Python calls
    coroutines by it: "coroutine 'Session.commit' was never awaited".
    """

    # It was rolled back, because a stream of it was left unread.
    _given_up = False
    # Where its connections come from, if not from its database.
    _source: ConnectionSource | None = None

    def __init__(
        self,
        bind: Database,
        *,
        autocommit: bool = False,
        isolation: str | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        timeout: float | None = None,
        lock_timeout: float | None = None,
        idle_timeout: float | None = None,
        begin_on_use: bool = False,
        site: Site | str | None = None,
    ) -> None:
        self.bind = bind
        self.alias = bind.alias
        self.autocommit = autocommit
        self.info: dict[str, Any] = {}
        # Options that cannot be are told here, not at the first statement.
        given = (isolation, read_only, deferrable, timeout, lock_timeout, idle_timeout)
        self._options = NO_OPTIONS if given == NOT_GIVEN else TransactionOptions(*given)
        self._begin_on_use = begin_on_use
        self._state = State.NEW
        # Where it was made, or what for, in words for messages.
        self.site = creation_site() if site is None else site
        # Called, the task that made it, while somebody wants to know.
        self.maker = task_reference() if Watch.is_on else None
        # What its sync code has put into thread-locals; None when there are none to swap.
        self.contents = threadlocals.new()
        self._entered = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outcome: Outcome | None = None
        # The transaction in progress; in autocommit mode only while `atomic()` is open.
        self._transaction: Transaction | None = None
        self._released = False
        self._request: Callable[[], HttpRequest | None] = _no_request

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.alias!r} {self._describe()}>"

    def _describe(self) -> str:
        if self._transaction is not None:
            return self._transaction.describe()
        return self._state.value + (", autocommit" if self.autocommit else "")

    def __del__(self) -> None:
        transaction = getattr(self, "_transaction", None)
        if transaction is not None and transaction.holds_connection:
            warnings.warn(
                f"{self!r} {made(self.site)} was never closed; use `async with`, or await "
                "session.close()",
                ResourceWarning,
                stacklevel=2,
            )

    @property
    def request(self) -> HttpRequest | None:
        """The request that the session ends with, if it is one's."""
        return self._request()

    @request.setter
    def request(self, request: HttpRequest | None) -> None:
        """Say which request it ends with; done by what makes the session."""
        # The request has the session: the other way round it would be a cycle.
        self._request = _no_request if request is None else ref(request)

    # Begin and end

    async def begin(self) -> Self:
        """Begin a transaction. The connection is taken, and BEGIN sent, with the first statement.

        Raises:
            SessionStateError: in a transaction already; nested blocks are `begin_nested()`.
            SessionClosedError: the session is closed.
        """
        if self._state is not State.NEW:
            self._check_not_closed()
            self._check_loop()
        if self._transaction is not None:
            raise SessionStateError(
                f"{self!r} has begun already; nest with `async with session.begin_nested()`"
            )
        if not self.autocommit:
            self._transaction = self._new_transaction().begin_now()
        elif self._state is not State.NEW:
            raise SessionStateError(
                f"{self!r} has begun already; use `async with session.atomic()`"
            )
        self._state, self._loop = State.IDLE, asyncio.get_running_loop()
        return self

    start = begin

    def _set_begun(self) -> None:
        self._state, self._loop = State.IDLE, asyncio.get_running_loop()

    async def commit(self) -> Self:
        """Commit and run the `on_commit` callbacks; the next statement begins a new transaction.

        Raises:
            TransactionManagementError: an error or a cancellation inside was swallowed; it is
                rolled back.
            CommitUnknown: the connection was lost while COMMIT was on its way.
            SessionStateError: not begun, or a nested block is open.
            Whatever the database says to COMMIT, or a callback raised. Any error leaves the
            session closed.
        """
        await self._finish(Transaction.commit, "commit()")
        return self

    async def rollback(self, checkpoint: str | Block | None = None) -> Self:
        """Roll back; with a `checkpoint` (a savepoint or its name), roll back to it and stay in
        the transaction.

        Raises:
            SessionStateError: not begun, or a nested block is open.
        """
        if checkpoint is None:
            await self._finish(Transaction.rollback, "rollback()")
        else:
            await (await self._current()).rollback(checkpoint)
        return self

    async def _finish(self, how: Callable[[Transaction], Awaitable[None]], what: str) -> None:
        transaction = self._going_on
        if transaction is None or self.autocommit:
            self._check_begun()
            if self.autocommit:
                raise SessionStateError(
                    f"{what} in autocommit mode: every statement is committed already"
                )
            transaction = await self._settled()
        if transaction is None:
            return
        try:
            await how(transaction)
        except BaseException:
            if transaction.state is State.CLOSED:
                self._state = State.CLOSED
            raise
        finally:
            self._forget(transaction)

    async def close(self, *, has_error: bool = False) -> None:
        """Roll back what is not committed and give the connection back; closing twice does
        nothing."""
        transaction = self._transaction
        if not nothing_can_wait():
            if asyncio._get_running_loop() is not self._loop:
                self._check_loop()
            if transaction is not None:
                transaction.check_may_close()
        self._state = State.CLOSED
        if transaction is not None:
            try:
                await transaction.close(has_error=has_error)
            finally:
                self._forget(transaction)
        if self.contents is not None:
            self.contents.clear()

    aclose = close

    def _forget(self, transaction: Transaction) -> None:
        if transaction.state is State.CLOSED:
            self._outcome = transaction.outcome
            if self._transaction is transaction:
                self._transaction = None

    async def reset(self) -> Self:
        """Roll back, give the connection back, and be as new: to be begun again."""
        await self.close()
        self._state = State.NEW
        self._entered = self._released = self._given_up = False
        self._loop = self._outcome = None
        return self

    async def __aenter__(self) -> Self:
        if self._state is State.CLOSED:
            self._check_not_closed()
        if self._entered:
            raise SessionStateError(
                f"{self!r} is entered already; nest with `async with session.begin_nested()`"
            )
        if self._state is State.NEW:
            await self.begin()
        else:
            self._check_loop()
        self._entered = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                if self._given_up:
                    self.check_not_given_up()
                if self._transaction is not None:
                    await self._finish(Transaction.commit, "commit()")
        finally:
            await self.close(has_error=exc is not None)

    def check_not_given_up(self) -> None:
        """For whoever is about to say that all went well.

        Raises:
            StreamTimeout: the session was rolled back, because a stream of it was left unread.
        """
        if self._given_up:
            raise StreamTimeout(
                f"the session of {self.alias!r} {made(self.site)} was rolled back, because a "
                "stream of it was left unread for longer than "
                'ASYNC_SESSION["STREAM_TIMEOUT"]; read it to its end, or close it'
            )

    @property
    def state(self) -> State:
        """Where the session is in its life."""
        return self._state if self._transaction is None else self._transaction.state

    @property
    def closed(self) -> bool:
        """Whether the session is closed for good."""
        return self._state is State.CLOSED

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction has begun and not ended."""
        return self._transaction is not None

    @property
    def transaction(self) -> Transaction | None:
        """The transaction in progress, with the savepoints by name of the low-level API."""
        return self._transaction

    @property
    def outcome(self) -> Outcome | None:
        """How the last transaction ended, as far as is known here; None before the first end."""
        return self._outcome

    # Nested blocks

    def begin_nested(self, name: str | None = None) -> Block:
        """A savepoint, entered with `async with`: released at the end, rolled back to when
        anything is raised.

        Args:
            name: name of the savepoint; None makes one up.

        Raises:
            ValueError: a name that cannot be quoted.
            SessionStateError: not in a transaction.
        """
        return Block(self._begun_transaction("begin_nested()"), name=name, strict=True)

    savepoint = begin_nested

    @asynccontextmanager
    async def atomic(self, savepoint: bool = True, durable: bool = False) -> AsyncIterator[None]:
        """Django's `atomic()`: a savepoint in a transaction, a transaction in autocommit mode.

        Raises:
            RuntimeError: `durable` and nested.
            As `commit`.
        """
        if not self.autocommit or self._transaction is not None:
            transaction = await self._current()
            async with Block(transaction, savepoint=savepoint, durable=durable):
                yield
            return
        self._check_begun()
        self._transaction = transaction = self._new_transaction(autocommit=False)
        try:
            async with transaction:
                transaction.own()
                yield
                self.check_not_given_up()
        finally:
            self._forget(transaction)

    @asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Commit and be without a connection for slow work that needs no database; carry on
        afterwards.

        In autocommit mode there is no connection to give back.

        Raises:
            SessionStateError: a statement inside the block.
            As `commit`.
        """
        if self._is_one_statement_mode:
            self._check_begun()
        else:
            await self.commit()
        self._released = True
        try:
            yield
        finally:
            self._released = False

    def set_rollback(self, rollback: bool) -> None:
        """Say that the innermost block shall be rolled back at its end without an error, or take
        that back.

        Raises:
            SessionStateError: not in a transaction.
        """
        self._begun_transaction("set_rollback()").set_rollback(rollback)

    def get_rollback(self) -> bool:
        """Whether the innermost block will be rolled back at its end.

        Raises:
            SessionStateError: not in a transaction.
        """
        return self._begun_transaction("get_rollback()").get_rollback()

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Call `func`, or await it if it is a coroutine function, after the commit; never after a
        rollback.

        Callbacks run in order; those registered in a nested block that is rolled back are dropped.
        In autocommit mode a plain function is called at once, as in Django.

        Args:
            robust: log an error of `func` instead of raising it and dropping the later callbacks.

        Raises:
            SessionStateError: not begun; or a coroutine function in autocommit mode.
            TypeError: `func` cannot be called.
        """
        if not self._is_one_statement_mode:
            self._begun_transaction("on_commit()").on_commit(func, robust)
            return
        self._check_begun()
        cannot_await = SessionStateError(
            "on_commit() cannot await in autocommit mode; await the coroutine yourself"
        )
        if inspect.iscoroutinefunction(func):
            raise cannot_await
        if inspect.iscoroutine(result := call_now(func, robust)):
            result.close()
            raise cannot_await

    def on_rollback(self, func: Callable[[], Any]) -> None:
        """Call `func`, or await it, once the current block is rolled back. Its errors are logged.

        Raises:
            SessionStateError: not in a transaction.
            TypeError: `func` cannot be called.
        """
        self._begun_transaction("on_rollback()").on_rollback(func)

    # Inside

    def _new_transaction(self, autocommit: bool | None = None) -> Transaction:
        mode = self.autocommit if autocommit is None else autocommit
        transaction = self.bind.transaction_class(
            self._source or self.bind,
            autocommit=mode,
            site=self.site,
            contents=self.contents,
            options=self._options,
        )
        transaction.session = ref(self)
        return transaction

    @property
    def _is_one_statement_mode(self) -> bool:
        """Whether each statement takes a connection of its own."""
        transaction = self._transaction
        return self.autocommit and (transaction is None or transaction.is_over_elsewhere)

    @property
    def _going_on(self) -> Transaction | None:
        """The transaction in progress, if nobody is about to end it; its own guard does the
        rest."""
        transaction = self._transaction
        if transaction is None or transaction.is_ending or self._released:
            return None
        return transaction if transaction.state is State.OPEN else None

    async def _in_transaction(self, use: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
        """Await what `use` makes of the transaction: the session's, begun now if need be, or in
        autocommit mode one of its own."""
        if not self._is_one_statement_mode:
            return await use(await self._current())
        self._check_begun()
        async with self._new_transaction() as transaction:
            return await use(transaction)

    async def _current(self) -> Transaction:
        """The transaction in progress; begun now if the last one has ended."""
        self._check_begun()
        transaction = await self._settled()
        if transaction is None:
            transaction = self._transaction = await self._new_transaction().begin()
        return transaction

    async def _settled(self) -> Transaction | None:
        """The transaction in progress, once those that another task ends have ended: who comes
        after a commit goes on in the next transaction."""
        while (transaction := self._transaction) is not None and transaction.is_over_elsewhere:
            await transaction.turn.enter()
            transaction.turn.leave()
            self._check_begun()
            if self._transaction is transaction and transaction.state is State.CLOSED:
                self._forget(transaction)
        return None if transaction is None or transaction.state is State.CLOSED else transaction

    def _begun_transaction(self, what: str) -> Transaction:
        """The transaction in progress, for what needs no connection yet."""
        self._check_begun()
        if self._transaction is None:
            if self.autocommit:
                raise SessionStateError(
                    f"{what} needs a transaction, and this session is in autocommit mode; use "
                    "session.atomic()"
                )
            self._transaction = self._new_transaction().begin_now()
        return self._transaction

    def _check_begun(self) -> None:
        self._check_not_closed()
        if self._state is State.NEW:
            if not self._begin_on_use:
                raise SessionStateError(
                    f"{self!r} has not begun; use `async with session:`, or await session.begin()"
                )
            self._set_begun()
        self._check_loop()
        if self._released:
            raise SessionStateError(
                f"{self!r} gave its connection back for the `released()` block; leave the block "
                "first"
            )

    def _check_not_closed(self) -> None:
        if self._state is State.CLOSED:
            raise session_closed(self.alias, self.site)

    def _check_loop(self) -> None:
        check_loop(self._loop, self.alias, self.site)


def _no_request() -> None:
    """The request of a session that is not for one."""
