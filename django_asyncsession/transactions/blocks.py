"""Nested blocks of a transaction: savepoints, and `atomic()` without one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from django.db.transaction import Atomic, TransactionManagementError

from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.exceptions import SessionStateError
from django_asyncsession.statements import check_savepoint_name

from .checkout import CLEANUP_BUDGET, nothing_can_wait
from .hooks import Hooks
from .levels import Levels
from .turn import Mark

logger = logging.getLogger("django_asyncsession")

T = TypeVar("T")


class Nestable(Protocol):
    """What a block needs of the transaction that it is in."""

    alias: str
    hooks: Hooks
    levels: Levels[Block]

    @property
    def wrapper(self) -> BridgedMixin: ...

    @property
    def is_lost(self) -> bool: ...

    async def run(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T: ...

    async def take_turn(self) -> Mark: ...

    def leave_turn(self, mark: Mark) -> None: ...

    async def call(
        self, fn: Callable[..., T], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> T: ...

    async def call_within(self, seconds: float, fn: Callable[[], T]) -> T: ...

    def send_rollback_to(self, sid: str) -> None: ...

    def open_block(self, block: Block) -> None: ...

    def close_block(self) -> None: ...

    def lose_block(self, block: Block) -> None: ...

    def abandon(self) -> None: ...


class Block:
    """A nested block: a savepoint, or `atomic()` without one, entered with `async with`.

    Args:
        transaction: where it nests.
        name: name of the savepoint; None makes one up.
        savepoint: False nests without a savepoint, so that an error dooms the outer block.
        durable: refuse to nest.
        strict: an error that was swallowed inside raises at the end, instead of rolling back
            silently as in Django.
    """

    def __init__(
        self,
        transaction: Nestable,
        *,
        name: str | None = None,
        savepoint: bool = True,
        durable: bool = False,
        strict: bool = False,
    ) -> None:
        if name is not None:
            check_savepoint_name(name)
        self._transaction, self.name, self._is_strict = transaction, name, strict
        self.rollback_wanted = False
        self._atomic = Atomic(transaction.alias, savepoint, durable)
        self.task: asyncio.Task[Any] | None = None
        self.sid: str | None = None

    async def __aenter__(self) -> Self:
        transaction = self._transaction
        if self in transaction.levels:
            raise SessionStateError(
                f"this block of {transaction.alias!r} is entered already; begin another one in it"
            )
        self.task, self.rollback_wanted = asyncio.current_task(), False
        await transaction.run(self._enter)
        return self

    def _enter(self) -> None:
        """Create the savepoint; called in the bridge."""
        wrapper = self._transaction.wrapper
        wrapper.savepoint_named(self.name)
        try:
            self._atomic.__enter__()
        finally:
            wrapper.savepoint_named(None)
        self.sid = wrapper.savepoint_ids[-1] if wrapper.savepoint_ids else None
        self._transaction.open_block(self)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        transaction = self._transaction
        if self not in transaction.levels:
            return  # the whole transaction ended meanwhile
        if nothing_can_wait():
            transaction.abandon()
            return
        try:
            mark = await transaction.take_turn()
            try:
                transaction.levels.check_innermost(self, "end")
                await self._leave(exc)
            finally:
                transaction.leave_turn(mark)
        except SessionStateError:
            if exc is None:
                raise
            # What is on its way says more, and makes an outer end roll back.
            logger.warning("a block of %r was not left in order", transaction.alias, exc_info=True)
        except BaseException:
            # Cancelled while it waited for its turn: nothing of the transaction may be saved.
            if self in transaction.levels:
                transaction.lose_block(self)
            raise

    async def rollback(self) -> None:
        """Undo what was done since the block began; the block goes on.

        Raises:
            SessionStateError: the block has no savepoint, or is not the innermost one.
        """
        transaction = self._transaction
        mark = await transaction.take_turn()
        try:
            transaction.levels.check_innermost(self, "roll back")
            if self.sid is None:
                raise SessionStateError(
                    f"cannot roll back a block of {transaction.alias!r} that has no savepoint; "
                    "raise an error to roll back the outer one"
                )
            await transaction.call(transaction.send_rollback_to, (self.sid,))
            self.rollback_wanted = False
            await transaction.hooks.rolled_back(self)
        finally:
            transaction.leave_turn(mark)

    async def _leave(self, error: BaseException | None) -> None:
        transaction, hooks = self._transaction, self._transaction.hooks
        transaction.close_block()
        outer, self.task = transaction.levels.innermost, None
        if transaction.is_lost:
            hooks.pass_on(self, outer)
            return
        wrapper = transaction.wrapper
        cause, failed = wrapper.rollback_exc, error is not None or wrapper.needs_rollback
        wanted = self.rollback_wanted or wrapper.is_rollback_wanted
        if failed and self.sid is not None:
            await self._undo(error)
        else:
            # Without a savepoint, what was done is undone with the outer block, if at all.
            hooks.pass_on(self, outer)
            await transaction.call(self._exit, (error,))
        if failed and error is None and self._is_strict and not wanted:
            raise TransactionManagementError(
                f"an error in the nested block of {transaction.alias!r} was swallowed, so the "
                "block is rolled back; let the error leave the block"
            ) from cause

    async def _undo(self, error: BaseException | None) -> None:
        transaction = self._transaction
        try:
            await transaction.call_within(CLEANUP_BUDGET, lambda: self._exit(error))
        except Exception:
            if error is None:
                raise
            logger.exception("error ignored while rolling back a block of %r", transaction.alias)
        await transaction.hooks.rolled_back(self)

    def _exit(self, error: BaseException | None) -> None:
        """Release the savepoint, or roll back to it; called in the bridge."""
        self._atomic.__exit__(type(error) if error else None, error, None)
