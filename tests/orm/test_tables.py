"""Row tables: models as tables with columns."""

from __future__ import annotations

import pickle

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db.models import Model

from django_asyncsession import Column, RowTable, Session, get_pk, table, to_dict
from tests.models import Author, Book, Hero, Line, Member, Note, Restaurant, Shelf, User, Values


def test_a_model_has_one_table() -> None:
    assert table(User) is table(User)
    assert table(table(User)) is table(User)
    assert pickle.loads(pickle.dumps(table(User))) is table(User)
    assert repr(table(User)) == "<RowTable tests.User>"


def test_a_label_is_looked_up_at_first_use() -> None:
    later: RowTable[Model] = table("tests.User")
    assert later.model is User
    assert later.id is table(User).id
    nowhere: RowTable[Model] = table("tests.Nowhere")
    with pytest.raises(LookupError):
        _ = nowhere.id


def test_a_table_describes_the_model() -> None:
    users = table(User)
    assert users.model is User
    assert list(users.columns) == ["id", "name", "level", "xp"]
    assert users.columns["name"] is users.name
    assert users.primary_key == (users.id,)
    assert table(Author).name is table(Author)["name"]
    assert list(users.iter_columns()) == list(users.columns.values())
    assert "name" in dir(users) and "columns" in dir(users)


def test_columns_come_before_the_names_of_the_table() -> None:
    members = table(Member)
    assert isinstance(members.columns, Column) and isinstance(members.name, Column)
    assert members.name.column == "full_name"
    assert table(Values).name == "tests_values"
    assert members.get_column("columns") is members.columns


def test_keys_of_several_columns_and_of_parents() -> None:
    lines = table(Line)
    assert [c.column for c in lines.primary_key] == ["order", "number"]
    assert lines.order.primary_key and not lines.text.primary_key
    assert [c.column for c in table(Restaurant).primary_key] == ["place_ptr_id"]
    assert list(table(Restaurant).columns)[:3] == ["id", "name", "city"]
    assert table(Hero).columns.keys() == table(User).columns.keys()


def test_relationships_in_every_direction() -> None:
    books = table(Book).relationships
    assert {name: (r.model, r.many, r.reverse) for name, r in books.items()} == {
        "author": (Author, False, False),
        "editor": (Author, False, False),
        "tags": (Book._meta.get_field("tags").related_model, True, False),
    }
    authors = table(Author).relationships
    assert {n: (r.model, r.many, r.reverse) for n, r in authors.items()} == {
        "books": (Book, True, True),
        "edited": (Book, True, True),
    }
    assert table(User).relationships["profile"].many is False
    notes = table(Note).relationships
    assert (notes["about"].model, notes["about"].column) == (None, None)
    assert notes["kind"].model is ContentType
    assert table(Shelf).relationships["notes"].many
    assert table(Shelf).relationships["children"].column is table(Shelf).children


def test_a_generic_foreign_key_has_no_column() -> None:
    with pytest.raises(AttributeError, match="compare its columns 'kind' and 'number'"):
        _ = table(Note).about


def test_calling_a_table_makes_a_row_with_just_these_fields() -> None:
    row = table(User)(id=1, name="heck")
    assert isinstance(row, User) and type(row) is User
    assert row.get_deferred_fields() == {"level", "xp"}
    assert to_dict(row) == {"id": 1, "name": "heck"}
    assert table(User)(pk=5).id == 5
    author = Author(id=3)
    book = table(Book)(author=author)
    assert (book.author_id, book.author) == (3, author)
    with pytest.raises(TypeError, match="nme"):
        table(User)(nme="x")


def test_the_primary_key_of_a_row() -> None:
    assert get_pk(User(id=4)) == (4,)
    assert get_pk(User(id=4), as_tuple=False) == 4
    assert get_pk(Line(order=1, number=2), as_tuple=False) == (1, 2)


async def test_keys_of_several_columns_work_in_conditions(session: Session) -> None:
    lines = table(Line)
    await session.insert.rows(lines(order=1, number=1), lines(order=1, number=2, text="b"))
    assert await session.select(Line).where(lines.pk == (1, 2)).columns("text").scalars() == ["b"]
    assert await session.select(Line).where(lines.pk.in_([(1, 1), (9, 9)])).count() == 1
    assert (await session.get_one(Line, (1, 2))).text == "b"
    assert await session.get(Line, (3, 3)) is None
