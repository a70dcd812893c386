"""Who asked: the line of the caller outside this package, and the name of the task."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from weakref import ref

import asgiref
import django

# Frames that say nothing of who asked: this package's own, and those of `async with`.
_OURS = (str(Path(__file__).parent) + os.sep, contextlib.__file__)
# Those of who only runs the one who asked: the event loop, threads, Django, `python -m`.
_AROUND = (
    *_OURS,
    *(str(Path(str(m.__file__)).parent) + os.sep for m in (asyncio, asgiref, django)),
    threading.__file__,
    "<frozen ",
)
# Which files these are: asked of each frame on the way, so kept.
_says_nothing: dict[tuple[str, ...], dict[str, bool]] = {_OURS: {}, _AROUND: {}}


class Site(tuple[CodeType, int]):
    """A place in the code: `file:line in function` when it is shown, which most never are."""

    __slots__ = ()

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Site | None:
        """The first line of a function, of the one inside when it is decorated; None when it is
        not written in Python."""
        code = getattr(inspect.unwrap(function), "__code__", None)
        return None if code is None else cls((code, -1))

    def __str__(self) -> str:
        code, instruction = self
        line = next(
            (at for start, end, at in code.co_lines() if start <= instruction < end and at),
            code.co_firstlineno,
        )
        return f"{code.co_filename}:{line} in {code.co_name}"

    __repr__ = __str__


class RequestSite(str):
    """A request, or a connection that a consumer serves, where messages otherwise say where a
    session was made."""

    # Characters of a path that are shown.
    LONGEST = 200

    @classmethod
    def of(cls, method: object, path: str) -> RequestSite:
        """The words for a request: its method and its path, without the query."""
        return cls(f"request {method} {cls._shown(path)}")

    @classmethod
    def of_consumer(cls, name: str, scope: Mapping[str, Any]) -> RequestSite:
        """The words for what a consumer serves: its class and, if there is one, the path.

        Args:
            name: of the class.
            scope: the ASGI scope.
        """
        path = scope.get("path")
        return cls(f"consumer {name}" + (f" at {cls._shown(path)}" if path else ""))

    @classmethod
    def _shown(cls, path: str) -> str:
        return repr(path if len(path) <= cls.LONGEST else f"{path[: cls.LONGEST]}...")


def made(site: Site | str) -> str:
    """Where a session was made, or what for, as messages say it behind its name."""
    return f"for {site}" if isinstance(site, RequestSite) else f"made at {site}"


def creation_site() -> Site:
    """The nearest caller outside this package; one outside of asyncio and Django, if there is
    one."""
    here = nearest = sys._getframe(1)
    # Asked for each session and each lease: without a call for each step.
    ours, around = _says_nothing[_OURS], _says_nothing[_AROUND]
    frame: FrameType | None = here
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in ours:
            ours[file], around[file] = file.startswith(_OURS), file.startswith(_AROUND)
        if not ours[file]:
            if nearest is here:
                nearest = frame
            if not around[file]:
                return Site((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return Site((nearest.f_code, nearest.f_lasti))


def caller_of(
    frame: FrameType | None, ends: Collection[CodeType] = (), last: FrameType | None = None
) -> Site | CodeType | None:
    """The nearest caller, from this frame on, outside this package, asyncio and Django; None when
    there is none.

    Args:
        ends: functions that are given instead when they are nearer.
        last: the frame behind which there is no caller any more.
    """
    found = _outside(frame, _AROUND, ends, last)
    if found is None:
        return None
    return found.f_code if found.f_code in ends else Site((found.f_code, found.f_lasti))


def _outside(
    frame: FrameType | None,
    places: tuple[str, ...],
    ends: Collection[CodeType] = (),
    last: FrameType | None = None,
) -> FrameType | None:
    known = _says_nothing[places]
    while frame is not None and frame.f_code not in ends:
        file = frame.f_code.co_filename
        nothing = known.get(file)
        if nothing is None:
            nothing = known[file] = file.startswith(places)
        if not nothing:
            return frame
        frame = None if frame is last else frame.f_back
    return frame


def is_ours(code: CodeType) -> bool:
    """Whether it is code of this package, or runs the body of an `async with`."""
    return code.co_filename.startswith(_OURS)


def task_reference() -> Callable[[], asyncio.Task[Any] | None]:
    """The current task, which this does not keep alive; called, it gives None when there is none
    any more."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return (lambda: None) if task is None else ref(task)


def task_name() -> str:
    """Name of the current task, for messages."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return "no task" if task is None else task.get_name()


def loop_name(loop: asyncio.AbstractEventLoop | None) -> str:
    """An event loop as messages call it: the `repr` of two loops is often the same."""
    if loop is None:
        return "a thread without an event loop"
    state = "closed" if loop.is_closed() else "running" if loop.is_running() else "stopped"
    return f"the {state} event loop {type(loop).__name__} at {id(loop):#x}"
