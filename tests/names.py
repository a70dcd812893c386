"""Names of parametrized tests that are the same in every process of a parallel run."""

from __future__ import annotations


def name_of(value: object) -> str:
    """The value as text, without what differs from run to run: the order of a set, an address."""
    if isinstance(value, set | frozenset):
        return " ".join(sorted(map(str, value))) or "nothing"
    return repr(value.tobytes()) if isinstance(value, memoryview) else str(value)
