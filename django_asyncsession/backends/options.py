"""What holds for one transaction, and what the driver knows of its state."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import ClassVar

from django_asyncsession.exceptions import ConfigurationError


class TransactionState(enum.Enum):
    """What the driver knows of the transaction on the server."""

    IDLE = "idle"
    ACTIVE = "in transaction"
    FAILED = "in a failed transaction"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class TransactionOptions:
    """What holds for one transaction, and is gone with it. Times are in seconds; None leaves the
    default."""

    isolation: str | None = None
    read_only: bool | None = None
    deferrable: bool | None = None
    timeout: float | None = None
    lock_timeout: float | None = None
    idle_timeout: float | None = None

    LEVELS: ClassVar = ("read uncommitted", "read committed", "repeatable read", "serializable")

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: an unknown isolation level, or a time that is not a positive number.
        """
        if self.isolation is not None:
            level = self.isolation.replace("_", " ").lower()
            if level not in self.LEVELS:
                raise ConfigurationError(
                    f"unknown isolation level {self.isolation!r}; use one of {list(self.LEVELS)}"
                )
            object.__setattr__(self, "isolation", level)
        for name in ("timeout", "lock_timeout", "idle_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ConfigurationError(f"{name} is {seconds!r}; give seconds above 0, or None")

    @property
    def given(self) -> bool:
        """Whether any option differs from the database's default."""
        return self is not NO_OPTIONS and self != NO_OPTIONS


# Those of most transactions.
NO_OPTIONS = TransactionOptions()
