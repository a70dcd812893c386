"""Jobs of queues and workers: an async function, with a session of its own, called by sync code.

With real connections: each loop, thread and process of a worker has its own.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import django
import pytest
from django.db import connections
from django.test import override_settings

from django_asyncsession import background_session, databases
from tests import jobs
from tests.models import User
from tests.sessions import names, whole

JOBS = pytest.mark.parametrize("job", [jobs.register_job, jobs.register_job_of_asgiref])
tasks_of_django = pytest.mark.skipif(
    django.VERSION < (6, 0), reason="django.tasks begins with Django 6.0"
)


@pytest.fixture(autouse=True)
def before(empty_tables: None) -> Iterator[int]:
    """How many connections others have; each test leaves as many."""
    before = connected()
    yield before
    assert connected() == before


def saved() -> list[str]:
    return list(User.objects.order_by("name").values_list("name", flat=True))


def connected() -> int:
    """How many connections there are to the test's database, but for the test's own."""
    # A pool whose loop was closed by others ends when it is collected.
    gc.collect()
    with connections["default"].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return int(cursor.fetchone()[0])


# A sync worker


@JOBS
def test_each_job_has_a_transaction_of_its_own(job: Callable[[str], int]) -> None:
    first = job("Ada")
    with pytest.raises(ValueError, match="after the insert"):
        job("failed")
    assert job("Bob") > first
    assert saved() == ["Ada", "Bob"]


def test_a_loop_that_is_kept_keeps_its_connections(before: int) -> None:
    """As a worker does that has one loop for all its jobs."""
    with asyncio.Runner() as runner:
        for name in ("Ada", "Bob"):
            runner.run(jobs.register(name))
            assert connected() == before + 1
        runner.run(databases.close_all())
    assert saved() == ["Ada", "Bob"]


@JOBS
def test_threads_of_a_worker_run_jobs_at_the_same_time(job: Callable[[str], int]) -> None:
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(job, ["Ada", "Bob", "Cy", "Dee"]))
    assert len(set(made)) == 4
    assert saved() == ["Ada", "Bob", "Cy", "Dee"]


def _in_child(job: Callable[[str], int], given: Any) -> None:
    connections.close_all()
    given.put((os.getpid(), [job("Ada"), job("Bob")]))


@JOBS
def test_a_forked_worker_has_connections_of_its_own(job: Callable[[str], int]) -> None:
    """The parent has an open pool, which the child must not use."""
    fork: Any = multiprocessing.get_context("fork")
    given = fork.SimpleQueue()
    with asyncio.Runner() as runner:
        runner.run(jobs.register("parent"))
        child = fork.Process(target=_in_child, args=(job, given))
        # Nothing of this process may be inherited in the middle of its work.
        connections.close_all()
        child.start()
        pid, made = given.get()
        child.join(20)
        assert (child.exitcode, len(made)) == (0, 2) and pid != os.getpid()
        runner.run(whole(databases["default"]))
        assert runner.run(names(databases["default"])) == ["Ada", "Bob", "parent"]
        runner.run(databases.close_all())


# Django's tasks


@pytest.fixture
def immediate() -> Iterator[None]:
    backend = {"default": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"}}
    with override_settings(TASKS=backend):
        yield


@pytest.fixture
def task(immediate: None) -> Any:
    from django.tasks import task

    return task(jobs.register)


@tasks_of_django
def test_a_task_that_is_enqueued_by_sync_code_has_a_session(task: Any) -> None:
    result = task.enqueue("Ada")
    assert result.return_value == User.objects.get(name="Ada").pk
    failed = task.enqueue("failed")
    assert failed.status == "FAILED" and failed.errors[0].exception_class is ValueError
    assert saved() == ["Ada"]


@tasks_of_django
@pytest.mark.parametrize("mode", [{}, {"NATIVE_ORM": True}], ids=["", "native"])
async def test_a_task_that_is_enqueued_in_a_session_does_not_take_part_in_it(
    task: Any, mode: dict[str, Any]
) -> None:
    db = databases["default"]
    with override_settings(ASYNC_SESSION=mode):
        async with db.get_session() as session:
            await session.add(User(name="of the request"))
            result = await task.aenqueue("Ada")
            assert result.status == "SUCCESSFUL", result.errors
            await session.rollback()
        assert await names(db) == ["Ada"]
        await whole(db)
        await databases.close_all()


@tasks_of_django
async def test_a_task_that_is_enqueued_after_the_commit_sees_what_is_saved(immediate: None) -> None:
    from django.tasks import task

    results: list[Any] = []
    counted = task(count)
    async with databases["default"].get_session() as session:
        await session.add(User(name="Ada"))

        async def enqueue() -> None:
            results.append(await counted.aenqueue())

        session.on_commit(enqueue)
    assert results[0].return_value == 1
    await databases.close_all()


@background_session
async def count(session: Any) -> int:
    return int(await session.fetch_value("SELECT COUNT(*) FROM tests_user"))
