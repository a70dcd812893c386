"""django-tenants, with the recipe of docs/recipes.rst: every answer is of its own tenant, and no
connection keeps one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import OwnServer
from tests.testproject.shop import answers, free_port

ROOT = Path(__file__).parents[2]
# One worker of a parallel run makes the tenants, which takes longer than the tests do.
pytestmark = pytest.mark.xdist_group("tenants")
REQUESTS = 60
HOSTS = ["ann.test", "bob.test"]
SETTINGS = "tests.ecosystem.tenants.settings"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The URL of a database with the two tenants, made with the package's own commands.

    The server is this module's own: django-tenants' middleware is sync, so Django runs it in a
    thread for each request, which keeps a connection of its own until the request has ended. With
    the pool's that is more than a shared server has to spare beside other tests.
    """
    server = OwnServer()
    try:
        with server.connect() as connection:
            connection.execute("CREATE DATABASE tenants")
        url = server.dsn(name="tenants")
        manage(url, "migrate_schemas", "--shared", "--run-syncdb")
        for schema, host in [("public", "test"), ("ann", "ann.test"), ("bob", "bob.test")]:
            domain = [f"--domain-domain={host}", "--domain-is_primary=True"]
            manage(url, "create_tenant", "--noinput", f"--schema_name={schema}", *domain)
        yield url
    finally:
        server.stop()


def manage(url: str, *args: str) -> None:
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": SETTINGS, "DATABASE_URL": url}
    command = [sys.executable, "-m", "django", *args, "--pythonpath=."]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@asynccontextmanager
async def served(url: str, **env: str) -> AsyncIterator[str]:
    """The site under uvicorn."""
    port = free_port()
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": SETTINGS, "DATABASE_URL": url, **env}
    command = [sys.executable, "-m", "uvicorn", "testproject.asgi:application"]
    options = [f"--port={port}", "--lifespan=off", "--log-level=warning"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, env=env)
    try:
        await answers(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 15)
        finally:
            process.kill()


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "session": ("session", {}, {}),
    "native": ("native", {"NATIVE_ORM": True}, {}),
    "native middleware": ("native", {"NATIVE_ORM": True, "NATIVE_MIDDLEWARE": True}, {}),
    "autocommit": ("session", {"ATOMIC_REQUESTS": False}, {"TENANT_LIMIT_SET_CALLS": "1"}),
    "native autocommit": ("native", {"NATIVE_ORM": True, "ATOMIC_REQUESTS": False}, {}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_every_answer_is_of_its_tenant_and_no_connection_keeps_one(
    url: str, way: str
) -> None:
    view, options, env = WAYS[way]
    limits = httpx.Limits(max_connections=REQUESTS)
    # The names of authors are unique, and stay.
    this = uuid.uuid4().hex[:8]
    async with (
        served(url, TENANTS_OPTIONS=json.dumps(options), **env) as base,
        httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as http,
    ):

        async def ask(number: int) -> tuple[str, httpx.Response]:
            host = HOSTS[number % 2]
            name = f"{host.removesuffix('.test')}-{way}-{this}-{number}"
            return name, await http.get(f"/{view}/{name}/", headers={"Host": host})

        answered = await asyncio.gather(*map(ask, range(REQUESTS)))
        pool = await http.get("/pool/", headers={"Host": "test"})
    for name, response in answered:
        assert response.status_code == 200, response.text
        tenant, data = name.split("-")[0], response.json()
        assert data["schemas"] == [tenant]
        assert name in data["names"]
        assert {other.split("-")[0] for other in data["names"]} == {tenant}
    for kept in pool.json()["kept"]:
        assert kept[:3] == ["public"] * 3 and "ann" not in kept[3] and "bob" not in kept[3]


async def test_reads_beside_a_session_have_its_tenant_and_others_say_theirs(url: str) -> None:
    async with served(url) as base, httpx.AsyncClient(base_url=base, timeout=60) as http:
        for tenant in ("ann", "bob"):
            response = await http.get("/elsewhere/", headers={"Host": f"{tenant}.test"})
            assert response.json() == {"beside": [tenant] * 4, "without": "public", "said": tenant}
