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

from .checkout import Checkout, State
from .turn import inside


class Direct(Checkout):
    """A checkout that runs plans without the cursor, as long as nothing stands against it.

    A transaction that has begun so is taken over by Django's code as soon as sync code runs in it.
    """

    # It has begun on the server, and no code of Django's knows of that yet.
    _has_begun_directly = False
    # What a statement has failed with since.
    _direct_error: Exception | None = None

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
        try:
            lease = self.lease or await self._take()
            direct = lease.connection.direct()
            if direct is None or self._direct_error or lease.connection.needs_rollback:
                return await self.call(otherwise, (plan, values, self.alias))
            return await self._send(direct, lease.connection, plan, plan.encode(values))
        except Fallback:
            raise
        except BaseException as exc:
            if self._has_begun_directly and isinstance(exc, Exception):
                self._direct_error = exc
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
        return rows if plan.convert is None else plan.convert(rows, wrapper)

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
