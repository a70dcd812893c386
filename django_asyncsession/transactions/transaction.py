"""One connection and one database transaction on it: the low-level API under the session."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from django.db import Error
from django.db.transaction import Atomic, TransactionManagementError

from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionOptions, TransactionState
from django_asyncsession.exceptions import CommitUnknown, SessionClosedError, SessionStateError
from django_asyncsession.origins import Site, creation_site
from django_asyncsession.signals import connection_leased
from django_asyncsession.statements import check_savepoint_name
from django_asyncsession.threadlocals import Contents

from .blocks import Block
from .checkout import (
    CLEANUP_BUDGET,
    ConnectionSource,
    State,
    check_loop,
    nothing_can_wait,
    session_closed,
)
from .hooks import Hooks, call_waiting
from .levels import Levels
from .raw import RawSQL

logger = logging.getLogger("django_asyncsession")


class Outcome(enum.Enum):
    """How a transaction ended, as far as the client knows."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"


class Transaction(RawSQL):
    """One transaction on one connection, which is leased when the first statement runs.

    Args:
        database: where connections come from.
        autocommit: True: no transaction at all, each statement commits by itself.
        site: where the session was made, for messages; None takes the caller's place.
        contents: of the thread-locals that sync code finds; None leaves them alone.
        options: those that follow, checked already.
        isolation, read_only, deferrable: what BEGIN says; None leaves the database's default.
        timeout, lock_timeout, idle_timeout: seconds that a statement, a wait for a lock, or the
            pause between two statements may take before the server ends it.

    Raises:
        ConfigurationError: an option that cannot be.
    """

    def __init__(
        self,
        database: ConnectionSource,
        *,
        autocommit: bool = False,
        site: Site | str | None = None,
        contents: Contents | None = None,
        options: TransactionOptions | None = None,
        **given: Any,
    ) -> None:
        super().__init__(
            database,
            autocommit=autocommit,
            options=TransactionOptions(**given) if options is None else options,
            site=creation_site() if site is None else site,
            contents=contents,
        )
        self.outcome: Outcome | None = None
        self._begun_by: tuple[asyncio.Task[Any] | None, int] = (None, 0)
        self.hooks = Hooks()
        self.levels: Levels[Block] = Levels(self.alias)
        self._atomic: Atomic | None = None
        # The task that alone may use it, when no block is open.
        self._own_task: asyncio.Task[Any] | None = None
        # Of Django's blocks on the connection, with this transaction's own.
        self._depth = 0, 0
        self._rollback_wanted = self._finishing = False
        # Somebody commits or rolls back.
        self.is_ending = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.alias!r} {self.describe()}>"

    def describe(self) -> str:
        """The state in words."""
        blocks = len(self.levels)
        if not blocks:
            return self.state.value
        return f"{self.state.value}, {blocks} savepoint{'s' if blocks > 1 else ''}"

    # Begin and end

    async def begin(self) -> Self:
        """Begin. The connection is taken from the pool, and BEGIN sent, with the first statement.

        Raises:
            SessionStateError: it has begun already.
            SessionClosedError: it has ended.
        """
        if self.state is State.CLOSED:
            raise SessionClosedError(
                f"this transaction on {self.alias!r} has ended; make a new one"
            )
        if self.state is not State.NEW:
            raise SessionStateError(
                f"a transaction on {self.alias!r} has begun already; nest with create_savepoint()"
            )
        self.begin_now()
        return self

    def begin_now(self) -> Self:
        """Begin without awaiting, which is possible because BEGIN is sent with the first
        statement."""
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        self._begun_by = (task, 0 if task is None else task.cancelling())
        self.state = State.OPEN
        return self

    def own(self) -> None:
        """Refuse every task but the current one, as a nested block does."""
        self.owner = self._own_task = asyncio.current_task()

    async def commit(self) -> None:
        """Commit, run the `on_commit` callbacks, and give the connection back.

        Raises:
            TransactionManagementError: an error or a cancellation inside was swallowed; it is
                rolled back.
            CommitUnknown: the connection was lost while COMMIT was on its way.
            SessionStateError: a nested block is open.
            Whatever the database says to COMMIT (a deferred constraint), or a callback raised.
        """
        await self._finish("commit()", self._commit)

    async def rollback(self, checkpoint: str | Block | None = None) -> None:
        """Roll back and give the connection back; with a `checkpoint`, roll back to that savepoint
        and go on.

        Raises:
            SessionStateError: a nested block is open that the rollback would undo.
            Django's database errors: no such savepoint.
        """
        if isinstance(checkpoint, Block):
            await checkpoint.rollback()
        elif checkpoint is not None:
            await self._rollback_to(checkpoint)
        else:
            await self._finish("rollback()", self._rollback)

    async def _finish(self, what: str, how: Callable[[], Awaitable[None]]) -> None:
        self.is_ending = True
        try:
            mark = await self.take_turn()
            try:
                if self._finishing or self.turn.depth > 1 or self.levels.blocks:
                    self._refuse_end(what)
                self._finishing = True
                try:
                    await how()
                finally:
                    await self._end()
            finally:
                self.leave_turn(mark)
        finally:
            self.is_ending = False

    async def close(self, *, has_error: bool = False) -> None:
        """Roll back what is not committed and give the connection back; closing twice does
        nothing."""
        if self.state is State.CLOSED:
            return
        if self.state is State.NEW:
            self.state = State.CLOSED
            return
        if nothing_can_wait():
            self.abandon()
            return
        check_loop(self._loop, self.alias, self._site)
        self.check_may_close()
        # Not in the queue: the task that ends the transaction does not wait behind those that
        # still use it.
        self.state = State.CLOSED
        self._stop_call_of_another_task()
        try:
            await self.turn.enter()
        except GeneratorExit:
            self.abandon()
            raise
        except BaseException:
            # Cancelled while another task's call unwinds: that call still uses the connection, so
            # end it after that.
            end_later(asyncio.get_running_loop(), self._close_in_turn())
            raise
        try:
            await self._close_now()
        finally:
            self.turn.leave()

    def check_may_close(self) -> None:
        """Refuse to close in a callback of the end, which closes by itself.

        Raises:
            SessionStateError: this is such a callback.
        """
        if self._finishing and self.turn.task is asyncio.current_task():
            self._check_not_finishing("close()")

    @property
    def is_over_elsewhere(self) -> bool:
        """Whether another task ends it, so that whoever comes now has to go on without it."""
        over = self.is_ending or self.state is State.CLOSED
        return over and self.turn.task is not asyncio.current_task()

    async def _close_in_turn(self) -> None:
        await self.turn.enter()
        try:
            await self._close_now()
        finally:
            self.turn.leave()

    async def _close_now(self) -> None:
        try:
            if self.is_taken:
                await self._rollback(quietly=True)
            elif self.outcome is None:
                self.outcome = Outcome.ROLLED_BACK
        finally:
            await self._end()

    def _stop_call_of_another_task(self) -> None:
        """A call that another task still has running (a sibling in `gather`) ends with
        SessionClosedError."""
        # A COMMIT on its way is waited for: cut, nobody would know whether it is saved.
        if not self._finishing and self.turn.task is not asyncio.current_task():
            self.stop(
                session_closed(self.alias, self._site, "was closed while this call was running")
            )

    def abandon(self) -> None:
        """Close the connection without awaiting, which rolls back; for a coroutine that is being
        closed, where nothing can wait."""
        self.state = State.CLOSED
        self.outcome = self.outcome or Outcome.ROLLED_BACK
        self.levels.clear()
        self.hooks.forget()
        self._direct_error = None
        self._begun_by, self.owner, self._own_task = (None, 0), None, None
        self.close_connection()

    async def __aenter__(self) -> Self:
        return await self.begin()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None and self.state is State.OPEN:
                await self.commit()
        finally:
            await self.close(has_error=exc is not None)

    # Savepoints

    async def create_savepoint(self, name: str) -> None:
        """Create a savepoint.

        Raises:
            ValueError: a name with quotes, or longer than 63 bytes.
        """
        check_savepoint_name(name)

        def create() -> None:
            self.wrapper._savepoint(name)
            self.levels.add(name, self.hooks.mark(self.wrapper))

        await self.run(create)

    async def release_savepoint(self, name: str) -> None:
        """Release a savepoint, keeping what was done since.

        Raises:
            ValueError: a name with quotes, or longer than 63 bytes.
            SessionStateError: a nested block that began later is open.
        """
        check_savepoint_name(name)

        def release() -> None:
            savepoint = self.levels.find(name)
            self.wrapper._savepoint_commit(name)
            if savepoint is not None:
                self.levels.release(savepoint)

        await self.run(release)

    async def _rollback_to(self, name: str) -> None:
        check_savepoint_name(name)
        for block in self.levels:
            if block.sid == name:
                await block.rollback()
                return
        mark = await self.take_turn()
        try:
            savepoint = self.levels.find(name)
            await self.call(self.send_rollback_to, (name,))
            if savepoint is not None:
                self.levels.go_back_to(savepoint)
                await self.hooks.rolled_back_to(savepoint.mark, self.wrapper)
        finally:
            self.leave_turn(mark)

    def send_rollback_to(self, sid: str) -> None:
        """Roll back to a savepoint; called in the bridge."""
        wrapper = self.wrapper
        failed, wrapper.needs_rollback = wrapper.needs_rollback, False
        try:
            wrapper.savepoint_rollback(sid)
        except BaseException:
            wrapper.needs_rollback = failed
            raise
        wrapper.needs_rollback = self._rollback_wanted and not self.levels

    # Callbacks and the rollback flag

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Call `func`, or await it if it is a coroutine function, after the commit; never after a
        rollback.

        Args:
            robust: log an error of `func` instead of raising it and dropping the later callbacks.

        Raises:
            TypeError: `func` cannot be called.
        """
        self.check_owner()
        begun = self._atomic is not None and self.is_taken
        self.hooks.on_commit(func, robust, self.wrapper if begun else None)

    def on_rollback(self, func: Callable[[], Any]) -> None:
        """Call `func`, or await it, once what was done in the current block is rolled back.

        An error of `func` is logged. `func` runs when there is no transaction any more, or in the
        outer one: it cannot call sync ORM code.

        Raises:
            TypeError: `func` cannot be called.
        """
        self.check_owner()
        self.hooks.on_rollback(func, self.levels.innermost)

    def set_rollback(self, rollback: bool) -> None:
        """Say that the innermost block shall be rolled back at its end, or take that back."""
        self.check_owner()
        if (block := self.levels.innermost) is None:
            self._rollback_wanted = rollback
        else:
            block.rollback_wanted = rollback
        if self._atomic is not None and self.is_taken:
            self.wrapper.set_rollback(rollback)

    def get_rollback(self) -> bool:
        """Whether the innermost block will be rolled back at its end."""
        if self._atomic is None or not self.is_taken:
            return self._rollback_wanted or self._direct_error is not None
        return bool(self.wrapper.get_rollback())

    # Inside

    def open_block(self, block: Block) -> None:
        """A nested block begins, of the current task."""
        self.levels.open(block)
        self.owner = block.task

    def close_block(self) -> None:
        """The innermost block ends."""
        self.levels.close()
        self._set_owner()

    def lose_block(self, block: Block) -> None:
        """A block could not be left, so nothing of the transaction may be saved."""
        self.levels.lose(block)
        self._set_owner()
        if self.is_taken:
            self.wrapper.abandon()

    def _set_owner(self) -> None:
        block = self.levels.innermost
        self.owner = self._own_task if block is None else block.task

    def _check_not_finishing(self, what: str) -> None:
        if self._finishing:
            raise SessionStateError(
                f"{what} in a callback of the end of the transaction on {self.alias!r}; it is "
                "ending already"
            )

    def _refuse_end(self, what: str) -> None:
        self._check_not_finishing(what)
        self.levels.check_flat(what)
        if self.turn.depth > 1:
            raise SessionStateError(
                f"{what} inside sync code that runs on {self.alias!r}, which still needs the "
                "transaction; call it after the sync code, or use a nested block inside"
            )

    def _enter(self, wrapper: BridgedMixin) -> None:
        """Begin on the connection; called in the bridge, before the first statement."""
        if self.autocommit:
            super()._enter(wrapper)
            return
        wrapper.start(self.options)
        atomic = Atomic(self.alias, savepoint=True, durable=False)
        atomic.__enter__()
        self._atomic = atomic
        # In a test it is nested in the test's own.
        self._depth = len(wrapper.savepoint_ids), len(wrapper.atomic_blocks)
        wrapper.needs_rollback = self._rollback_wanted or self._direct_error is not None
        wrapper.rollback_exc = self._direct_error
        self._has_begun_directly, self._direct_error = False, None
        self.hooks.hand_over(wrapper)

    # The end

    async def _commit(self) -> None:
        reason = None if self.autocommit else self._reason_to_roll_back()
        if reason is not None:
            cause = self.wrapper.rollback_exc if self.is_taken else None
            cause = self._direct_error or cause
            await self._rollback()
            raise TransactionManagementError(
                f"the transaction on {self.alias!r} {reason}"
            ) from cause
        if self._is_rollback_wanted:
            await self._rollback()
        elif self._has_begun_directly:
            await self._commit_directly()
        elif self._atomic is None:
            await self._commit_nothing()
        else:
            await self._send_commit(self.wrapper, self._atomic)

    async def _commit_directly(self) -> None:
        wrapper = self.wrapper
        if not self.hooks.waiting and (direct := wrapper.direct()) is not None:
            await self._confirmed(wrapper, self._end_directly(direct, wrapper, b"COMMIT"))
            return
        await self.call(_nothing)
        assert self._atomic is not None
        await self._send_commit(wrapper, self._atomic)

    def _reason_to_roll_back(self) -> str | None:
        """Why the transaction must not be committed although nobody asked to roll it back."""
        (begun_by, before), task = self._begun_by, asyncio.current_task()
        cancelled = task is not None and task.cancelling() > (before if task is begun_by else 0)
        lease = self.lease
        if cancelled or (lease is not None and lease.connection.cut):
            return "is rolled back, because a cancellation inside it was swallowed"
        if lease is None:
            return None
        wrapper = lease.connection
        state = wrapper.transaction_state
        if wrapper.abandoned or state is TransactionState.UNKNOWN:
            return "is rolled back, because its connection was lost"
        if wrapper.left_by_sql:
            return (
                "was ended by SQL inside it; use commit(), rollback() and savepoints instead of "
                "sending COMMIT or ROLLBACK"
            )
        failed = wrapper.needs_rollback or state is TransactionState.FAILED
        if failed and not self._is_rollback_wanted:
            return (
                "is rolled back, because an error inside it was swallowed; "
                "catch the error around a nested block: async with session.begin_nested()"
            )
        return None

    @property
    def _is_rollback_wanted(self) -> bool:
        if self._rollback_wanted or self._atomic is None or self.lease is None:
            return self._rollback_wanted
        return self.lease.connection.is_rollback_wanted

    async def _send_commit(self, wrapper: BridgedMixin, atomic: Atomic) -> None:
        def commit() -> None:
            wrapper.end_streams()
            atomic.__exit__(None, None, None)
            call_waiting(wrapper)

        # Callbacks still find what the transaction has set.
        wrapper.ends_lease = not wrapper.run_on_commit
        # For the callbacks: what was written is saved then.
        wrapper.changed = ""
        try:
            await self._confirmed(wrapper, self.call(commit))
        finally:
            wrapper.ends_lease = False

    async def _confirmed(self, wrapper: BridgedMixin, commit: Coroutine[Any, Any, None]) -> None:
        """Await the commit, and say what is known of it when it fails."""
        wrapper.commit_confirmed = False
        # What is sent to a server that has closed the connection does not reach it.
        unreachable = wrapper.has_hung_up()
        self.outcome = Outcome.UNKNOWN
        try:
            await commit
        except Error as exc:
            if wrapper.commit_confirmed:
                raise
            if not self.is_lost or unreachable or wrapper.ended_before(exc):
                self.outcome = Outcome.ROLLED_BACK
                raise
            raise CommitUnknown(
                f"the connection to {self.alias!r} was lost while COMMIT was on its way; "
                "the data may be saved or not, so look before doing it again"
            ) from exc.__cause__ or exc
        finally:
            # An error's traceback keeps this frame, and this the frames of the coroutine.
            del commit
            if wrapper.commit_confirmed:
                self.outcome = Outcome.COMMITTED

    async def _commit_nothing(self) -> None:
        """No statement ran, so there is nothing to commit; the callbacks run all the same, as in
        Django, and may use the connection."""
        self.outcome = Outcome.COMMITTED
        if self.hooks.waiting:
            # What they run must not begin the transaction that nobody would commit any more.
            self._entered = True
            await self.call(self._call_hooks)

    def _call_hooks(self) -> None:
        if connection_leased.receivers:
            self._announce(self.wrapper)
        self.hooks.call_at_once(self.wrapper)

    async def _rollback(self, quietly: bool = False) -> None:
        """Roll back within the budget, or close the connection, which rolls back as well."""
        self._rollback_wanted = False
        try:
            if self._has_begun_directly and self.is_taken:
                await self._roll_back_directly(self.wrapper)
            elif self._atomic is not None and self.is_taken:
                await self._send_rollback(self.wrapper, self._atomic)
        except Exception as exc:
            self.wrapper.abandon()
            if not quietly:
                raise
            logger.warning("rollback on %r failed, the connection is closed: %s", self.alias, exc)
        finally:
            self.outcome = self.outcome or Outcome.ROLLED_BACK

    async def _roll_back_directly(self, wrapper: BridgedMixin) -> None:
        if self.is_lost:
            wrapper.abandon()
        elif (direct := wrapper.direct()) is not None:
            await self._within(CLEANUP_BUDGET, self._end_directly(direct, wrapper, b"ROLLBACK"))
        else:
            await self.call_within(CLEANUP_BUDGET, _nothing)
            assert self._atomic is not None
            await self._send_rollback(wrapper, self._atomic)

    async def _send_rollback(self, wrapper: BridgedMixin, atomic: Atomic) -> None:
        lost = self.is_lost
        if lost or wrapper.left_by_sql:
            # What the user's own COMMIT saved is saved.
            self.outcome = self.outcome if lost else Outcome.UNKNOWN
            wrapper.abandon()
            return
        # One ROLLBACK undoes what is in the blocks too.
        self.levels.clear()
        self._set_owner()
        savepoints, blocks = self._depth
        wrapper.savepoint_ids = wrapper.savepoint_ids[:savepoints]
        wrapper.atomic_blocks = wrapper.atomic_blocks[:blocks]
        error = Rollback()

        def roll_back() -> None:
            wrapper.end_streams()
            atomic.__exit__(Rollback, error, None)

        wrapper.ends_lease = True
        try:
            await self.call_within(CLEANUP_BUDGET, roll_back)
        finally:
            wrapper.ends_lease = False

    async def _end(self) -> None:
        """Give the connection back, clean or closed, whatever is raised meanwhile."""
        if nothing_can_wait():
            self.abandon()
            return
        self.state = State.CLOSED
        if self.levels.blocks or self.levels.savepoints:
            self.levels.clear()
        self._direct_error = None
        # A task keeps its exception, which keeps the frames that know this transaction.
        self._begun_by, self.owner, self._own_task = (None, 0), None, None
        try:
            await self.give_back()
        finally:
            if self.outcome is Outcome.ROLLED_BACK:
                await self.hooks.rolled_back(None)
            if self.hooks.waiting or self.hooks.for_rollback:
                self.hooks.forget()


def _nothing() -> None:
    """Sync code, for which the transaction is taken over from the wire."""


_ending: set[asyncio.Task[None]] = set()


def end_later(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a clean-up that its caller cannot wait for, in a task of its own; from any thread."""

    def start() -> None:
        task = loop.create_task(coroutine, context=contextvars.Context())
        _ending.add(task)
        task.add_done_callback(_ending.discard)

    if asyncio._get_running_loop() is loop:
        start()
        return
    try:
        loop.call_soon_threadsafe(start)
    except RuntimeError:
        # The loop is closed, and its pool with it.
        coroutine.close()


class Rollback(Exception):
    """What the outermost block is told to make it roll back; nobody sees it."""
