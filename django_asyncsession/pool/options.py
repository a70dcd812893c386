"""The sizes and times of a pool."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import ClassVar

from django_asyncsession.exceptions import (
    ConfigurationError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Options with psycopg_pool's names and meaning. Times are in seconds."""

    # Connections kept open although idle.
    min_size: int = 0
    # Connections at the most; None: as many as min_size, or 10 when that is not given either.
    max_size: int | None = None
    # How long a caller waits for a connection.
    timeout: float = 30.0
    # Callers that may wait at the same time; 0: no limit.
    max_waiting: int = 5000
    # A connection older than this is closed when it comes back.
    max_lifetime: float = 3600.0
    # A connection above min_size that was idle for this long is closed.
    max_idle: float = 600.0
    # How long the server may be unreachable before waiting callers are given the reason.
    reconnect_timeout: float = 300.0
    # Ask the connection whether it works before it is handed out.
    check: bool = False

    _KINDS: ClassVar[dict[str, type]] = {
        **dict.fromkeys(("min_size", "max_size", "max_waiting"), int),
        **dict.fromkeys(("timeout", "max_lifetime", "max_idle", "reconnect_timeout"), Real),
    }

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigurationError: a size or a time that cannot work.
        """
        if self.max_size is None:
            object.__setattr__(self, "max_size", self.min_size or 10)
        for name, kind in self._KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ConfigurationError(f"pool option {name} is {value!r}; give a number")
        for name in ("timeout", "max_lifetime", "max_idle", "reconnect_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"pool option {name} is {getattr(self, name)!r}; give seconds above 0, and "
                    "not infinite"
                )
        if self.min_size < 0 or self.max_waiting < 0 or self.limit < max(1, self.min_size):
            raise ConfigurationError(
                f"pool options min_size={self.min_size}, max_size={self.max_size}, "
                f"max_waiting={self.max_waiting} cannot work; need 0 <= min_size <= max_size, 1 "
                "<= max_size"
            )

    @property
    def limit(self) -> int:
        """`max_size` as a number."""
        assert self.max_size is not None
        return self.max_size


def check_seconds(name: str, seconds: float) -> None:
    """Refuse what is no time to wait for.

    Raises:
        ConfigurationError: it is below 0, infinite, or not a number.
    """
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(
            f"{name} is {seconds!r}; give seconds, 0 or more, and not infinite"
        )
