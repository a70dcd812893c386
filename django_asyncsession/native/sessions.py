"""The sessions of one unit of work, one for each database alias, and sync code that uses whichever
of them it touches."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from greenlet import getcurrent, greenlet

from django_asyncsession import bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.conf import settings
from django_asyncsession.exceptions import SessionClosedError, SessionInUseError
from django_asyncsession.interface import databases
from django_asyncsession.origins import task_name
from django_asyncsession.session.session import Attached, Session
from django_asyncsession.threadlocals import Contents
from django_asyncsession.transactions.checkout import taken
from django_asyncsession.transactions.transaction import Transaction
from django_asyncsession.unread import Unread

logger = logging.getLogger("django_asyncsession")

P = ParamSpec("P")
T = TypeVar("T")
Task = asyncio.Task[Any]
NONE: Mapping[str, Transaction] = {}

# The sessions that Django's own async methods run in, in this context.
_current: contextvars.ContextVar[SessionSet | None] = contextvars.ContextVar(
    "current", default=None
)
# The call of sync code that the current task is inside of: it awaits what asks.
_enclosing: contextvars.ContextVar[Call | None] = contextvars.ContextVar("enclosing", default=None)


class SessionSet:
    """The sessions of one unit of work, one for each alias.

    An alias that has none gets one when it is first used. All of them end together: `commit` and
    `close` have the meaning they have for one session, so that whatever ends a session can end
    the set.

    Args:
        main: the session that commits last.
        others: sessions for other aliases.
        keep_others: True: what is begun for an alias without a session is kept, and ends with the
            set. False: it is in autocommit mode, so that nothing of it is left after a call.
    """

    def __init__(self, main: Session, *others: Session, keep_others: bool) -> None:
        self._main = main.alias
        self._sessions: dict[str, Session] = {s.alias: s for s in (main, *others)}
        self._autocommit = main.autocommit if keep_others else True
        self._loop: asyncio.AbstractEventLoop | None = _running_loop()
        self._ended = False
        self.block_warning: float | None = settings.LOOP_BLOCK_WARNING_SECONDS
        # Which task has the connection of an alias, and which alias a task waits for.
        self._holders: dict[str, asyncio.Task[Any] | None] = {}
        self._wanted: dict[asyncio.Task[Any] | None, str] = {}
        # What sync code of all of them finds in thread-locals.
        self.contents = main.contents
        for session in self._sessions.values():
            self._adopt(session)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(map(repr, self._sessions.values()))}>"

    def session(self, alias: str) -> Session:
        """The session of an alias, made now if there is none.

        Raises:
            UnknownAlias: DATABASES has no such alias.
            SessionClosedError: the set has ended.
        """
        if self._ended:
            raise SessionClosedError(
                f"the sessions for {alias!r} and other databases have ended; make new ones"
            )
        if alias not in self._sessions:
            main = self._sessions[self._main]
            session = databases[alias].get_session(
                begin_on_use=True, autocommit=self._autocommit, site=main.site
            )
            session.request = main.request
            self._adopt(session)
            self._sessions[alias] = session
        return self._sessions[alias]

    def _adopt(self, session: Session) -> None:
        session.companions = self
        if session.contents is not None and self.contents is not None:
            session.contents.join(self.contents)

    @property
    def is_usable(self) -> bool:
        """Whether the set has not ended, and belongs to the event loop that runs here."""
        loop = _running_loop()
        if self._loop is None:
            self._loop = loop
        return not self._ended and loop is not None and loop is self._loop

    # Sync code

    def run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """Call sync code natively async. Each alias that it touches is its session's connection,
        taken when it is touched; code that touches none takes none.

        Raises:
            SessionInUseError: it would wait for a task that waits for this one.
            Whatever `fn` raises.
        """
        return self._run(fn, fn, args, kwargs)

    def run_on(
        self, alias: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """As `run`, taking the connection of `alias` first.

        Raises:
            As `run`.
        """
        return self._run(fn, _take, (alias, fn, *args), kwargs)

    @asynccontextmanager
    async def one_connection(
        self, alias: str
    ) -> AsyncIterator[tuple[Callable[[Callable[[], T]], Awaitable[T]], Unread]]:
        """One connection for several calls, each with what is yielded: the rows of one cursor.

        What gives it back when they are left unread is yielded with it.
        """
        session = self.session(alias)
        async with session.one_connection() as transaction:

            async def run(fn: Callable[[], T]) -> T:
                # A cursor that is open already does not ask for its connection.
                held = {alias: transaction}
                result: T = await self._run(fn, _take, (alias, fn), {}, held)
                return result

            yield run, session.unread(transaction)

    async def _run(
        self,
        shown: Any,
        fn: Callable[..., T],
        args: Any,
        kwargs: Any,
        held: Mapping[str, Transaction] = NONE,
    ) -> T:
        """Run `fn` in a `Call`.

        Args:
            shown: the function that messages name.
            held: transactions of aliases whose sessions are in autocommit mode.
        """
        call = Call(self, shown, held)
        outer = call.outer
        _enclosing.set(call)
        error: BaseException | None = None
        try:
            if self.contents is None:
                return await bridge.run_with(None, fn, args, kwargs, made_by=call.made)
            return await self.contents.run_with(None, fn, args, kwargs, made_by=call.made_with)
        except BaseException as exc:
            error = exc
            raise
        finally:
            _enclosing.set(outer)
            call.end()
            try:
                if call.attached:
                    await call.give_back(error)
            finally:
                # A traceback keeps this frame, which must not keep the greenlet.
                del call, outer, error

    async def attach(self, call: Call, session: Session) -> Attached:
        """The connection of a session, for a call that touches its alias and has to wait.

        Raises:
            As `run`.
        """
        alias = session.alias
        self._check_no_deadlock(call.task, alias)
        self._wanted[call.task] = alias
        try:
            return await session.attach(call.held.get(alias))
        finally:
            self._wanted.pop(call.task, None)

    def note_holder(self, alias: str, task: Task | None) -> Task | None:
        """Note that a task has the connection of an alias; None is nobody.

        Returns:
            Who had it before.
        """
        before = self._holders.pop(alias, None)
        if task is not None:
            self._holders[alias] = task
        return before

    def _takes_its_own(self, alias: str) -> bool:
        """Whether each call on an alias takes a connection of its own, so that none waits."""
        session = self.session(alias)
        return session.autocommit and not session.in_transaction

    def _check_no_deadlock(self, task: asyncio.Task[Any] | None, alias: str) -> None:
        """Refuse to wait for a task that waits, maybe by way of others, for this one."""
        if self._takes_its_own(alias):
            return
        seen: str | None = alias
        holder = None
        while seen is not None and seen in self._holders:
            holder = self._holders[seen]
            if holder is task:
                break
            seen = self._wanted.get(holder)
        else:
            return
        other = self._holders[alias]
        if other is not task:
            raise SessionInUseError(
                f"task {task_name()!r} needs the session of {alias!r}, which task "
                f"{other and other.get_name()!r} uses while it waits for a session that this "
                "task uses; let the two run one after the other"
            )

    # The end

    @property
    def in_transaction(self) -> bool:
        """Whether any of the sessions is in a transaction."""
        return bool(self._open())

    def _open(self) -> list[Session]:
        """The sessions in a transaction, the main one last."""
        return [s for s in self._in_order() if s.in_transaction]

    def _in_order(self) -> list[Session]:
        """The sessions in the order they were begun, the main one last."""
        return sorted(self._sessions.values(), key=lambda s: s.alias == self._main)

    def check_not_given_up(self) -> None:
        """As that of `Session`, for every session."""
        for session in self._sessions.values():
            session.check_not_given_up()

    async def commit(self) -> None:
        """Commit every session: in the order they were begun, and the main one last, so that it is
        rolled back when another cannot be saved.

        Raises:
            As `Session.commit`. What was committed before the failure stays; a note of the error,
            and the log, name it.
        """
        saved: list[str] = []
        # A callback of a commit may begin a transaction, on this alias or another.
        while sessions := self._open():
            for session in sessions:
                try:
                    with self.as_current():
                        await session.commit()
                except BaseException as error:
                    _report(error, session.alias, saved)
                    raise
                saved.append(session.alias)

    async def close(self, *, has_error: bool = False) -> None:
        """Roll back what is not committed and give the connections back."""
        sessions = self._in_order()
        self.end()
        await _close_all(sessions, has_error)

    def end(self) -> None:
        """From now on Django's async methods do what they do without a session."""
        self._ended = True
        for session in self._sessions.values():
            session.companions = None
        # Timers and tasks made meanwhile keep a copy of the context, and it this set.
        self._sessions.clear()

    # The context

    @contextmanager
    def as_current(self) -> Iterator[None]:
        """Let Django's async methods run in these sessions, in this context and in the tasks that
        it makes."""
        outer = _current.get()
        _current.set(self)
        try:
            yield
        finally:
            # By value: a generator, or a greenlet, may end in another context than it began in.
            _current.set(outer)

    @contextmanager
    def beside(self, session: Session) -> Iterator[None]:
        """Let Django's async methods run in one other session meanwhile, and each call on another
        alias by itself."""
        sessions = SessionSet(session, keep_others=False)
        try:
            with sessions.as_current():
                yield
        finally:
            sessions.end()

    def stream(self, parts: AsyncIterator[T]) -> AsyncIterator[T]:
        """The same parts, each made with these sessions as the current ones, whoever asks for
        it."""
        return _Parts(parts, self)


