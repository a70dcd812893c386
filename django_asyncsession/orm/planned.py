"""How queries run on plans: recorded beside the QuerySet, found again, proved, and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from django.db import connections
from django.db.models import F, Model, Q

from django_asyncsession.conf import settings
from django_asyncsession.plans import cache as caches
from django_asyncsession.plans import compare
from django_asyncsession.plans.cache import Cache, Entry
from django_asyncsession.plans.fallback import REASONS, Fallback
from django_asyncsession.plans.plan import Ending, Plan
from django_asyncsession.plans.probes import refilled
from django_asyncsession.plans.shapes import (
    Key,
    Shape,
    filter_key,
    is_padded,
    names_key,
    order_key,
    replay,
    slot_kinds,
    value_key,
)

from . import snapshots
from .columns import Column, Condition

# Conditions that are a `Q` and nothing else.
_CONDITIONS: Final = frozenset({Q, Condition})
_BY_PK: Final = ("order_by", ("pk",))


# The statement


def fetch(plan: Plan, values: Sequence[Any], using: str) -> list[Any]:
    """Run a plan and return its rows as tuples, with the values that Django makes of theirs; called
    in the bridge. The one place that sends what a plan says.

    Raises:
        Fallback: the connection is to another kind of database.
        Django's database errors.
    """
    connection = connections[using]
    if connection.vendor != plan.vendor:
        raise Fallback("database")
    with connection.cursor() as cursor:
        cursor.execute(plan.sql, plan.params(values, connection))
        rows = cast("list[Any]", cursor.fetchall())
    return rows if plan.convert is None else plan.convert(rows, connection)


def _raw(plan: Plan, values: Sequence[Any], connection: Any) -> Sequence[Any]:
    with connection.cursor() as cursor:
        cursor.execute(plan.sql, plan.params(values, connection))
        rows: Sequence[Any] = cursor.fetchall()
        return rows


# What is recorded


def _filter(args: Any, kwargs: Any, slots: list[Any]) -> Key:
    return filter_key(args, kwargs, slots, _CONDITIONS)


def _order(args: Any, kwargs: Any, slots: list[Any]) -> Key:
    return (order_key(args, _path),)


def _path(column: Any) -> str | None:
    if isinstance(column, Column):
        return None if column._splits else column._path
    named: Any = column
    return named.name if type(column) is F else None


def _names(args: Any, kwargs: Any, slots: list[Any]) -> Key:
    if kwargs:
        raise Fallback("expression")
    return (names_key(args),)


def _relations(args: Any, kwargs: Any, slots: list[Any]) -> Key:
    if not args:
        # Newer versions of Django warn of it each time.
        raise Fallback("step")
    return (names_key(args),)


def _values_list(args: Any, kwargs: Any, slots: list[Any]) -> Key:
    return names_key(args), bool(kwargs["flat"]), bool(kwargs["named"])


def _distinct(args: Any, kwargs: Any, slots: list[Any]) -> Key:
    if args:
        raise Fallback("step")
    return ((),)


_STEPS: Final[dict[str, Callable[[Any, Any, list[Any]], Key]]] = {
    "filter": _filter,
    "exclude": _filter,
    "order_by": _order,
    "select_related": _relations,
    "only": _names,
    "defer": _names,
    "values": _names,
    "values_list": _values_list,
    "distinct": _distinct,
}


class Recording:
    """The shape of a query and its values, which are never changed.

    Args:
        model: whose rows they are.
        cache: the plans of its alias.
        root: where the shapes of the model begin.
    """

    __slots__ = ("cache", "model", "path", "root", "shape", "slots", "strict")

    def __init__(self, model: type[Model], cache: Cache, root: Shape):
        self.model, self.cache, self.root = model, cache, root
        self.shape: Shape | None = root
        self.path: tuple[Key, ...] = ()
        self.slots: tuple[Any, ...] = ()
        self.strict = settings.PLANS == "compare"

    def then(self, method: str, args: Any = (), kwargs: Any = None) -> Recording:
        """With one more step, a method of Django's QuerySet.

        Raises:
            Fallback: it has no shape.
        """
        if (record := _STEPS.get(method)) is None:
            raise Fallback("step")
        slots: list[Any] = []
        key = (method, *record(args, kwargs or {}, slots))
        return self.at(key, slots)

    def at(self, key: Key, slots: Sequence[Any] = ()) -> Recording:
        """With one more step, of which the key and the values are known."""
        new = object.__new__(Recording)
        new.model, new.cache, new.root, new.strict = self.model, self.cache, self.root, self.strict
        new.shape = None if self.shape is None else self.shape.children.get(key)
        new.path, new.slots = (*self.path, key), (*self.slots, *slots)
        return new

    @property
    def is_known(self) -> bool:
        """Whether a plan has shown that Django takes all steps, whatever the values are: then no
        QuerySet needs to be built to hear of errors."""
        return self.shape is not None and self.shape.good

    @property
    def is_ordered(self) -> bool:
        """Whether its rows come in an order, as a QuerySet says it."""
        for method, *names in reversed(self.path):
            if method == "order_by":
                return bool(names[0])
        return bool(self.model._meta.ordering)

    @property
    def gives_rows(self) -> bool:
        """Whether it gives rows of the model, not values of them."""
        return not any(step[0] in ("values", "values_list") for step in self.path)

    def by_pk(self) -> Recording:
        """In the order of the primary key."""
        return self.at(_BY_PK)

    def base(self) -> Any:
        """The model's rows, without any step."""
        return snapshots.on(self.model._default_manager, self.cache.alias)

    def queryset(self) -> Any:
        """The QuerySet that it is."""
        return replay(self.base(), self.path, self.slots)

    def find(self, ending: Ending) -> Entry | None:
        """The entry whose plan is to be run; None is a miss.

        Raises:
            Fallback: there is none for these values.
        """
        if self.shape is None:
            # A plan may have been made since.
            self.shape = self.root.at(self.path)
        return self.cache.find(self.shape, ending, self.slots)

    def learn(self, ending: Ending) -> Entry:
        """Make the plan; called in the bridge."""
        connection = connections[self.cache.alias]

        def compile_with(values: Sequence[Any]) -> compare.Compiled:
            queryset = replay(self.base(), self.path, values)
            return compare.compiled(queryset, ending, connection)

        return self.cache.learn(
            self.root,
            self.path,
            ending,
            compile_with,
            slot_kinds(self.path),
            connection,
            snapshots.MARKS,
        )


