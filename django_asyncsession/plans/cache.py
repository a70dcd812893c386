"""The plans of each alias: found by shape, learned when Django ran the query its way, bounded."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

from django.core.signals import setting_changed
from django.db.models import Field, Model, QuerySet, signals
from django.db.models.manager import BaseManager
from django.db.models.query import ModelIterable
from django.db.models.sql.compiler import SQLCompiler

from django_asyncsession.conf import settings

from .builders import Marks
from .fallback import Fallback
from .plan import Compiled, Ending, Plan, make_plan
from .shapes import FITS, Key, Shape

logger = logging.getLogger("django_asyncsession.plans")

#: Plans that an alias has at the most; the least recently used goes.
BOUND: Final = 1000
#: Real executions of a plan that are compared with Django's compiler.
PROOFS: Final = 2


class Entry:
    """What is known of a shape and what is asked of it: its plan, or why it has none."""

    __slots__ = ("ending", "is_held", "plan", "proofs", "refusal", "shape")

    def __init__(self, shape: Shape, ending: Ending, plan: Plan | None, refusal: str | None):
        self.shape, self.ending = shape, ending
        self.plan, self.refusal = plan, refusal
        #: How often a real execution was what Django's would have been.
        self.proofs = 0
        #: Whether it was not forgotten yet.
        self.is_held = True

    @property
    def proved(self) -> Plan | None:
        """The plan, if it can be run without Django's compiler."""
        return self.plan if self.proofs >= PROOFS else None


class Cache:
    """The plans of one alias.

    Args:
        alias: of the database.
        bound: plans at the most.
    """

    def __init__(self, alias: str, bound: int = BOUND) -> None:
        self.alias, self.bound = alias, bound
        self.hits = self.misses = 0
        self.fallbacks: Counter[str] = Counter()
        self._roots: dict[type[Model], Shape | str] = {}
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self._lock = threading.Lock()
        self._lookups: object = None
        # By model and type of the key: rows that are asked for by their primary key.
        self._by_key: dict[tuple[type[Model], type], Entry] = {}

    def __repr__(self) -> str:
        return f"<Cache {self.alias!r} {len(self)} plans, {self.hits} hits, {self.misses} misses>"

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, model: type[Model]) -> Shape:
        """The root of the shapes of a model's rows, as its default manager gives them.

        Raises:
            Fallback: the manager, or another package, has a way of its own.
        """
        self.check()
        root = self._roots.get(model)
        if root is None:
            root = self._roots[model] = _root(model)
        if type(root) is str:
            raise Fallback(root)
        return root  # type: ignore[return-value]

    def check(self) -> bool:
        """Refuse what no query with a plan may be run beside.

        Returns:
            Whether each plan is to be compared.

        Raises:
            Fallback: a setting, or another package, wants Django's way.
        """
        mode = settings.PLANS
        if mode is False:
            raise Fallback("off")
        if (lookups := Field.get_class_lookups()) is not self._lookups:
            # A lookup was registered, which may take the place of another one.
            self.clear()
            self._lookups = lookups
        for methods, name, original in _ORIGINALS:
            if methods[name] is not original:
                raise Fallback("patched")
        return mode is not True

    def by_key(self, model: type[Model], pk: Any) -> Plan | None:
        """The plan of the row with this primary key, by the shortest way; None when it has to be
        found by its shape.

        Raises:
            Fallback: this value has no plan.
        """
        compares = self.check()
        kind = type(pk)
        entry = self._by_key.get((model, kind))
        if entry is None or compares or not entry.is_held or entry.plan is None:
            return None
        if (fits := FITS[kind]) is not None:
            fits(pk)
        entry.plan.check((pk,))
        self.hits += 1
        if entry in self._entries:
            self._entries.move_to_end(entry)
        return entry.plan

    def keep_by_key(self, model: type[Model], kind: type, entry: Entry) -> None:
        """Let `by_key` find this entry, which is proved."""
        self._by_key[model, kind] = entry

    def _touch(self, entry: Entry) -> None:
        # In another thread it may be forgotten at this moment.
        with suppress(KeyError):
            self._entries.move_to_end(entry)

    def find(self, shape: Shape | None, ending: Ending, values: Sequence[Any]) -> Entry | None:
        """The entry with the plan to run; None is a miss: Django's way, and then `learn`.

        Raises:
            Fallback: these values, or this shape, have no plan.
        """
        entry: Entry | None = None if shape is None else shape.ends.get(ending)
        if entry is None:
            self.misses += 1
            return None
        if entry.plan is None:
            raise Fallback(entry.refusal or "error")
        entry.plan.check(values)
        self.hits += 1
        self._touch(entry)
        return entry

    def count(self, reason: str) -> None:
        """One more query went Django's way, for this reason."""
        self.fallbacks[reason] += 1

    def learn(
        self,
        root: Shape,
        path: Sequence[Key],
        ending: Ending,
        compile_with: Callable[[Sequence[Any]], Compiled],
        kinds: Sequence[tuple[type, int]],
        connection: Any,
        marks: Marks,
    ) -> Entry:
        """Make the plan of a shape that has none yet, in the bridge; what fails is noted too.

        Args:
            root: where the path begins.
            compile_with, kinds, connection, marks: as of `make_plan`.
        """
        found = root.at(path)
        if found is not None and (known := found.ends.get(ending)) is not None:
            return known  # type: ignore[no-any-return]
        plan, refusal = None, None
        try:
            plan = make_plan(compile_with, kinds, ending, connection, marks)
        except Fallback as fallback:
            refusal = fallback.reason
        except Exception:
            logger.warning("making a plan on %r failed", self.alias, exc_info=True)
            refusal = "error"
        return self._put(root, path, Entry(root, ending, plan, refusal))

    def _put(self, root: Shape, path: Iterable[Key], entry: Entry) -> Entry:
        with self._lock:
            entry.shape = root.grow(path)
            entry.shape.ends[entry.ending] = entry
            if entry.plan is not None:
                entry.shape.approve()
            self._entries[entry] = None
            while len(self._entries) > self.bound:
                self._forget(self._entries.popitem(last=False)[0])
        return entry

    def _forget(self, entry: Entry) -> None:
        entry.is_held = False
        entry.shape.ends.pop(entry.ending, None)
        entry.shape.prune()

    def throw_out(self, entry: Entry, what: str) -> None:
        """Never use this plan again: Django would have done something else.

        Args:
            what: is not Django's. No values: they do not belong in a log.
        """
        sql = None if entry.plan is None else entry.plan.sql
        logger.error(
            "a plan on %r is thrown out, and its queries run Django's way, because %s differs from "
            'Django\'s; with ASYNC_SESSION["PLANS"] = "compare" the error tells how; it was %s',
            self.alias,
            what,
            sql,
        )
        entry.plan, entry.refusal = None, "differs"

    def clear(self) -> None:
        """Forget all plans; what was counted stays."""
        with self._lock:
            for entry in list(self._entries):
                # A query that was made before knows the shape.
                entry.is_held = False
                entry.shape.ends.clear()
                entry.shape.good = False
                entry.shape.children.clear()
            self._entries.clear()
            self._roots.clear()
            self._by_key.clear()

    def stats(self) -> dict[str, int]:
        """The numbers by name, those of fallbacks with the reason's name behind."""
        numbers = {"plans": len(self), "plan_hits": self.hits, "plan_misses": self.misses}
        numbers["plan_fallbacks"] = sum(self.fallbacks.values())
        reasons = {f"plan_fallbacks_{name}": n for name, n in sorted(self.fallbacks.items())}
        return {**numbers, **reasons}


