"""The document that the package is made from: each of its examples runs word for word."""

from __future__ import annotations

import pytest

from django_asyncsession import BaseResultSet, DatabaseInterface, RowNotFound, Session, State, table
from tests.models import User as UserModel
from tests.sessions import names

# The examples' `User`: the model as it is, or seen as a table.
USERS = {"model": UserModel, "row table": table(UserModel)}


@pytest.fixture(params=USERS)
def user(request: pytest.FixtureRequest) -> object:
    """`User` of the examples, each way."""
    return USERS[request.param]


async def run(code: str, **known: object) -> dict[str, object]:
    """Run the lines of an example, in which names are known, and return what it defines."""
    lines = "".join(f"    {line}\n" for line in code.strip().splitlines())
    scope: dict[str, object] = {**known}
    exec(f"async def example():\n{lines}    return locals()", scope)
    return await scope["example"]()  # type: ignore[operator, no-any-return]


async def test_creating_a_session(database: DatabaseInterface) -> None:
    made = await run(
        """
# create a session bound to our current database
# this will automatically provide the ability to get transactions from the db
sess = db.get_session()

# alternatively, you can create your own sessions bound to the database interface
# providng a custom subclass or so on
session = Session(bind=db)
""",
        db=database,
        Session=Session,
    )
    for session in (made["sess"], made["session"]):
        assert isinstance(session, Session)
        assert session.bind is database
        assert session.state is State.NEW


async def test_beginning_a_session(database: DatabaseInterface) -> None:
    session = Session(bind=database)
    await run(
        """
# begin and connect the session
await session.begin()
""",
        session=session,
    )
    assert session.in_transaction
    async with session:
        assert await session.fetch_value("SELECT 1") == 1
    assert session.closed


async def test_async_with_opens_and_closes(database: DatabaseInterface) -> None:
    session = Session(bind=database)
    made = await run(
        """
async with session:
    ...

# or alternatively
async with db.get_session() as sess:
    ...
""",
        session=session,
        db=database,
    )
    sess = made["sess"]
    assert isinstance(sess, Session)
    assert session.closed and sess.closed


async def test_running_sql(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        made = await run(
            """
cursor = await session.cursor("SELECT 1+1;")
result = await cursor.fetch_row()
answer = list(result.values())[0]  # or the list form for cross-db compatability
""",
            session=session,
        )
        assert isinstance(made["cursor"], BaseResultSet)
        assert made["answer"] == 2
        if database.vendor == "postgresql":
            await run('assert result["?column?"] == 2  # postgres example', result=made["result"])
        assert await session.execute("SELECT 1") in (0, 1, -1)


async def test_adding_a_user(database: DatabaseInterface, user: object) -> None:
    async with database.get_session() as session:
        await run(
            """
u = User(id=1, name="heck")
await session.add(u)
""",
            session=session,
            User=user,
        )
    assert await names(database) == ["heck"]
    async with database.get_session() as session:
        added = await session.get_one(UserModel, 1)
        assert (added.name, added.level) == ("heck", 1)


async def test_merging_a_user(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        await session.add(UserModel(id=1, name="heck", level=7))
        await run(
            """
u = User(id=1)
u.name = "not heck"
await session.merge(u)
""",
            session=session,
            User=table(UserModel),
        )
        merged = await session.get_one(UserModel, 1)
        assert (merged.name, merged.level) == ("not heck", 7)


async def test_merging_a_plain_model_instance_needs_its_fields(
    database: DatabaseInterface,
) -> None:
    async with database.get_session() as session:
        await session.add(UserModel(id=1, name="heck", level=7))
        u = UserModel(id=1)
        u.name = "not heck"
        with pytest.raises(TypeError, match="fields"):
            await session.merge(u)
        await session.merge(u, fields=["name"])
        merged = await session.get_one(UserModel, 1)
        assert (merged.name, merged.level) == ("not heck", 7)
        with pytest.raises(RowNotFound):
            await session.merge(UserModel(id=4711, name="x"), fields=["name"])


async def test_add_is_for_rows_from_a_query_too(database: DatabaseInterface, user: object) -> None:
    async with database.get_session() as session:
        await session.add(UserModel(id=1, name="heck"))
        u = await session.get_one(UserModel, 1)
        u.name = "changed"
        await session.add(u)
    assert await names(database) == ["changed"]


async def test_removing_a_user(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        u = await session.add(UserModel(id=1, name="heck"))
        await session.remove(u)
    assert await names(database) == []
