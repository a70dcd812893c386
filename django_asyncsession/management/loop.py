"""Runs the coroutine of a management command in an event loop of its own, until it ends or somebody
ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from django.core.management.base import BaseCommand, CommandError

from django_asyncsession import bridge
from django_asyncsession.exceptions import SyncContextError
from django_asyncsession.interface import databases
from django_asyncsession.scope import own_thread

T = TypeVar("T")
Main = Callable[[], Coroutine[Any, Any, T]]
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def run(command: BaseCommand, main: Main[T], loop_factory: LoopFactory | None = None) -> T:
    """Run the coroutine that `main` makes, then close the pools of its loop.

    On the command line, Ctrl-C and SIGTERM cancel it, and become an exit code without a traceback.
    In sync code that `session.run_sync` or native mode runs, the loop that runs already awaits it.

    Args:
        loop_factory: makes the event loop; None makes asyncio's.

    Raises:
        CommandError: it was cancelled on the command line.
        KeyboardInterrupt: it was cancelled by Ctrl-C elsewhere.
        SyncContextError: an event loop runs in this thread, which would stand still.
        Whatever the coroutine raises.
    """
    if bridge.in_bridge():
        return bridge.await_(main())
    _check_no_loop(command)
    is_process = command._called_from_command_line  # type: ignore[attr-defined]
    ended = _EndedBy()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_then_close(main, ended if is_process else None))
    except (KeyboardInterrupt, asyncio.CancelledError) as exc:
        if not is_process:
            raise
        raise CommandError("cancelled", returncode=128 + ended.signal) from exc


def _check_no_loop(command: BaseCommand) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    name = type(command).__module__.rpartition(".")[2]
    raise SyncContextError(
        f"the command {name!r} runs an event loop of its own, and one runs in this thread already; "
        f"await sync_to_async(call_command)({name!r}), or session.run_sync(call_command, {name!r})"
    )


async def _then_close(main: Main[T], ended: _EndedBy | None) -> T:
    if ended is not None:
        ended.watch()
    try:
        # When sync_to_async() runs the command, its one thread is taken by the command itself.
        with own_thread():
            return await main()
    finally:
        await databases.close_all()


class _EndedBy:
    """Which signal ended the process, as far as is known: asyncio itself takes care of SIGINT."""

    signal: int = signal.SIGINT

    def watch(self) -> None:
        """Let SIGTERM, too, cancel the current task, so that what it does is rolled back."""
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            # Not on Windows, and not in a thread.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._cancel, task)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        self.signal = signal.SIGTERM
        task.cancel()
