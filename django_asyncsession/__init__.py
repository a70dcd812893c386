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
    from .consumers import SessionConsumer as SessionConsumer
    from .decorators import background_session as background_session
    from .decorators import inject_session as inject_session
    from .exceptions import *  # noqa: F403
    from .interface import DatabaseInterface as DatabaseInterface
    from .interface import databases as databases
    from .management.base import AsyncCommand as AsyncCommand
    from .middleware import rollback_request as rollback_request
    from .native.routes import keep_thread as keep_thread
    from .orm.changes import DeleteQuery as DeleteQuery
    from .orm.changes import InsertQuery as InsertQuery
    from .orm.changes import UpdateQuery as UpdateQuery
    from .orm.changes import UpsertQuery as UpsertQuery
    from .orm.columns import Column as Column
    from .orm.columns import Condition as Condition
    from .orm.queries import SelectQuery as SelectQuery
    from .orm.saving import get_pk as get_pk
    from .orm.saving import to_dict as to_dict
    from .orm.tables import RowTable as RowTable
    from .orm.tables import table as table
    from .orm.writes import excluded as excluded
    from .results import BaseResultSet as BaseResultSet
    from .results import Row as Row
    from .session.session import Session as Session
    from .transactions.checkout import State as State
    from .transactions.transaction import Outcome as Outcome
    from .transactions.transaction import Transaction as Transaction

_MODULES = {
    "decorators": ("background_session", "inject_session"),
    "middleware": ("rollback_request",),
    "consumers": ("SessionConsumer",),
    "management.base": ("AsyncCommand",),
    "interface": ("DatabaseInterface", "databases"),
    "session.session": ("Session",),
    "transactions.checkout": ("State",),
    "transactions.transaction": ("Outcome", "Transaction"),
    "orm.tables": ("RowTable", "table"),
    "orm.columns": ("Column", "Condition"),
    "orm.queries": ("SelectQuery",),
    "orm.changes": ("DeleteQuery", "InsertQuery", "UpdateQuery", "UpsertQuery"),
    "orm.writes": ("excluded",),
    "orm.saving": ("get_pk", "to_dict"),
    "native.routes": ("keep_thread",),
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
