"""Django's ORM, natively async: sessions, transactions and queries on pooled connections, without
threads.

The public names are resolved when they are first used, so that importing the package imports
nothing of Django.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .columns import Column as Column
    from .columns import Condition as Condition
    from .consumers import SessionConsumer as SessionConsumer
    from .decorators import background_session as background_session
    from .decorators import inject_session as inject_session
    from .exceptions import *  # noqa: F403
    from .interface import DatabaseInterface as DatabaseInterface
    from .interface import databases as databases
    from .management.base import AsyncCommand as AsyncCommand
    from .middleware import rollback_request as rollback_request
    from .queries import DeleteQuery as DeleteQuery
    from .queries import InsertQuery as InsertQuery
    from .queries import SelectQuery as SelectQuery
    from .queries import UpdateQuery as UpdateQuery
    from .queries import UpsertQuery as UpsertQuery
    from .results import BaseResultSet as BaseResultSet
    from .results import Row as Row
    from .routes import keep_thread as keep_thread
    from .rows import get_pk as get_pk
    from .rows import to_dict as to_dict
    from .session import Session as Session
    from .tables import RowTable as RowTable
    from .tables import table as table
    from .transactions.checkout import State as State
    from .transactions.transaction import Outcome as Outcome
    from .transactions.transaction import Transaction as Transaction
    from .writes import excluded as excluded

_MODULES = {
    "decorators": ("background_session", "inject_session"),
    "middleware": ("rollback_request",),
    "consumers": ("SessionConsumer",),
    "management.base": ("AsyncCommand",),
    "interface": ("DatabaseInterface", "databases"),
    "session": ("Session",),
    "transactions.checkout": ("State",),
    "transactions.transaction": ("Outcome", "Transaction"),
    "tables": ("RowTable", "table"),
    "columns": ("Column", "Condition"),
    "queries": ("DeleteQuery", "InsertQuery", "SelectQuery", "UpdateQuery", "UpsertQuery"),
    "writes": ("excluded",),
    "rows": ("get_pk", "to_dict"),
    "routes": ("keep_thread",),
    "results": ("BaseResultSet", "Row"),
    "exceptions": (
        "AliasNotInSession",
        "AsyncSessionError",
        "BlockingCallError",
        "BridgeError",
        "CommitUnknown",
        "StreamTimeout",
        "ConfigurationError",
        "MultipleStatements",
        "NotLoadedError",
        "PoolClosed",
        "PoolError",
        "PoolTimeout",
        "QueryTimeout",
        "RowNotFound",
        "SessionClosedError",
        "SessionInUseError",
        "SessionStateError",
        "SyncContextError",
        "TooManyWaiting",
        "UnboundedQueryError",
        "UnknownAlias",
        "WrongLoopError",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
