"""The length of the way: how many frames of this package a use enters, on real connections.

Each costs a part of a microsecond for each statement, and the way grows again where nobody counts.
"""

from __future__ import annotations

import pytest

from benchmarks import frames
from django_asyncsession import databases
from tests.models import User

# At the most; what is printed by `python benchmarks/frames.py`, and a little more.
CEILINGS = {
    "get in an open session": 40,
    "run_sync of nothing": 14,
    "a session with one get": 110,
    "an HTTP request with one get": 150,
    "aget() in native mode": 90,
}
# Between the call and the driver: the way may branch, but gets no deeper.
COROUTINES = {"get in an open session": 4, "run_sync of nothing": 4}


@pytest.fixture
async def measured(empty_tables: None) -> dict[str, dict[str, int]]:
    """The counts, with one row to get."""
    async with databases["default"].get_session() as session:
        await session.insert_now(User(id=1, name="one"))
    try:
        return await frames.measure()
    finally:
        await databases["default"].close()


async def test_the_way_is_no_longer_than_it_was(measured: dict[str, dict[str, int]]) -> None:
    ours = {use: counts["ours"] for use, counts in measured.items()}
    assert ours.keys() == CEILINGS.keys()
    assert {use: n for use, n in ours.items() if n > CEILINGS[use]} == {}


async def test_three_coroutines_lie_between_a_call_and_the_driver(
    measured: dict[str, dict[str, int]],
) -> None:
    assert {use: measured[use]["coroutines"] for use in COROUTINES} == COROUTINES


async def test_what_is_entered_is_counted_once_though_it_is_resumed_often() -> None:
    async def twice() -> None:
        for _ in range(3):
            await frames.asyncio.sleep(0)

    counts = await frames.count(twice)
    assert counts["ours"] == counts["coroutines"] == 0 and counts["others'"] >= 2