def begin(model: type[Model], using: str) -> Recording:
    """The recording of all rows of a model.

    Raises:
        Fallback: they have no plans.
    """
    cache = caches.of(using)
    return Recording(model, cache, cache.begin(model))


def by_key(model: type[Model], pk: Any, using: str) -> Recording:
    """The recording of the row with this primary key, asked for as `QuerySet.get` does.

    Raises:
        Fallback: it has no plan.
    """
    slots: list[Any] = []
    kind = value_key("pk", pk, slots)
    if type(kind) is not type:
        raise Fallback("value_type")
    return begin(model, using).at(("filter", (), (("pk", kind),)), slots).at(("order_by", ()))


#: What `QuerySet.get` asks for.
ONE_ROW: Final = Ending(stop=21)


# Running


def proved(entry: Entry | None, recording: Recording) -> Plan | None:
    """The plan, if it can be run without Django's compiler."""
    return None if entry is None or recording.strict else entry.proved


def count(using: str, reason: str) -> None:
    """One more query went Django's way, for this reason."""
    caches.of(using).count(reason)


def run_here(
    recording: Recording,
    entry: Entry | None,
    ending: Ending,
    queryset: Callable[[], Any],
    django: Callable[[], Any],
    shaped: Callable[[list[Any]], list[Any]],
    finish: Callable[[Any], Any],
) -> Any:
    """Run a query without a plan, or with one that is to be proved; called in the bridge.

    Args:
        queryset: gives the QuerySet that the query is, but for what is asked of it in the end.
        django: runs it Django's way.
        shaped: makes the result of a list of what a QuerySet gives.
        finish: makes of the result of a plan what `django` would return.

    Raises:
        AssertionError: in the mode "compare", Django's compiler gives something else.
    """
    if entry is None:
        result = django()
        recording.learn(ending)
        return result
    try:
        problem, found = _proved(recording, entry, ending, queryset, shaped)
    except Fallback as fallback:
        problem, found = f"Django would send nothing, because {fallback}", None
    if problem is None:
        entry.proofs += 1
        return finish(found)
    recording.cache.throw_out(entry, "its statement" if found is None else "what it gives")
    if recording.strict:
        raise AssertionError(f"a plan differs from Django: {problem}")
    return django() if found is None else finish(found)


def _proved(
    recording: Recording,
    entry: Entry,
    ending: Ending,
    queryset: Callable[[], Any],
    shaped: Callable[[list[Any]], list[Any]],
) -> tuple[str | None, Any]:
    """What Django does differently, if anything, and the result to return, if it was fetched."""
    plan, connection = cast(Plan, entry.plan), connections[recording.cache.alias]
    kinds, values = slot_kinds(recording.path), recording.slots
    meant = queryset()
    if is_padded(kinds, values):
        # Django writes each value of a list once.
        values = tuple(refilled(kinds, values))
        meant = replay(recording.base(), recording.path, values)
    django = compare.compiled(meant, ending, connection)
    if (problem := compare.difference_of_texts(plan, values, django)) is not None:
        return problem, None
    rows = _raw(plan, recording.slots, connection)
    mine = plan.build(plan.converted(rows, connection), connection.alias)
    if ending.kind != "rows":
        theirs = compare.single_by_django(django, ending, rows)
        return compare.difference(mine, theirs), theirs
    theirs = list(shaped(compare.built_by_django(django, rows)))
    return compare.difference(mine, theirs), theirs


def why(recording: Recording | None, reason: str, ending: Ending) -> str:
    """Whether a query runs on a plan, and if not, why, as a sentence."""
    if recording is not None:
        shape = recording.shape or recording.root.at(recording.path)
        entry = None if shape is None else shape.ends.get(ending)
        if entry is None:
            return "Runs Django's way this time, and its plan is made then."
        if entry.plan is None:
            reason = entry.refusal or "error"
        else:
            try:
                entry.plan.check(recording.slots)
            except Fallback as fallback:
                reason = fallback.reason
            else:
                proving = "" if proved(entry, recording) else ", compared with Django's compiler"
                return f"Runs on a plan{proving}."
    return f"Runs Django's way ({reason}): {REASONS[reason]}."
