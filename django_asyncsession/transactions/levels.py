"""How deep a transaction is nested: its open blocks, and the savepoints made by name in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from django_asyncsession.exceptions import SessionStateError

B = TypeVar("B")


class Savepoint(NamedTuple):
    """A savepoint made by name: how deep in blocks, and which callbacks are older."""

    name: str
    depth: int
    mark: tuple[int, int]


class Levels(Generic[B]):
    """The blocks that are open, outermost first, and the savepoints made by name.

    Args:
        alias: what messages call the transaction.
    """

    def __init__(self, alias: str) -> None:
        self._alias = alias
        # Those that are open, outermost first.
        self.blocks: list[B] = []
        self.savepoints: list[Savepoint] = []

    def __len__(self) -> int:
        """How many blocks are open."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[B]:
        return iter(self.blocks)

    def __contains__(self, block: object) -> bool:
        return block in self.blocks

    @property
    def innermost(self) -> B | None:
        """The block that was opened last."""
        return self.blocks[-1] if self.blocks else None

    @property
    def is_flat(self) -> bool:
        """Whether there is neither a block nor a savepoint."""
        return not self.blocks and not self.savepoints

    def open(self, block: B) -> None:
        """A block begins."""
        self.blocks.append(block)

    def close(self) -> None:
        """The innermost block ends, and the savepoints in it."""
        self.blocks.pop()
        self.savepoints = [s for s in self.savepoints if s.depth <= len(self.blocks)]

    def lose(self, block: B) -> None:
        """A block could not be left in order: it and all inside it are gone."""
        del self.blocks[self.blocks.index(block) :]

    def clear(self) -> None:
        """The transaction ends."""
        self.blocks.clear()
        self.savepoints.clear()

    def check_innermost(self, block: B, what: str) -> None:
        """Refuse to do `what` with a block that others are open in.

        Raises:
            SessionStateError: it is not the innermost one.
        """
        if self.innermost is not block:
            raise SessionStateError(
                f"cannot {what} a block of {self._alias!r} that is not the innermost one; leave "
                "the inner one first"
            )

    def check_flat(self, what: str) -> None:
        """Refuse to do `what` in a block.

        Raises:
            SessionStateError: a block is open.
        """
        if self.blocks:
            raise SessionStateError(
                f"{what} inside a nested block of {self._alias!r}; leave the block, or roll back "
                "to its savepoint"
            )

    # Savepoints by name

    def add(self, name: str, mark: tuple[int, int]) -> None:
        """A savepoint was made.

        Args:
            name: its name; several may have the same.
            mark: which callbacks are older.
        """
        self.savepoints.append(Savepoint(name, len(self.blocks), mark))

    def find(self, name: str) -> Savepoint | None:
        """The latest savepoint of this name; None when SQL made it.

        Raises:
            SessionStateError: it is outside the innermost block.
        """
        for savepoint in reversed(self.savepoints):
            if savepoint.name == name:
                if savepoint.depth < len(self.blocks):
                    raise SessionStateError(
                        f"savepoint {name!r} of {self._alias!r} is outside the open nested block; "
                        "leave the block first"
                    )
                return savepoint
        return None

    def release(self, savepoint: Savepoint) -> None:
        """A savepoint is gone, and all that were made after it."""
        del self.savepoints[self.savepoints.index(savepoint) :]

    def go_back_to(self, savepoint: Savepoint) -> None:
        """All savepoints after this one are gone; it stays."""
        del self.savepoints[self.savepoints.index(savepoint) + 1 :]
