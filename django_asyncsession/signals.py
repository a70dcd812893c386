"""What the package tells whoever wants to know, as Django's signals."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import Any

from django.dispatch import Signal

from .exceptions import ConfigurationError


class SyncSignal(Signal):
    """A signal whose receivers are sync functions, as they run where Django's ORM does."""

    def connect(self, receiver: Any, *args: Any, **kwargs: Any) -> None:
        """As Django's.

        Raises:
            ConfigurationError: the receiver is a coroutine function.
        """
        if iscoroutinefunction(receiver):
            name = f"{receiver.__module__}.{receiver.__qualname__}"
            raise ConfigurationError(
                f"receiver {name} of connection_leased is a coroutine function; make it a plain "
                "function, whose SQL is awaited all the same"
            )
        super().connect(receiver, *args, **kwargs)


# Sent when a session, or a transaction, has got its connection and begun on it, before anything
# else runs there: for each transaction, and in autocommit mode for each statement.
# Arguments: connection (Django's wrapper), alias, session (None for the low-level transaction) and
# request (None outside of one). A receiver may run SQL; an error of it fails the transaction.
connection_leased = SyncSignal()
