"""Shapes: the same but for values is the same; no database is asked."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from django.db.models import F, Q

from django_asyncsession.plans.fallback import REASONS, Fallback
from django_asyncsession.plans.probes import SETS, probes, refilled
from django_asyncsession.plans.shapes import (
    FITS,
    LONGEST_LIST,
    Shape,
    filter_key,
    fit,
    is_padded,
    names_key,
    order_key,
    slot_kinds,
    steps,
)


def keyed(*conditions: Any, **lookups: Any) -> tuple[Any, list[Any]]:
    """The key of a filter and its values."""
    slots: list[Any] = []
    return filter_key(conditions, lookups, slots), slots


def refused(*conditions: Any, **lookups: Any) -> str:
    """Why a filter has no shape."""
    with pytest.raises(Fallback) as caught:
        keyed(*conditions, **lookups)
    return caught.value.reason


def path_of(column: Any) -> str | None:
    return column.name if type(column) is F else None


def test_values_are_slots_and_their_types_are_not() -> None:
    key, slots = keyed(a=1, b="x")
    assert keyed(a=2, b="y") == (key, [2, "y"]) and slots == [1, "x"]
    assert keyed(a="1", b="x")[0] != key
    assert keyed(b="x", c=1)[0] != key


def test_none_and_booleans_are_part_of_the_shape() -> None:
    keys = [keyed(a=value)[0] for value in (None, True, False, 1, 0)]
    assert len(set(keys)) == 4
    assert keys[3] == keys[4]


def test_conditions_keep_how_they_are_joined() -> None:
    one, other = Q(a=1), Q(b=2)
    joined = [one & other, one | other, one ^ other, ~one & other, ~(one & other), one]
    assert len({keyed(condition)[0] for condition in joined}) == len(joined)
    assert keyed(Q(a=5) | Q(b=6)) == (keyed(one | other)[0], [5, 6])


@pytest.mark.parametrize("count, length", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1000, 1024)])
def test_lists_are_filled_up_to_powers_of_two(count: int, length: int) -> None:
    key, slots = keyed(a__in=list(range(count)))
    assert len(slots) == length and set(slots) == set(range(count))
    assert slot_kinds([("filter", *key)]) == [(int, length)]
    assert is_padded(slot_kinds([("filter", *key)]), slots) is (count != length)


def test_a_list_is_taken_as_django_takes_it() -> None:
    assert keyed(a__in=(3, 1, 3))[1] == [3, 1]
    assert sorted(keyed(a__in={"x", "y"})[1]) == ["x", "y"]
    assert keyed(a__range=(1, 2.5))[1] == [1, 2.5]


def test_what_fills_up_a_list_is_replaced_for_django_s_compiler() -> None:
    kinds = [(int, 4), (str, 1)]
    given = refilled(kinds, [7, 8, 8, 8, "x"])
    assert given[:2] == [7, 8] and given[4] == "x" and len(set(given)) == 5
    assert refilled(kinds, [1, 2, 3, 4, "x"]) == [1, 2, 3, 4, "x"]


@pytest.mark.parametrize(
    "value, reason",
    [
        (datetime(2024, 1, 1), "naive"),
        (time(1, tzinfo=UTC), "naive"),
        (Decimal("NaN"), "not_finite"),
        (Decimal("Infinity"), "not_finite"),
        (float("inf"), "not_finite"),
        (float("nan"), "not_finite"),
        ("a\0b", "nul"),
        (b"x", "value_type"),
        ([1], "value_type"),
        (type("Text", (str,), {})("x"), "value_type"),
        (type("Number", (int,), {})(1), "value_type"),
        (F("b"), "expression"),
    ],
    ids=repr,
)
def test_values_that_django_treats_in_its_own_way_have_no_shape(value: Any, reason: str) -> None:
    assert refused(a=value) == reason


@pytest.mark.parametrize(
    "values, reason",
    [
        ([], "list"),
        ([None], "list"),
        ([1, None], "list"),
        ([1, "x"], "list"),
        (list(range(LONGEST_LIST + 1)), "list"),
        ([[1]], "value_type"),
        ([b"x"], "value_type"),
        (["x", "a\0"], "nul"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_lists_that_django_treats_in_its_own_way_have_no_shape(values: Any, reason: str) -> None:
    assert refused(a__in=values) == reason


def test_a_range_with_an_open_end_has_no_shape() -> None:
    assert refused(a__range=(1, None)) == "list"


def test_orders_and_names() -> None:
    columns = ["-a", F("b"), F("c").desc(nulls_last=True)]
    key = order_key(columns, path_of)
    assert key == ("-a", ("b", False, None, None), ("c", True, None, True))
    with pytest.raises(Fallback, match="expression"):
        order_key([F("a") + 1], path_of)
    assert names_key(["a", "b__c"]) == ("a", "b__c")
    with pytest.raises(Fallback, match="expression"):
        names_key([F("a")])


def test_a_path_becomes_the_methods_again() -> None:
    condition = Q(a=1) | ~Q(b__in=["x", "y", "z"])
    key, slots = keyed(condition, c=None, d__range=(1, 2))
    path = [("filter", *key), ("order_by", ("-a",)), ("values_list", ("a",), True, False)]
    (method, args, kwargs), order, values = steps(path, slots)
    assert (method, args) == ("filter", (Q(a=1) | ~Q(b__in=["x", "y", "z", "z"]),))
    assert kwargs == {"c": None, "d__range": [1, 2]}
    assert order == ("order_by", ("-a",), {})
    assert values == ("values_list", ("a",), {"flat": True, "named": False})


def test_the_same_steps_end_in_the_same_shape() -> None:
    root = Shape()
    shape = root.grow([("a",), ("b",)])
    assert root.at([("a",), ("b",)]) is shape is root.grow([("a",), ("b",)])
    assert root.at([("b",)]) is None and shape.path() == (("a",), ("b",))


def test_a_shape_is_good_once_a_plan_goes_through_it() -> None:
    root = Shape()
    shape, other = root.grow([("a",), ("b",)]), root.grow([("a",), ("c",)])
    assert root.good and not shape.good
    shape.approve()
    assert shape.good and root.children[("a",)].good and not other.good


def test_a_shape_is_forgotten_with_what_led_to_it_alone() -> None:
    root = Shape()
    shape, other = root.grow([("a",), ("b",)]), root.grow([("a",), ("c",)])
    other.ends["x"] = shape.ends["x"] = object()  # type: ignore[index]
    del shape.ends["x"]  # type: ignore[arg-type]
    shape.prune()
    assert root.at([("a",), ("b",)]) is None and root.at([("a",), ("c",)]) is other
    other.ends.clear()
    other.prune()
    assert root.children == {}


@pytest.mark.parametrize("kind", FITS)
def test_no_probe_equals_another(kind: type) -> None:
    kinds = [(kind, 600), (kind, 1)]
    every = [value for salt in range(SETS) for value in probes(kinds, salt)]
    assert len(set(every)) == len(every) == SETS * 601
    for value in every:
        fit(value, kind)


def test_a_value_of_another_type_does_not_fit() -> None:
    for value in (1, True, date(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC), timedelta(1)):
        for kind in FITS:
            if type(value) is kind:
                fit(value, kind)
                continue
            with pytest.raises(Fallback, match="plain type"):
                fit(value, kind)
    fit(UUID(int=1), UUID)
    fit(datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5))), datetime)


def test_each_reason_is_the_end_of_a_sentence() -> None:
    for text in REASONS.values():
        assert text[-1] not in ".;" and len(text) > 20
