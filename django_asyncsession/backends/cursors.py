"""Cursors of Django's that tell their wrapper what they send, and die with their lease."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from django.db.backends.utils import CursorWrapper
from django.db.utils import DatabaseErrorWrapper, Error
from greenlet import getcurrent

from django_asyncsession.exceptions import SessionClosedError
from django_asyncsession.observe.slow import Timed, Watch

# What reads the rows of a statement.
FETCHES = frozenset({"fetchone", "fetchmany", "fetchall", "nextset"})


class SeenCursorMixin(CursorWrapper if TYPE_CHECKING else object):  # type: ignore[misc]
    """A Django cursor that tells the wrapper what it sends, after the execute wrappers, which may
    have changed it. What a driver sends meanwhile is known."""

    # The wrapper, which makes its cursors such ones.
    db: Any
    # The statement that it sent last, while something watches.
    timed: Timed

    def _execute(self, sql: Any, params: Any, *context: Any) -> Any:
        db = self.db
        db.note_statement(sql)
        if db._opening and not db.own_use:
            db.note_set_up(sql, params)
        outer, db.own_use = db.own_use, True
        try:
            if Watch.is_on:
                self.timed = Timed(db, sql)
                return self.timed.run(super()._execute, sql, params, *context)
            return super()._execute(sql, params, *context)
        finally:
            db.own_use = outer

    def _executemany(self, sql: Any, param_list: Any, *context: Any) -> Any:
        db = self.db
        db.note_statement(sql)
        db.touched = db.touched or db._opening
        outer, db.own_use = db.own_use, True
        try:
            if Watch.is_on:
                self.timed = Timed(db, sql)
                return self.timed.run(super()._executemany, sql, param_list, *context)
            return super()._executemany(sql, param_list, *context)
        finally:
            db.own_use = outer

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        self.db.note_unseen("CALL")
        if Watch.is_on:
            self.timed = Timed(self.db, f"CALL {args[0] if args else kwargs.get('procname')}")
            return self.timed.run(partial(super().callproc, *args, **kwargs))
        return super().callproc(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if Watch.is_on and name in FETCHES and (timed := self.__dict__.get("timed")) is not None:
            return partial(timed.run, found)
        return found

    def __iter__(self) -> Iterator[Any]:
        rows: Iterator[Any] = super().__iter__()
        timed = self.__dict__.get("timed") if Watch.is_on else None
        return rows if timed is None else timed.each(rows)


class WatchedCursorMixin(SeenCursorMixin):
    """A Django cursor that dies with the lease it was made under."""

    lease: object

    def __getattr__(self, name: str) -> Any:
        if name == "close" and self.__dict__.get("lease") is not self.db.lease:
            # What was given back is closed; code that unwinds must not trip over that.
            return _nothing
        if self.__dict__.get("lease") is not self.db.lease:
            self._check_lease()
        return super().__getattr__(name)

    def __iter__(self) -> Iterator[Any]:
        self._check_lease()
        return iter(super().__iter__())

    def execute(self, sql: Any, params: Any = None) -> Any:
        if self.__dict__.get("lease") is not self.db.lease:
            self._check_lease()
        return super().execute(sql, params)

    def executemany(self, sql: Any, param_list: Any) -> Any:
        self._check_lease()
        return super().executemany(sql, param_list)

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        self._check_lease()
        return super().callproc(*args, **kwargs)

    def close(self) -> None:
        # A generator that is dropped closes its cursor wherever that happens, where nothing can be
        # awaited: the cursor ends with its transaction anyway.
        db = self.db
        if (
            self.__dict__.get("lease") is db.lease
            and db.caller is not None
            and db.caller() is getcurrent()
        ):
            # Of a cursor on the server it is a statement. Django leaves it unwrapped.
            with db.wrap_database_errors:
                self.cursor.close()
        else:
            db.forget_cursor(self)

    def _check_lease(self) -> None:
        if self.__dict__.get("lease") is not self.db.lease:
            raise SessionClosedError(
                f"a cursor of {self.db.alias!r} is used after its session gave the connection "
                "back; "
                "fetch the rows before the session ends"
            )


class Errors(DatabaseErrorWrapper):
    """Django's translation of the driver's errors, without the reference cycle that it makes.

    The frame that raises the error has it as a local, and so keeps it, with every frame that it
    passes through (and a request's session) until the garbage collector runs.
    """

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        if exc_type is None:
            return
        try:
            super().__exit__(exc_type, exc_value, traceback)
        except Error as error:
            assert error.__traceback__ is not None and error.__traceback__.tb_next is not None
            error.__traceback__.tb_next.tb_frame.clear()
            raise


def _nothing() -> None:
    pass


def _fetch(name: str) -> Callable[..., Any]:
    """A method that fetches, without the three functions that Django looks for it with."""

    def fetch(self: Any, *args: Any) -> Any:
        db = self.db
        if self.__dict__.get("lease") is not db.lease or Watch.is_on:
            return self.__getattr__(name)(*args)
        with db.wrap_database_errors:
            return getattr(self.cursor, name)(*args)

    return fetch


@cache
def watched(cursor_class: Any) -> type:
    """The class of a cursor of Django's, or a tool's, that dies with the lease it is made under."""
    # A tool's own methods are left to it.
    missing = [
        name for name in ("fetchone", "fetchmany", "fetchall") if not hasattr(cursor_class, name)
    ]
    methods = {name: _fetch(name) for name in missing}
    return type(f"Watched{cursor_class.__name__}", (WatchedCursorMixin, cursor_class), methods)
