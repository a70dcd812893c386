"""The stack of a transaction's blocks and savepoints, without a database."""

from __future__ import annotations

import pytest

from django_asyncsession import SessionStateError
from django_asyncsession.transactions.levels import Levels


@pytest.fixture
def levels() -> Levels[str]:
    return Levels("default")


def test_blocks_open_and_close_like_a_stack(levels: Levels[str]) -> None:
    assert levels.innermost is None and not levels
    levels.open("outer")
    levels.open("inner")
    assert list(levels) == ["outer", "inner"] and levels.innermost == "inner"
    levels.close()
    assert list(levels) == ["outer"] and "inner" not in levels
    levels.close()
    assert not levels and levels.is_flat


def test_only_the_innermost_block_may_end(levels: Levels[str]) -> None:
    levels.open("outer")
    levels.open("inner")
    levels.check_innermost("inner", "end")
    with pytest.raises(SessionStateError, match="cannot end a block of 'default' that is not the"):
        levels.check_innermost("outer", "end")


def test_nothing_ends_the_transaction_inside_a_block(levels: Levels[str]) -> None:
    levels.check_flat("commit()")
    levels.open("block")
    with pytest.raises(SessionStateError, match=r"commit\(\) inside a nested block of 'default'"):
        levels.check_flat("commit()")


def test_a_lost_block_takes_those_inside_it_along(levels: Levels[str]) -> None:
    for block in ("one", "two", "three"):
        levels.open(block)
    levels.lose("two")
    assert list(levels) == ["one"]


def test_of_savepoints_with_one_name_the_latest_counts(levels: Levels[str]) -> None:
    levels.add("a", (0, 0))
    levels.add("a", (1, 0))
    found = levels.find("a")
    assert found is not None and found.mark == (1, 0)
    levels.release(found)
    found = levels.find("a")
    assert found is not None and found.mark == (0, 0)
    assert levels.find("made by SQL") is None


def test_going_back_to_a_savepoint_forgets_the_later_ones_and_keeps_it(levels: Levels[str]) -> None:
    for name in "abc":
        levels.add(name, (0, 0))
    found = levels.find("b")
    assert found is not None
    levels.go_back_to(found)
    assert levels.find("b") == found and levels.find("a") and levels.find("c") is None
    assert not levels.is_flat


def test_a_savepoint_outside_the_open_block_is_refused(levels: Levels[str]) -> None:
    levels.add("outside", (0, 0))
    levels.open("block")
    levels.add("inside", (0, 0))
    assert levels.find("inside")
    with pytest.raises(SessionStateError, match="savepoint 'outside' of 'default' is outside"):
        levels.find("outside")


def test_savepoints_end_with_their_block(levels: Levels[str]) -> None:
    levels.open("block")
    levels.add("inside", (0, 0))
    levels.close()
    assert levels.find("inside") is None and levels.is_flat


def test_the_end_of_the_transaction_forgets_everything(levels: Levels[str]) -> None:
    levels.add("a", (0, 0))
    levels.open("block")
    levels.clear()
    assert levels.is_flat and levels.innermost is None
