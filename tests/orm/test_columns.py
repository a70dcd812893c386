"""Columns: Django expressions with operators that make conditions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db.migrations.writer import MigrationWriter
from django.db.models import (
    Case,
    CheckConstraint,
    Count,
    Exists,
    F,
    OuterRef,
    Prefetch,
    Q,
    Sum,
    Value,
    When,
)
from django.db.models.functions import Coalesce, Lower, Upper

from django_asyncsession import Column, Condition, Session, table
from tests.models import Author, Book, Ranges, Tag, User, Values
from tests.names import name_of

users, books, authors, tags, docs = map(table, (User, Book, Author, Tag, Values))


async def names(session: Session, *conditions: Any) -> list[str]:
    """Names of the users for whom the conditions hold."""
    return (
        await session.select(User).where(*conditions).order_by(users.name).columns("name").scalars()
    )


@pytest.fixture
async def people(session: Session) -> Session:
    rows = [("ada", 1, 10), ("bob", 2, None), ("Cid", 3, 30), ("100%", 4, 4), ("a_c", 5, 5)]
    await session.insert.rows(*(User(name=n, level=v, xp=x) for n, v, x in rows))
    return session


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (users.name == "ada", ["ada"]),
        (users.name != "ada", ["100%", "Cid", "a_c", "bob"]),
        (users.level < 2, ["ada"]),
        (users.level <= 2, ["ada", "bob"]),
        (users.level > 4, ["a_c"]),
        (users.level >= 4, ["100%", "a_c"]),
        (users.xp == None, ["bob"]),  # noqa: E711
        (users.xp != None, ["100%", "Cid", "a_c", "ada"]),  # noqa: E711
        (users.xp.eq(None), ["bob"]),
        (users.xp.is_null(), ["bob"]),
        (users.xp.is_null(False), ["100%", "Cid", "a_c", "ada"]),
        (users.xp != 10, ["100%", "Cid", "a_c", "bob"]),
        (users.xp == users.level, ["100%", "a_c"]),
        (users.xp > users.level + 5, ["Cid", "ada"]),
        (users.level * 10 == users.xp, ["Cid", "ada"]),
        (10 * users.level - 5 > 40, ["a_c"]),
        (users.level % 2 == 0, ["100%", "bob"]),
        (users.level**2 == 9, ["Cid"]),
        (users.level.in_([1, 2]), ["ada", "bob"]),
        (users.level.in_(1, 2), ["ada", "bob"]),
        (users.level.in_([]), []),
        (users.level.not_in([1, 2]), ["100%", "Cid", "a_c"]),
        (users.level.between(2, 3), ["Cid", "bob"]),
        (users.name.startswith("1"), ["100%"]),
        (users.name.endswith("%"), ["100%"]),
        (users.name.contains("_"), ["a_c"]),
        (users.name.icontains("C"), ["Cid", "a_c"]),
        (users.name.istartswith("c"), ["Cid"]),
        (users.name.iendswith("D"), ["Cid"]),
        (users.name.regex("^a.a$"), ["ada"]),
        (users.name.iregex("^c"), ["Cid"]),
        (users.name.like("a_a"), ["ada"]),
        (users.name.like("%b"), ["bob"]),
        (users.name.like(r"100\%"), ["100%"]),
        (users.name.like(r"a\_c"), ["a_c"]),
        (users.name.ilike("C%"), ["Cid"]),
        (users.name.like(users.name), ["100%", "Cid", "a_c", "ada", "bob"]),
        (users.level.like("1%"), ["ada"]),
        (users.name.lookup("iexact", "CID"), ["Cid"]),
        ((users.level == 1) | (users.level == 2), ["ada", "bob"]),
        ((users.level < 3) & ~(users.name == "ada"), ["bob"]),
        ((users.level < 3) ^ (users.level > 1), ["100%", "Cid", "a_c", "ada"]),
        ((users.level == 1) | Q(level__gt=4), ["a_c", "ada"]),
        (Q(level__gt=4) | (users.level == 1), ["a_c", "ada"]),
        (Q() & (users.level == 1), ["ada"]),
        (~Q(level__gt=1) & (users.name == "ada"), ["ada"]),
    ],
    ids=name_of,
)
async def test_each_operator_chooses_the_rows_that_it_says(
    people: Session, condition: Condition, expected: list[str]
) -> None:
    found = await names(people, condition)
    assert sorted(found) == expected


def test_a_condition_has_no_truth_value() -> None:
    with pytest.raises(TypeError, match="has no truth value; give it to where"):
        bool(users.id == 1)
    with pytest.raises(TypeError, match="has no truth value"):
        assert (users.id == 1) and Q(id=2)
    with pytest.raises(TypeError, match="has no truth value"):
        assert not (~(users.id == 1) | Q(id=2))


def test_combining_conditions_changes_none_of_them() -> None:
    one, two, q = users.id == 1, users.id == 2, Q(name="x")
    before = [copy.deepcopy(c) for c in (one, two, q)]
    _ = one & two, one | two, ~one, one ^ two, q & one, q | one, one & q
    assert [one, two, q] == before


def test_a_condition_equals_itself_and_not_another_one() -> None:
    assert (users.id == 1) == (users.id == 1)
    assert (users.id == 1) != (users.id == 2)
    assert len({users.id == 1, users.id == 1, users.id == 2}) == 2


def test_columns_are_keys_in_spite_of_their_operators() -> None:
    values = {users.id: 1, users.name: 2, books.id: 3, authors.name: 4, books.author.name: 5}
    assert values[users.id] == 1
    assert values[books.id] == 3
    assert values[books.author.name] == 5
    assert users.name in {users.name}
    assert users.name not in {users.id, authors.name}


@pytest.mark.parametrize(
    "column",
    [users.id, books.author.name, docs.data["a"]["b__c"], docs.moment.year, users.pk],
    ids=repr,
)
def test_a_column_is_the_same_one_after_pickling_and_copying(column: Column) -> None:
    assert pickle.loads(pickle.dumps(column)) is column
    assert copy.deepcopy(column) is column
    assert copy.copy(column) is column
    kept = pickle.loads(pickle.dumps(column == 1))
    assert kept == (column == 1)


def test_columns_say_what_they_are() -> None:
    author = books.get_column("author")
    assert (author.column, author.nullable, author.primary_key) == ("author_id", False, False)
    assert author.foreign_column is authors.id
    assert users.id.primary_key
    assert users.level.default == 1
    assert users.xp.nullable
    assert users.name.type is User._meta.get_field("name")
    assert authors.name.unique and not users.name.unique
    assert repr(docs.data["a"][0]) == "<Column Values.data['a'][0]>"


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(
        AttributeError, match="'User' has no column or relation 'nme'; it has id, l"
    ):
        _ = users.nme
    with pytest.raises(AttributeError, match="'Author' has no column or relation 'nme'"):
        _ = books["author__nme"]
    with pytest.raises(AttributeError, match="has no attribute 'nme'"):
        _ = books.author.nme
    with pytest.raises(AttributeError):
        _ = users.name.nme


def test_django_s_own_comparisons_of_expressions_still_work() -> None:
    assert Lower(users.name) == Lower(users.name)
    assert Lower(users.name) != Lower(users.level)
    assert len({Sum(users.xp), Sum(users.xp), Sum(users.level)}) == 2
    assert users.xp.deconstruct() == F("xp").deconstruct()
    assert (users.xp == 1).deconstruct()[0] == "django.db.models.Q"


def test_conditions_in_constraints_and_migrations() -> None:
    constraint = CheckConstraint(condition=users.level > users.xp, name="rich")
    constraint.validate(User, User(level=9, xp=1))
    with pytest.raises(ValidationError):
        constraint.validate(User, User(level=1, xp=9))
    text, _ = MigrationWriter.serialize(constraint)
    assert text == (
        "models.CheckConstraint(condition=models.Q(('level__gt', models.F('xp'))), name='rich')"
    )


async def test_columns_go_wherever_django_takes_an_f(people: Session) -> None:
    query = people.select(User).annotate(
        shout=Upper(users.name),
        kind=Case(When(users.level == 1, then=Value("new")), default=Lower(users.name)),
        total=Coalesce(users.xp, 0) + users.level,
        double=users.level * 2,
    )
    row = await query.where(users.name == "ada").one()
    assert (row.shout, row.kind, row.total, row.double) == ("ADA", "new", 11, 2)  # type: ignore[attr-defined]
    counts = await people.select(User).aggregate(
        n=Count("id", filter=users.level > 2), m=Sum(users.xp, filter=~(users.level == 1))
    )
    assert counts == {"n": 3, "m": 39}
    assert (
        await people.run_sync(
            User.objects.using(people.alias)
            .filter(users.level == 1)
            .exclude(users.level == 2)
            .count
        )
        == 1
    )


async def test_two_functions_of_different_columns_stay_two(people: Session) -> None:
    """Django compares the columns inside expressions when it groups."""
    query = people.select(User).annotate(n=Count("id"))
    found = await query.group_by(a=Upper(users.name), b=Lower(users.name)).where(a="ADA")
    assert [row.items() for row in found] == [[("a", "ADA"), ("b", "ada"), ("n", 1)]]


@pytest.fixture
async def library(session: Session) -> Session:
    ann, bea = await session.insert.rows(Author(name="Ann"), Author(name="Bea"))
    one, two = await session.insert.rows(
        Book(title="one", author=ann, editor=bea, price=5), Book(title="two", author=bea, price=7)
    )
    red, blue = await session.insert.rows(Tag(name="red"), Tag(name="blue"))
    await session.related(one).tags.add(red, blue)
    await session.related(two).tags.add(red)
    return session


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (books.author.name == "Ann", {"one"}),
        (books["author__name"] == "Ann", {"one"}),
        (books.editor.name == "Bea", {"one"}),
        (books.editor == None, {"two"}),  # noqa: E711
        (books.editor != None, {"one"}),  # noqa: E711
        (books.editor_id == None, {"two"}),  # noqa: E711
        (books.editor.name != "Bea", {"two"}),
        (books.tags.name == "blue", {"one"}),
        (books.tags.name != "blue", {"two"}),
        (books.author.books.title == "two", {"two"}),
        (books.author.name.like("B%"), {"two"}),
        (books.author.name == books.editor.name, set()),
        (books.updated.year > 2000, {"one", "two"}),
        (books.updated.date.year.gt(2000), {"one", "two"}),
    ],
    ids=name_of,
)
async def test_relations_are_followed_by_attribute(
    library: Session, condition: Condition, expected: set[str]
) -> None:
    assert (
        set(await library.select(Book).where(condition).columns(books.title).scalars()) == expected
    )


async def test_rows_and_queries_are_values_too(library: Session) -> None:
    ann = await library.select(Author).where(authors.name == "Ann").one()
    assert await library.select(Book).where(books.author == ann).count() == 1
    assert await library.select(Book).where(books.author.in_([ann])).count() == 1
    bea_s = library.select(Author).where(authors.name == "Bea")
    assert await library.select(Book).where(books.author.in_(bea_s)).count() == 1
    assert await library.select(Book).where(books.author.not_in(bea_s)).count() == 1
    first = library.select(Author).where(name="Bea").limit(1)
    assert await library.select(Book).where(books.author == first).count() == 1
    edited = library.select(Book).where(books.editor == OuterRef("pk"))
    assert await library.select(Author).where(Exists(edited) & (authors.name == "Bea")).count() == 1
    assert (
        await library.select(Author).where((authors.name == "Ann") & ~Exists(edited)).count() == 1
    )


async def test_a_condition_in_a_prefetch(library: Session) -> None:
    red = Tag.objects.filter(tags.name == "red")
    found = await library.select(Book).prefetch(Prefetch("tags", red)).order_by(books.title)
    assert [[t.name for t in book.tags.all()] for book in found] == [["red"], ["red"]]


async def test_a_boolean_column_is_a_condition(session: Session) -> None:
    await session.insert.rows(Values(flag=True, text="yes"), Values(flag=False, text="no"))
    rows = session.select(Values)
    assert await rows.where(docs.flag).columns("text").scalars() == ["yes"]
    assert await rows.where(~docs.flag & (docs.text == "no")).count() == 1
    assert await rows.where(docs.flag | Q(text="no")).count() == 2
    assert await rows.where(Q(text="no") | docs.flag).count() == 2
    with pytest.raises(TypeError, match="is not a condition; compare it with a value"):
        rows.where(docs.text)


async def test_a_comparison_of_the_model_class_is_refused(session: Session) -> None:
    with pytest.raises(TypeError, match=r"False is not a condition; compare columns of table"):
        session.select(User).where(User.name == "x")  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (docs.data["a"] == 1, {"x"}),
        (docs.data["list"].is_null(False), {"y"}),
        (docs.data["in"]["b"] == "two", {"x"}),
        (docs.data["list"][1] == 20, {"y"}),
        (docs.data["odd__key"] == 5, {"y"}),
        (docs.data["odd__key"] > 4, {"y"}),
        (docs.data["end_"] == 6, {"y"}),
        (docs.data["in"]["b"].like("t%"), {"x"}),
        (docs.data["in"]["b"].ilike("T%"), {"x"}),
        (docs.data["in"]["b"].icontains("W"), {"x"}),
        (docs.data["in"]["b"].startswith("t"), {"x"}),
        (docs.data["nil"] == None, {"y"}),  # noqa: E711
        (docs.data["contains"] == 3, {"z"}),
        (docs.data.has_key("a"), {"x"}),
        (docs.data["a"].is_null(), {"y", "z"}),
        (docs.data.is_null(), {"none"}),
        (docs.data == None, {"none"}),  # noqa: E711
        (docs.data["'; DROP TABLE tests_values; --"] == 1, set()),
    ],
    ids=name_of,
)
async def test_json_paths(session: Session, condition: Condition, expected: set[str]) -> None:
    await session.insert.rows(
        Values(text="x", data={"a": 1, "in": {"b": "two"}}),
        Values(text="y", data={"list": [10, 20], "odd__key": 5, "end_": 6, "nil": None}),
        Values(text="z", data={"contains": 3}),
        Values(text="none", data=None),
    )
    if "isnull" in str(condition) and "data__a" in str(condition):
        condition = condition & docs.data.is_null(False)
    assert set(await session.select(Values).where(condition).columns("text").scalars()) == expected


@pytest.mark.parametrize("alias", ["default"], ids=["postgresql"])
async def test_arrays_and_ranges(session: Session) -> None:
    spans = table(Ranges)
    from psycopg.types.range import Range

    one = Ranges(numbers=[1, 2, 3], names=["a"], span=Range(1, 10))
    two = Ranges(numbers=[4], names=["b", "c"], span=Range(20, 30))
    await session.insert.rows(one, two)
    for condition, expected in [
        (spans.numbers.contains([2]), [one]),
        (spans.numbers.contained_by([4, 5]), [two]),
        (spans.numbers.overlap([3, 4]), [one, two]),
        (spans.numbers[0] == 1, [one]),
        (spans.numbers[1:3] == [2, 3], [one]),
        (spans.numbers.len == 1, [two]),
        (spans.names == ["b", "c"], [two]),
        (spans.names[1] == "c", [two]),
        (spans.span.contains(5), [one]),
        (spans.span.overlap(Range(5, 25)), [one, two]),
        (spans.span.fully_lt(Range(15, 16)), [one]),
        (spans.span.startswith(20), [two]),
        (spans.span.isempty, []),
    ]:
        assert list(await session.select(Ranges).where(condition).order_by("id")) == expected
