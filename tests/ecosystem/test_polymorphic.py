"""django-polymorphic: rows come back as what they were made as."""

from __future__ import annotations

from django_asyncsession import Session, table
from tests.ecosystem.models import Animal, Dog


async def test_rows_are_of_their_own_class(session: Session) -> None:
    await session.insert.rows(Animal(name="cat"), Dog(name="dog", bark="wow"))
    await session.add(Dog(name="pup"))
    found = await session.select(Animal).order_by("name")
    assert [(type(row), row.name) for row in found] == [
        (Animal, "cat"),
        (Dog, "dog"),
        (Dog, "pup"),
    ]
    assert found[1].bark == "wow"
    assert isinstance(await session.get_one(Animal, found[2].pk), Dog)


async def test_rows_are_inserted_with_their_class_whatever_is_returned(session: Session) -> None:
    animals = table(Animal)
    inserted = await session.insert.rows(Animal(name="cat")).on_conflict().nothing()
    assert len(inserted) == 1
    if session.alias != "mysql":
        await session.insert.rows(Animal(name="eel")).returning(animals.name)
    assert all(type(row) is Animal for row in await session.select(Animal))
    assert await session.select(Animal).where(polymorphic_ctype=None).count() == 0


async def test_rows_of_all_classes_are_updated_and_deleted(session: Session) -> None:
    await session.insert.rows(Animal(name="cat"), Dog(name="dog"))
    assert await session.update(Animal).where(name__in=["cat", "dog"]).set(name="x") == 2
    assert await session.delete(Animal).where(name="x") >= 1
    assert await session.fetch_value("SELECT count(*) FROM ecosystem_dog") == 0
    assert await session.select(Animal).count() == 0