def _root(model: type[Model]) -> Shape | str:
    """Where the shapes of a model begin, or why it has none."""
    manager: Any = model._default_manager
    if not isinstance(manager, BaseManager) or "get_queryset" in vars(manager):
        return "manager"
    of_manager: Any = type(manager)
    of_queryset = of_manager._queryset_class
    if any(getattr(of_manager, name) is not getattr(BaseManager, name) for name in _MANAGED):
        return "manager"
    if of_queryset is not QuerySet and any(
        name in vars(cls)
        for cls in of_queryset.__mro__[: of_queryset.__mro__.index(QuerySet)]
        for name in _OWN_NAMES
    ):
        return "manager"
    return Shape()


_MANAGED: Final = ("get_queryset", "all", "db_manager", "__getattribute__")


class _Empty:
    """What every class has."""


#: What a QuerySet of Django's does; one that does any of it differently is asked itself.
_OWN_NAMES: Final = frozenset(vars(QuerySet)) - frozenset(vars(_Empty))

# Whoever has put something in their place wants to see or to change what they do.
_WATCHED: Final[tuple[tuple[Any, str], ...]] = (
    (SQLCompiler, "execute_sql"),
    (SQLCompiler, "as_sql"),
    (SQLCompiler, "results_iter"),
    (QuerySet, "_fetch_all"),
    (QuerySet, "_clone"),
    (QuerySet, "_filter_or_exclude"),
    (QuerySet, "count"),
    (QuerySet, "exists"),
    (QuerySet, "get"),
    (ModelIterable, "__iter__"),
)


def _is_django_s(cls: Any, name: str) -> bool:
    code = getattr(cls.__dict__.get(name), "__code__", None)
    return code is not None and code.co_filename.replace("\\", "/").split("/django/db/")[1:] != []


_ORIGINALS: Final = tuple(
    (cls.__dict__, name, cls.__dict__[name] if _is_django_s(cls, name) else None)
    for cls, name in _WATCHED
)


_caches: dict[str, Cache] = {}


def of(alias: str) -> Cache:
    """The plans of an alias."""
    found = _caches.get(alias)
    return _caches.setdefault(alias, Cache(alias)) if found is None else found


def clear_all(**kwargs: Any) -> None:
    """Forget all plans of all aliases: a setting or a model has changed."""
    for cache in list(_caches.values()):
        cache.clear()


setting_changed.connect(clear_all, dispatch_uid="django_asyncsession.plans")
signals.class_prepared.connect(clear_all, dispatch_uid="django_asyncsession.plans")
