"""Pools, as tests of tools need them: what sets a connection up is seen by whoever waits for it."""

from __future__ import annotations

import asyncio

from django_asyncsession import DatabaseInterface


async def opened(database: DatabaseInterface) -> None:
    """Open all connections of the pool now."""
    leases = await asyncio.gather(
        *(database.acquire() for _ in range(database.stats()["pool_max"]))
    )
    for lease in leases:
        lease.release()
