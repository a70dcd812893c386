"""What all queries share: the session that runs them, and the conditions that choose rows."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, Self, TypeVar

from django.db.models import QuerySet

from django_asyncsession.plans.plan import Plan
from django_asyncsession.unread import Unread

from .columns import Column

T = TypeVar("T")


class OneConnection(Protocol):
    """One connection, for several calls."""

    async def run(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Runs plain sync Django code on the connection."""
        ...


class QuerySession(Protocol):
    """What queries need of a session."""

    @property
    def alias(self) -> str:
        """The Django alias of the database."""
        ...

    async def run_sync(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Runs plain sync Django code on the session's connection."""
        ...

    def fetch_plan(self, plan: Plan, values: Sequence[Any]) -> Coroutine[Any, Any, list[Any]]:
        """Runs the statement of a plan and gives its rows."""
        ...

    async def run_write(self, fn: Callable[..., T], /, *args: Any) -> T:
        """Runs code that writes rows, with a `Write` as its last argument."""
        ...

    def one_connection(self) -> AbstractAsyncContextManager[OneConnection]:
        """One connection for all calls of the block, also where each takes its own."""
        ...

    def unread(self, held: Any) -> Unread:
        """What gives back what `hold` gave, when a stream of it is left unread."""
        ...


def _condition(given: Any) -> Any:
    """What Django takes as a condition.

    Raises:
        TypeError: it is none, such as the bool that comparing attributes of a model class gives.
    """
    if isinstance(given, Column):
        return given._condition()
    if isinstance(given, bool) or not getattr(given, "conditional", False):
        raise TypeError(
            f"{given!r} is not a condition; compare columns of table(Model), not of the model class"
        )
    return given


class _Query:
    """What all queries share: they belong to a session, and each method makes a new one."""

    def __init__(self, session: QuerySession):
        self._session = session

    def _with(self, **changes: Any) -> Self:
        # What copy.copy() does, in a tenth of its time.
        clone = object.__new__(type(self))
        clone.__dict__ = {**self.__dict__, **changes}
        return clone

    async def run(self) -> Any:
        """Runs the query, as awaiting it does."""
        raise NotImplementedError

    def __await__(self) -> Generator[Any, None, Any]:
        return self.run().__await__()


class _Filtered(_Query):
    """A query on rows of one table that conditions choose."""

    _given: QuerySet[Any] | None = None

    def _start(self, source: Any) -> QuerySet[Any]:
        raise NotImplementedError

    def __call__(self, source: Any) -> Any:
        return self._with(_given=self._start(source))

    def from_(self, source: Any) -> Any:
        """The query on this table: asyncqlio's other way to say it."""
        return self(source)

    def set_table(self, source: Any) -> Any:
        """`from_`, under asyncqlio's other name."""
        return self(source)

    @property
    def _queryset(self) -> QuerySet[Any]:
        if self._given is None:
            raise TypeError(f"{type(self).__name__} has no table yet; give it a model or row table")
        return self._given

    def where(self, *conditions: Any, **lookups: Any) -> Self:
        """Only rows for which all conditions and Django lookups (`name__startswith="h"`) hold.

        Raises:
            TypeError: something given is not a condition.
        """
        return self._with(_given=self._queryset.filter(*map(_condition, conditions), **lookups))

    def exclude(self, *conditions: Any, **lookups: Any) -> Self:
        """Not the rows for which all conditions hold; Django's `exclude`."""
        return self._with(_given=self._queryset.exclude(*map(_condition, conditions), **lookups))

    def add_condition(self, condition: Any) -> Self:
        """`where`, under asyncqlio's name."""
        return self.where(condition)
