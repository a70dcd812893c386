"""The statements of plans, and the ends of transactions that nothing else was in, sent below the
driver's cursor: no greenlet, and none of Django's code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionState
from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.plan import Plan
from django_asyncsession.signals import connection_leased

from .checkout import DEAD, Checkout, State
from .turn import inside


class Direct(Checkout):
    """A checkout that runs plans without the cursor, as long as nothing stands against it.

    A transaction that has begun so is taken over by Django's code as soon as sync code runs in it.
    """

    # It has begun on the server, and no code of Django's knows of that yet.
    _has_begun_directly = False
    # What a statement has failed the transaction with since.
    _direct_error: Exception | None = None
    _rollback_wanted = False

    async def fetch(
        self, plan: Plan, values: Sequence[Any], otherwise: Callable[..., list[Any]]
    ) -> list[Any]:
        """Run the statement of a plan: below the driver's cursor, or as `run` does.

        Args:
            plan: what to run.
            values: of its slots.
            otherwise: fetches the rows in the bridge; called with plan, values and alias.

        Returns:
            The rows, with the values that Django makes of theirs.

        Raises:
            Fallback: the plan is not for these values.
            As `run`.
        """
        if not self._may_be_direct:
            return await self.run(otherwise, plan, values, self.alias)
        turn, task = self.turn, asyncio.current_task()
        # What `check` asks, without a call of its own.
        may = self.state is State.OPEN and asyncio._get_running_loop() is self._loop
        if may and (self.owner is None or self.owner is task) and turn.take(task):  # type: ignore[arg-type]
            mark = inside.set((*inside.get(), turn.mark))
        else:
            mark = await self.take_turn()
        outer, self._running = self._running, task
        before = task.cancelling()  # type: ignore[union-attr]
        direct: Any = True
        try:
            lease = self.lease or await self._take()
            if (direct := self._way(lease.connection, plan)) is None:
                return await self.call(otherwise, (plan, values, self.alias))
            return await self._send(direct, lease.connection, plan, plan.encode(values))
        except Fallback:
            raise
        except BaseException as exc:
            # `call` has said what it means.
            if direct is not None:
                self._note_direct(exc)
                self._translate(exc, before)
            raise
        finally:
            self._running = outer
            # It keeps its exception, whose traceback keeps this frame.
            del task, outer
            # As `leave_turn`.
            with suppress(ValueError):
                inside.reset(mark)
            turn.leave()

    def _way(self, wrapper: BridgedMixin, plan: Plan) -> Any:
        """What runs the statement below the cursor; None where it has to be Django's code."""
        if self._direct_error or self._rollback_wanted or wrapper.needs_rollback:
            # It says so.
            return None
        if wrapper.in_atomic_block and wrapper.transaction_state is TransactionState.IDLE:
            # The driver sends BEGIN with the first statement that passes it.
            return None
        # Converters may be a project's own code, which may count on what the bridge gives.
        return wrapper.direct() if plan.convert is None else None

    def _note_direct(self, error: BaseException) -> None:
        """Note what has failed the transaction on the server; reading rows does not."""
        wrapper = self._wrapper
        if not self._has_begun_directly or wrapper is None or not isinstance(error, Exception):
            return
        if wrapper.transaction_state in DEAD:
            self._direct_error = error

    @property
    def _may_be_direct(self) -> bool:
        """Whether nothing has to be done with the connection before the first statement."""
        if self._entered or self._has_begun_directly:
            return True
        if self.snapshot is not None or connection_leased.receivers:
            return False
        return not (self.autocommit and self.options.given)

    async def _send(
        self, direct: Any, wrapper: BridgedMixin, plan: Plan, encoded: list[bytes | None]
    ) -> list[Any]:
        has_begun = self.autocommit or self._entered or self._has_begun_directly
        if (harmless := wrapper.is_harmless(plan.tables)) is None:
            # In a transaction that has begun, only what is known counts.
            is_first = self.autocommit or not has_begun
            harmless = is_first and await wrapper.learn_harmless(plan.tables)
        begin = None if has_begun else wrapper.begin_text(self.options)
        try:
            result = await direct.execute(plan.text, encoded, begin=begin, harmless=harmless)
        finally:
            if not has_begun:
                state = wrapper.transaction_state
                self._has_begun_directly = state is not TransactionState.IDLE
        if self._stopped_with is not None:
            # The cancelling that it was stopped by came too late.
            self._take_stop()
        rows: list[Any] = direct.rows(result)
        return rows

    async def _end_directly(self, direct: Any, wrapper: BridgedMixin, text: bytes) -> None:
        """End the transaction that has begun so; the reset goes along, if there is to be one."""
        task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        try:
            await direct.simple(text, reset=True)
        except BaseException as exc:
            self._translate(exc, before)
            raise
        finally:
            self._has_begun_directly, self._direct_error = False, None
            # It keeps its exception, whose traceback keeps this frame.
            del task
        wrapper.commit_confirmed = text == b"COMMIT"
