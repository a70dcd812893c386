"""Callbacks of a transaction: after its commit, and when what was done is rolled back."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

from django_asyncsession import bridge
from django_asyncsession.backends.base import BridgedMixin

logger = logging.getLogger("django_asyncsession")

Hook = Callable[[], Any]


class Hooks:
    """The callbacks that wait for the end of a transaction, or of a block in it.

    Those for the commit are kept by the connection once there is one, where Django's own
    `on_commit()` adds to the same list.
    """

    def __init__(self) -> None:
        # Those for the commit that wait although nothing was sent yet.
        self.waiting: list[tuple[Hook, bool]] = []
        self.for_rollback: list[tuple[object, Hook]] = []

    def on_commit(self, func: Hook, robust: bool, wrapper: BridgedMixin | None) -> None:
        """Call `func` after the commit; `wrapper` is None before the first statement.

        Raises:
            TypeError: `func` cannot be called.
        """
        check_callable(func, "on_commit()")
        call = awaiting(func)
        if wrapper is None:
            self.waiting.append((call, robust))
        elif wrapper.in_atomic_block:
            wrapper.on_commit(call, robust)
        else:
            # In a callback of the commit: `call_waiting` comes to it.
            _waiting(wrapper).append((set(), call, robust))

    def on_rollback(self, func: Hook, block: object) -> None:
        """Call `func` when the block, or what it is nested in, is rolled back.

        Raises:
            TypeError: `func` cannot be called.
        """
        check_callable(func, "on_rollback()")
        self.for_rollback.append((block, func))

    def hand_over(self, wrapper: BridgedMixin) -> None:
        """Let the connection, on which the transaction begins now, keep the callbacks."""
        for call, robust in self.waiting:
            wrapper.on_commit(call, robust)
        self.waiting.clear()

    def call_at_once(self, wrapper: BridgedMixin) -> None:
        """Call those that wait for the commit of nothing; in the bridge, in autocommit mode."""
        if wrapper.in_atomic_block:
            # In a test, whose transaction is not committed.
            self.hand_over(wrapper)
            return
        _waiting(wrapper).extend((set(), call, robust) for call, robust in self.waiting)
        self.waiting.clear()
        call_waiting(wrapper)

    def mark(self, wrapper: BridgedMixin) -> tuple[int, int]:
        """Where the callbacks begin that will be registered from now on."""
        return len(wrapper.run_on_commit), len(self.for_rollback)

    async def rolled_back_to(self, mark: tuple[int, int], wrapper: BridgedMixin) -> None:
        """Drop the callbacks for the commit since `mark`, and call those for a rollback."""
        commits, rollbacks = mark
        del wrapper.run_on_commit[commits:]
        hooks, self.for_rollback[rollbacks:] = self.for_rollback[rollbacks:], []
        await _call_all(func for _, func in hooks)

    async def rolled_back(self, block: object) -> None:
        """Call the callbacks of the block, or all of them when the whole transaction is undone."""
        hooks = [func for owner, func in self.for_rollback if block is None or owner is block]
        self.for_rollback = [
            (b, f) for b, f in self.for_rollback if block is not None and b is not block
        ]
        await _call_all(hooks)

    def pass_on(self, block: object, outer: object) -> None:
        """Let the outer block take over: only with it will this one be rolled back."""
        self.for_rollback = [(outer if b is block else b, func) for b, func in self.for_rollback]

    def forget(self) -> None:
        """Drop all callbacks."""
        self.waiting.clear()
        self.for_rollback.clear()


async def _call_all(hooks: Any) -> None:
    """Not in the bridge: Django refuses sync queries here, where no connection serves them."""
    for func in hooks:
        try:
            result = func()
            if is_waited_for(result):
                await result
        except Exception:
            logger.exception("error in the on_rollback callback %s", _name(func))


def call_waiting(wrapper: BridgedMixin) -> None:
    """Call what waits for the commit, and what the callbacks themselves register meanwhile."""
    while wrapper.run_on_commit and not wrapper.in_atomic_block:
        wrapper.run_and_clear_commit_hooks()


def call_now(func: Hook, robust: bool) -> Any:
    """Call a callback that has no commit to wait for, as Django does in autocommit mode."""
    check_callable(func, "on_commit()")
    try:
        return func()
    except Exception:
        if not robust:
            raise
        logger.exception("error calling %s in on_commit()", _name(func))
        return None


def awaiting(func: Hook) -> Hook:
    """A sync function, for the bridge, that calls `func` and awaits what it returns if that waits
    to be awaited."""

    def call() -> Any:
        result = func()
        return bridge.await_(result) if is_waited_for(result) else result

    call.__qualname__ = _name(func)
    call.func = func  # type: ignore[attr-defined]
    return call


def is_waited_for(result: Any) -> bool:
    """Whether to await what a callback returned: a coroutine, but not a task, which the callback
    started to let it run by itself."""
    return inspect.isawaitable(result) and not asyncio.isfuture(result)


def check_callable(func: Any, what: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(func):
        raise TypeError(f"{what} needs a callable, not {func!r}")


def _name(func: Hook) -> str:
    return getattr(func, "__qualname__", None) or repr(func)


def _waiting(wrapper: BridgedMixin) -> list[Any]:
    """Django's list of callbacks, with the savepoints that each depends on."""
    return wrapper.run_on_commit
