"""The one place that answers what `django.db.connections[alias]` is: it asks the running call."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from django.db import connections
from greenlet import getcurrent

from .backends.base import BridgedMixin
from .backends.engines import missing, refusing, wrapper_class
from .bridge import Bridge, in_bridge
from .exceptions import ConfigurationError


class Connections(type(connections)):  # type: ignore[misc]
    """`django.db.connections`: in sync code that a session runs it gives that session's connection,
    and everywhere else what Django gives."""

    # Given to every thread and task that has none of its own, by alias.
    shared: Mapping[str, Any] = MappingProxyType({})

    def __getitem__(self, alias: str) -> Any:
        """The connection of an alias."""
        call = getcurrent()
        if isinstance(call, Bridge):
            if (wrapper := call.wrapper) is None:
                wrapper = call.connection(alias)
            elif wrapper.alias != alias:
                wrapper = _stand_in(wrapper, alias)
            if wrapper is not None:
                return wrapper
        if self.shared and alias in self.shared:
            return getattr(self._connections, alias, self.shared[alias])
        return super().__getitem__(alias)

    def create_connection(self, alias: str) -> Any:
        """A new connection of an alias; one that refuses to connect, and says which driver to
        install, when its engine cannot be imported."""
        try:
            return wrapper_class(self.settings[alias]["ENGINE"])(self.settings[alias], alias)
        except ConfigurationError as error:
            return missing(self.settings[alias], alias, error)

    def __delitem__(self, alias: str) -> None:
        """Forget the connection of an alias; a session's is not Django's to forget."""
        if not in_bridge():
            super().__delitem__(alias)

    def all(self, initialized_only: bool = False) -> list[Any]:
        """All connections. Those of sessions are not among the initialized ones, which Django
        closes, and whose list of queries it empties, when a request begins and ends."""
        if initialized_only and in_bridge():
            return []
        return [
            self[alias]
            for alias in self
            if not initialized_only or alias in self.shared or hasattr(self._connections, alias)
        ]


def _stand_in(wrapper: BridgedMixin, alias: str) -> Any:
    """What stands for another alias in the call that `wrapper` is given to; None for one that
    DATABASES does not have. It is of one lease, as code may set attributes there too."""
    if alias not in connections.settings:
        return None
    if wrapper.stand_ins is None:
        wrapper.stand_ins = {}
    if alias not in wrapper.stand_ins:
        wrapper.stand_ins[alias] = refusing(alias)
    return wrapper.stand_ins[alias]


def install() -> None:
    """Let Django's own `connections` ask the running call; called once, when Django starts."""
    if not isinstance(connections, Connections):
        connections.__class__ = Connections
