"""What the attributes of an object were when its connection had been opened, and how they are
brought back at the end of each lease."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from typing import Any

from django.utils.functional import cached_property

# What can be changed in place, and is compared and copied, down to any depth.
CONTAINERS = (dict, list, set, deque)
CACHED = (cached_property, functools.cached_property)
_MISSING = object()


class Attributes:
    """The attributes of an object, to be brought back.

    What a class computes once and keeps (a cached property) stays, unless something it may have
    been computed from was changed as well. Other objects are kept by identity: what is inside of
    them is theirs, but for helpers that belong to this object alone.

    Args:
        owner: the object; what of Django's refers to it by `connection` is its helper.
        kept: names that are no business of a lease.
        only: the names to bring back, of an object whose others are a driver's own affair.
    """

    def __init__(
        self,
        owner: Any,
        kept: frozenset[str] = frozenset(),
        *,
        only: frozenset[str] | None = None,
    ) -> None:
        self._class = type(owner)
        self._kept = kept
        self._plain: dict[str, Any] = {}
        # Each with a copy of what was in it.
        self._containers: dict[str, tuple[Any, Any]] = {}
        self._helpers: list[tuple[Any, Attributes]] = []
        state = vars(owner)
        for name in (state.keys() if only is None else state.keys() & only) - kept:
            value = state[name]
            if isinstance(value, CONTAINERS):
                self._containers[name] = value, copied(value)
            else:
                self._plain[name] = value
            if getattr(value, "connection", None) is owner:
                self._helpers.append((value, Attributes(value)))
        self._size = len(state) if only is None else None

    def restore(self, owner: Any) -> None:
        """Bring the attributes of the object back."""
        self._restore(owner, trusted=True)

    def _restore(self, owner: Any, trusted: bool) -> None:
        state = vars(owner)
        state.update(self._plain)
        for name, (value, right) in self._containers.items():
            found = state.get(name)
            try:
                same = bool(found == right)
            except Exception:
                # What a lease put there cannot even be compared.
                same = False
            if not same or found is not value:
                trusted = trusted and same
                state[name] = fresh = copied(right)
                self._containers[name] = fresh, right
        if self._size is not None and len(state) != self._size:
            trusted = self._settle_others(state, trusted)
        for helper, attributes in self._helpers:
            attributes._restore(helper, trusted)

    def _settle_others(self, state: dict[str, Any], trusted: bool) -> bool:
        """Decide on attributes that were not there; returns whether all of them were expected."""
        computed = []
        for name in state.keys() - self._kept - self._plain.keys() - self._containers.keys():
            default = inspect.getattr_static(self._class, name, _MISSING)
            if isinstance(default, CACHED):
                computed.append(name)
                continue
            if default is _MISSING or hasattr(default, "__get__"):
                del state[name]
                trusted = False
            elif isinstance(default, CONTAINERS):
                del state[name]
            else:
                # The class has a default, which from now on is written without a search.
                state[name] = self._plain[name] = default
        for name in computed:
            if trusted:
                self._plain[name] = state[name]
            else:
                del state[name]
        self._size = len(state)
        return trusted


def copied(value: Any) -> Any:
    """A copy of a container and of the containers in it; anything else is the same object."""
    if not isinstance(value, CONTAINERS):
        return value
    fresh: Any = copy.copy(value)
    if not isinstance(fresh, set):
        items = fresh.items() if isinstance(fresh, dict) else enumerate(fresh)
        for key, item in list(items):
            if isinstance(item, CONTAINERS):
                fresh[key] = copied(item)
    return fresh
