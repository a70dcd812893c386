"""Nested blocks of a transaction: savepoints, and `atomic()` without one."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from django.db.transaction import Atomic, TransactionManagementError

from .backends.base import BridgedMixin
from .statements import check_savepoint_name

if TYPE_CHECKING:
    from .transaction import Transaction


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
        transaction: Transaction,
        *,
        name: str | None = None,
        savepoint: bool = True,
        durable: bool = False,
        strict: bool = False,
    ) -> None:
        if name is not None:
            check_savepoint_name(name)
        self._transaction, self.name, self._strict = transaction, name, strict
        self._atomic = Atomic(transaction.alias, savepoint, durable)
        self.task: asyncio.Task[Any] | None = None
        self.sid: str | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.current_task()
        await self._transaction._enter_block(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._transaction._leave_block(self, exc)

    async def rollback(self) -> None:
        """Undo what was done since the block began; the block goes on.

        Raises:
            SessionStateError: the block has no savepoint, or is not the innermost one.
        """
        await self._transaction._rollback_block(self)

    def enter(self, wrapper: BridgedMixin) -> None:
        """Create the savepoint; called in the bridge."""
        wrapper.savepoint_named(self.name)
        try:
            self._atomic.__enter__()
        finally:
            wrapper.savepoint_named(None)
        self.sid = wrapper.savepoint_ids[-1] if wrapper.savepoint_ids else None

    def leave(self, wrapper: BridgedMixin, error: BaseException | None) -> None:
        """Release the savepoint, or roll back to it; called in the bridge.

        Raises:
            TransactionManagementError: an error inside the block was swallowed, and the block is
                strict.
        """
        swallowed = error is None and wrapper.needs_rollback and self._strict
        cause = wrapper.rollback_exc
        self._atomic.__exit__(type(error) if error else None, error, None)
        if swallowed:
            raise TransactionManagementError(
                f"an error in the nested block of {wrapper.alias!r} was swallowed, so the block "
                "is rolled back; "
                "let the error leave the block"
            ) from cause
