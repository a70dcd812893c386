"""django-money: an amount and its currency are one value."""

from __future__ import annotations

from djmoney.money import Money

from django_asyncsession import Session
from django_asyncsession.testing import async_assert_num_queries
from tests.ecosystem.models import Product


async def test_money_is_written_and_compared_with_its_currency(session: Session) -> None:
    await session.insert.rows(
        Product(price=Money(5, "USD")),
        Product(price=Money(5, "EUR")),
        Product(price=Money(9, "EUR")),
    )
    found = await session.select(Product).where(price=Money(5, "EUR"))
    assert [row.price for row in found] == [Money(5, "EUR")]
    assert await session.select(Product).where(price__gt=Money(6, "EUR")).count() == 1
    assert (
        await session.update(Product).where(price=Money(9, "EUR")).set(price=Money(7, "USD")) == 1
    )
    assert await session.select(Product).where(price=Money(7, "USD")).count() == 1
    assert await session.delete(Product).where(price=Money(5, "EUR")) == 1
    assert await session.select(Product).count() == 2


async def test_the_same_amount_is_no_change(session: Session) -> None:
    row = await session.get_one(Product, (await session.add(Product(price=Money(5, "USD")))).pk)
    async with async_assert_num_queries(0, session.alias):
        row.price = Money("5.00", "USD")
        await session.add(row)
    row.price = Money(5, "EUR")
    await session.add(row)
    assert (await session.get_one(Product, row.pk)).price == Money(5, "EUR")
