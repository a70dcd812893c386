"""django-treebeard: a branch goes with its leaves, and the tree stays whole."""

from __future__ import annotations

import pytest

from django_asyncsession import Session
from tests.ecosystem.models import Category

# Its own methods open their blocks on the default database.
pytestmark = pytest.mark.parametrize("alias", ["default"], indirect=True, ids=["postgresql"])


@pytest.fixture
async def tree(session: Session) -> Session:
    def plant() -> None:
        nodes = Category.objects.db_manager(session.alias)
        root = nodes.add_root({"name": "root"})
        nodes.add_child(nodes.add_child(root, {"name": "branch"}), {"name": "leaf"})

    await session.run_sync(plant)
    return session


async def test_a_branch_goes_with_its_leaves(tree: Session) -> None:
    await tree.delete(Category).where(name="branch")
    assert await tree.select(Category).columns("name").scalars() == ["root"]
    assert (await tree.select(Category).one()).numchild == 0


async def test_rows_come_in_the_order_of_the_tree(tree: Session) -> None:
    found = await tree.select(Category)
    assert [row.name for row in found] == ["root", "branch", "leaf"]
    assert not await tree.run_sync(lambda: any(Category.objects.find_problems()))
