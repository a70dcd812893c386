"""`threading.local` objects: the sync code of all sessions runs in one thread, and yet each session
finds in them only what its own code put there."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, ParamSpec, TypeVar

from . import bridge
from .conf import settings
from .exceptions import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")

# Packages that keep what belongs to a request in thread-locals: each module with the names in it.
# A class stands for its attributes, and those of its subclasses. Those of asgiref are contextual by
# themselves, and need no entry.
KNOWN: Final = {
    "allauth.account.auth_backends": ["_stash"],
    "auditlog.middleware": ["threadlocal"],
    "cacheops.invalidation": ["_no_invalidation"],
    "cacheops.query": ["_old_objs"],
    "cacheops.transaction": ["transaction_states"],
    "cachalot.cache": ["cachalot_caches"],
    "crum": ["_thread_locals"],
    "django_currentuser.middleware": ["_thread_locals"],
    "django_middleware_global_request.middleware": ["GlobalRequestStorage"],
    "django_multitenant.utils": ["_thread_locals"],
    "modeltranslation.thread_context": ["_mt_thread_context"],
    "mptt.models": ["MPTTModel"],
    "multisite.threadlocals": ["_thread_locals"],
    "pghistory.runtime": ["_tracker"],
    "pgtrigger.runtime": ["_ignore", "_schema"],
    "reversion.revisions": ["revision_context_manager"],
    "threadlocals.threadlocals": ["_threadlocals"],
}


class Contents:
    """What the sync code of one session has put into the thread-locals; empty at first.

    Calls of several tasks at the same time, as they are possible in autocommit mode, all begin with
    what was there before the first; what that one changes stays.
    """

    def __init__(self, given: Iterable[threading.local]) -> None:
        self._locals = tuple(given)
        # While the session's code runs, what was there before it.
        self._values: list[dict[str, Any]] | None = None
        # Before the call that is under way, in this task.
        self._before: list[dict[str, Any]] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._joined = self
        self._inside = False

    def copy(self) -> Contents:
        """Others that begin with the same."""
        of, other = self._joined, Contents(self._locals)
        other._values = _copied(of._values if of._task is None else of._before)
        return other

    def join(self, other: Contents) -> None:
        """From now on have those of a session that this one belongs to."""
        self._joined = other._joined

    def clear(self) -> None:
        """Be empty again, as the session has ended; not while a call goes on with these."""
        if self._joined is self and self._task is None:
            self._values = None

    def run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """As `bridge.run`, with these contents wherever `fn` runs.

        Raises:
            Whatever `fn` raises.
        """
        return self.run_with(None, fn, args, kwargs)

    async def run_with(
        self,
        wrapper: Any,
        fn: Callable[..., T],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        made_by: Callable[[Contents, Callable[..., Any]], bridge.Bridge] | None = None,
    ) -> T:
        """As `bridge.run_with`, with these contents wherever `fn` runs.

        Args:
            made_by: makes the greenlet, which puts the contents in place whenever it goes on.

        Raises:
            Whatever `fn` raises.
        """
        contents, task = self._joined, asyncio.current_task()
        if contents._task is task:
            # Inside a call, which waits for this one.
            made = partial(made_by or _Swapping, contents)
            return await bridge.run_with(wrapper, fn, args, kwargs, made_by=made)
        if contents._task is not None:
            contents = contents.copy()
        contents._task, contents._before = task, _copied(contents._values)
        try:
            made = partial(made_by or _Swapping, contents)
            return await bridge.run_with(wrapper, fn, args, kwargs, made_by=made)
        finally:
            contents._task = contents._before = None

    def go_on(self, switch: Callable[..., Any], *values: Any) -> Any:
        """Switch to code that finds these contents, and to what it calls in its own greenlet."""
        if self._inside:
            return switch(*values)
        self._exchange()
        self._inside = True
        try:
            return switch(*values)
        finally:
            self._inside = False
            self._exchange()
            # A traceback keeps this frame, which must not keep the greenlet.
            del switch, values

    def _exchange(self) -> None:
        """Put what is kept here into the thread-locals, and keep here what was in them."""
        if self._values is None:
            self._values = [_initial(local) for local in self._locals]
        for local, kept in zip(self._locals, self._values, strict=True):
            here = local.__dict__
            if here or kept:
                there = here.copy()
                here.clear()
                here.update(kept)
                kept.clear()
                kept.update(there)


def _copied(values: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    return None if values is None else [dict(each) for each in values]


def _initial(local: threading.local) -> dict[str, Any]:
    """What a thread finds that never used it: only a thread can tell what `__init__` puts there."""
    if type(local).__init__ is object.__init__:
        return {}
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(local.__dict__), name="thread-local")
    thread.start()
    thread.join()
    return found


class _Swapping(bridge.Bridge):
    """The greenlet of sync code that has contents of its own."""

    def __init__(self, contents: Contents, fn: Callable[..., Any]) -> None:
        super().__init__(fn)
        self._contents = contents

    def enter(self, *values: Any) -> Any:
        """Go on with the code."""
        return self._contents.go_on(self.switch, *values)

    def fail(self, error: Any) -> Any:
        """Go on with the code by raising an error in it."""
        return self._contents.go_on(self.throw, error)


def new() -> Contents | None:
    """Contents for a new session; None when there are no thread-locals to swap.

    Raises:
        ConfigurationError: THREAD_LOCALS has a name that leads to none.
    """
    if not _found.awaited and _found.awaited is not None:
        # Nothing can come any more.
        return Contents(_found.locals) if _found.locals else None
    found = _found.all()
    return Contents(found) if found else None


async def run_apart(wrapper: Any, fn: Callable[[], T]) -> T:
    """As `bridge.run_with`, for code that belongs to no session."""
    contents = new()
    return await (bridge if contents is None else contents).run_with(wrapper, fn)


class _Found:
    """The thread-locals that there are, looked up anew when modules have been imported."""

    def __init__(self) -> None:
        self.locals: tuple[threading.local, ...] = ()
        # Modules of installed packages that were not imported yet; None before the first look.
        self.awaited: list[str] | None = None
        self._modules = 0

    def all(self) -> tuple[threading.local, ...]:
        if self.awaited is None or (self.awaited and self._modules != len(sys.modules)):
            self._look()
        return self.locals

    def forget(self) -> None:
        self.awaited = None

    def _look(self) -> None:
        locals_ = [local for name in settings.THREAD_LOCALS for local in named(name)]
        locals_ += known()
        self._modules = len(sys.modules)
        self.awaited = [name for name in KNOWN if _is_awaited(name)]
        self.locals = tuple({id(local): local for local in locals_}.values())


_found = _Found()


def _is_awaited(module: str) -> bool:
    return module not in sys.modules and find_spec(module.partition(".")[0]) is not None


def follow_settings(setting: str = "ASYNC_SESSION", **kwargs: Any) -> None:
    """Look the names up anew; called when a test changes the settings."""
    if setting in ("ASYNC_SESSION", "INSTALLED_APPS"):
        _found.forget()


def named(name: str) -> list[threading.local]:
    """The thread-locals that a dotted name means: itself, or what is in an object or class.

    Raises:
        ConfigurationError: there is no such object, or no thread-local in it.
    """
    value = _object(name)
    found = list(_in(value))
    if not found and not _is_contextual(value):
        raise ConfigurationError(
            f'ASYNC_SESSION["THREAD_LOCALS"] names {name!r}, which is {type(value).__name__} and '
            "holds no threading.local; name the object itself"
        )
    return found


def _object(name: str) -> Any:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            value: Any = import_module(module)
        except ImportError as exc:
            if exc.name is not None and f"{module}.".startswith(f"{exc.name}."):
                continue
            raise ConfigurationError(
                f'ASYNC_SESSION["THREAD_LOCALS"] names {name!r}, whose module cannot be imported: '
                f"{exc}"
            ) from exc
        try:
            for part in parts[length:]:
                value = getattr(value, part)
        except AttributeError:
            break
        return value
    raise ConfigurationError(
        f'ASYNC_SESSION["THREAD_LOCALS"] names {name!r}, which does not exist; give the module and '
        "the name in it"
    )


def _in(value: Any) -> Iterator[threading.local]:
    """The value, or what is in its attributes; of a class those of its subclasses too."""
    if _is_local(value):
        yield value
        return
    kind = value if issubclass(type(value), type) else type(value)
    for attributes in (getattr(value, "__dict__", {}), vars(kind)):
        yield from filter(_is_local, list(attributes.values()))
    if value is kind:
        for subclass in kind.__subclasses__():
            yield from _in(subclass)


def _is_local(value: Any) -> bool:
    # isinstance() would ask a lazy object for its class, and so evaluate it.
    return issubclass(type(value), threading.local)


def _is_contextual(value: Any) -> bool:
    """Whether each task has contents of its own anyway: asgiref's `Local`, a context variable."""
    return type(value).__module__ in ("asgiref.local", "_contextvars")


def known() -> list[threading.local]:
    """Those of known packages that are imported."""
    return [
        local
        for module, names in KNOWN.items()
        if module in sys.modules
        for name in names
        for local in _in(getattr(sys.modules[module], name, None))
    ]


def unlisted(packages: Iterable[str]) -> list[str]:
    """Names of the thread-locals in the imported modules of these packages that are not swapped."""
    listed = {id(local) for local in _found.all()}
    found: dict[int, str] = {}
    for package in sorted(packages):
        for module in sorted(sys.modules):
            if module == package or module.startswith(f"{package}."):
                for name, local in _in_module(module, package):
                    if id(local) not in listed:
                        found.setdefault(id(local), name)
    return list(found.values())


def _in_module(module: str, package: str) -> Iterator[tuple[str, threading.local]]:
    for name, value in list(getattr(sys.modules[module], "__dict__", {}).items()):
        kind = value if issubclass(type(value), type) else type(value)
        if _is_local(value):
            yield f"{module}.{name}", value
        elif str(getattr(kind, "__module__", "")).partition(".")[0] == package:
            for inner in (getattr(value, "__dict__", {}), vars(kind)):
                for attribute, local in list(inner.items()):
                    if _is_local(local):
                        yield f"{module}.{name}.{attribute}", local
