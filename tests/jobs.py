"""Jobs that a worker runs, as a project would write them."""

from __future__ import annotations

import asyncio

from asgiref.sync import async_to_sync

from django_asyncsession import Session, background_session, databases
from tests.models import User


@background_session
async def register(name: str, session: Session) -> int:
    """Adds a user; what a queue of any kind calls."""
    user = await session.add(User(name=name))
    if name == "failed":
        raise ValueError("after the insert")
    return user.pk


async def closing(name: str) -> int:
    """The job, and at its end the pools of its event loop."""
    try:
        return await register(name)
    finally:
        await databases.close_all()


def register_job(name: str) -> int:
    """What a sync worker, such as Celery's, is given."""
    return asyncio.run(closing(name))


def register_job_of_asgiref(name: str) -> int:
    """The same, without closing the pools: they end with their loop."""
    return async_to_sync(register)(name)