def _take(alias: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Take the connection of `alias` before calling `fn`; called in a `Call`."""
    # Not by way of `connections`, which native mode, if it was uninstalled meanwhile, has left.
    if (call := current_call()) is not None:
        call.connection(alias)
    return fn(*args, **kwargs)


class _Parts(AsyncIterator[T]):
    def __init__(self, parts: AsyncIterator[T], sessions: SessionSet) -> None:
        self._parts, self._sessions = parts, sessions

    async def __anext__(self) -> T:
        with self._sessions.as_current():
            return await anext(self._parts)

    async def aclose(self) -> None:
        if (aclose := getattr(self._parts, "aclose", None)) is not None:
            with self._sessions.as_current():
                await aclose()


class Call(bridge.Bridge):
    """The greenlet that sync code runs in. The connections that it asks for, it keeps to its
    end."""

    def __init__(
        self, sessions: SessionSet, function: Any, held: Mapping[str, Transaction]
    ) -> None:
        super().__init__(bridge.call)
        self.sessions, self.function = sessions, function
        # Transactions of aliases, where they are not the session's own choice.
        self.held = held
        self.task = asyncio.current_task()
        self.wrappers: dict[str, BridgedMixin] = {}
        self.failed: dict[str, BaseException] = {}
        # What is given back at the end, and who had it before.
        self.attached: list[tuple[str, Attached, Task | None]] = []
        self._lent: list[tuple[BridgedMixin, weakref.ref[greenlet] | None]] = []
        self._contents: Contents | None = None
        outer = _enclosing.get()
        self.outer = outer if outer is not None and outer.task is self.task else None

    def made(self, fn: Callable[..., Any]) -> Call:
        """This; what makes greenlets is asked for one."""
        return self

    def made_with(self, contents: Contents, fn: Callable[..., Any]) -> Call:
        """This, with contents of thread-locals."""
        self._contents = contents
        return self

    def enter(self, *values: Any) -> Any:
        """Go on with the code, and log it when it took too long."""
        return self._go_on(self.switch, *values)

    def fail(self, error: Any) -> Any:
        """Go on with the code by raising an error in it."""
        return self._go_on(self.throw, error)

    def _go_on(self, switch: Callable[..., Any], *values: Any) -> Any:
        limit, started = self.sessions.block_warning, time.monotonic()
        try:
            if self._contents is None:
                return switch(*values)
            return self._contents.go_on(switch, *values)
        finally:
            if limit is not None and (seconds := time.monotonic() - started) > limit:
                logger.warning(
                    "%s blocked the event loop for %.3f s; let it keep its thread with "
                    "@keep_thread, or let it wait with async code",
                    _described(self.function),
                    seconds,
                )
            # A traceback keeps this frame, which must not keep the greenlet.
            del switch, values

    def connection(self, alias: str) -> Any:
        """The connection of an alias; called in this greenlet, where the code uses
        `connections[alias]`.

        Raises:
            UnknownAlias: DATABASES has no such alias.
            Whatever keeps the session from getting a connection.
        """
        if alias in self.wrappers:
            return self.wrappers[alias]
        if alias in self.failed:
            # Django's blocks ask again while they unwind: not one more wait for a full pool.
            raise self.failed[alias]
        return self._borrow(alias) or self._attach(alias)

    def _attach(self, alias: str) -> BridgedMixin:
        try:
            session = self.sessions.session(alias)
            attached = session.attach_at_once(self.held.get(alias))
            if attached is None:
                attached = bridge.await_(self.sessions.attach(self, session))
            # Nobody waits for one that each call takes for itself.
            is_waited_for = not (attached.is_own or alias in self.held)
            before = self.sessions.note_holder(alias, self.task if is_waited_for else None)
            self.attached.append((alias, attached, before))
            self._lend(attached.transaction.wrapper)
            return attached.transaction.prepare()
        except BaseException as error:
            self.wrappers.pop(alias, None)
            self.failed[alias] = error
            raise

    def _borrow(self, alias: str) -> BridgedMixin | None:
        """The connection that a call of the same task has, which awaits this one: an async
        receiver or callback uses what its sender uses."""
        outer = self.outer
        while outer is not None:
            wrapper = outer.wrappers.get(alias)
            if wrapper is not None and outer.sessions is self.sessions:
                self._lend(wrapper)
                return wrapper
            outer = outer.outer
        return None

    def _lend(self, wrapper: BridgedMixin) -> None:
        """Let the code of this greenlet use a connection."""
        self._lent.append((wrapper, wrapper.caller))
        wrapper.caller = weakref.ref(self)
        self.wrappers[wrapper.alias] = wrapper

    def end(self) -> None:
        """Let the code use no connection any more."""
        self.outer = None
        for wrapper, serving in reversed(self._lent):
            wrapper.caller = serving
        self._lent.clear()
        self.wrappers.clear()
        self.failed.clear()
        # An error's traceback keeps this, and the task its error.
        self.task = None

    async def give_back(self, error: BaseException | None) -> None:
        """Give all connections back, that which was taken last first.

        Args:
            error: what the code raised.

        Raises:
            What the error means, if it means another one.
        """
        alias, attached, before = self.attached.pop()
        self.sessions.note_holder(alias, before)
        try:
            try:
                attached.leave(error)
            except BaseException as exc:
                error = exc
                raise
            finally:
                if attached.is_own:
                    await attached.end(error)
        except BaseException as exc:
            error = exc
            raise
        finally:
            try:
                if self.attached:
                    await self.give_back(error)
            finally:
                del self, error


def _described(fn: Any) -> str:
    """Module and name of a function, of the one inside when it is decorated."""
    while isinstance(fn, partial):
        fn = fn.func
    fn = inspect.unwrap(fn)
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


def current() -> SessionSet | None:
    """The sessions that Django's async methods run in here; None where they do what they do
    without."""
    sessions = _current.get()
    return sessions if sessions is not None and sessions.is_usable else None


@contextmanager
def apart() -> Iterator[None]:
    """Without the sessions that this context has from the one it was copied from: for work that
    has nothing to do with what started it, and outlives it."""
    inherited: list[tuple[contextvars.ContextVar[Any], Any]] = [
        (variable, variable.get()) for variable in (_current, _enclosing, taken)
    ]
    _current.set(None)
    _enclosing.set(None)
    taken.set(())
    try:
        yield
    finally:
        for variable, value in inherited:
            variable.set(value)


def current_call() -> Call | None:
    """The call that this sync code is in, if its sessions serve it."""
    this = getcurrent()
    return this if isinstance(this, Call) else None


def is_enclosed() -> bool:
    """Whether sync code, further up in this task, waits for what is awaited here."""
    call = _enclosing.get()
    return call is not None and call.task is asyncio.current_task()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _close_all(sessions: list[Session], has_error: bool) -> None:
    """Close each, also when one before it could not be closed."""
    if not sessions:
        return
    try:
        await sessions[0].close(has_error=has_error)
    finally:
        await _close_all(sessions[1:], has_error)


def _report(error: BaseException, failed: str, saved: list[str]) -> None:
    """Say which databases have the unit of work and which one does not."""
    if saved:
        names = ", ".join(map(repr, saved))
        text = f"the commit on {failed!r} failed after {names} was committed, and stays so"
        error.add_note(text)
        logger.error("%s: %s", text, error)
