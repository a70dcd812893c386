"""Cost of the testing toolkit: 500 trivial tests with pytest-django's `db`, without it and with it.

    python benchmarks/testing.py [tests]

Prints the median time of a test, setup and teardown included, in microseconds, on the PostgreSQL
of the tests. Each contestant runs in a process of its own, three times, and its best run counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = 3
CONFTEST = """
import statistics, time
import pytest

PLUGINS

times = []

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    started = time.perf_counter()
    result = yield
    times.append(time.perf_counter() - started)
    return result

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"MEDIAN {statistics.median(times) * 1e6:.0f}")
"""
HEAD = """
import pytest
from django.contrib.auth.models import Group
from django_asyncsession import databases

every = pytest.mark.parametrize("number", range(TESTS))
"""
INI = """[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
"""
PLUGIN = 'pytest_plugins = ["django_asyncsession.pytest_plugin"]'
# Name: conftest's plugins, and the test.
CONTESTANTS = {
    "sync test, db, without the toolkit": ("", "def test(number, db): pass"),
    "sync test, db, with the toolkit": (PLUGIN, "def test(number, db): pass"),
    "async test, db, without the toolkit": ("", "async def test(number, db): pass"),
    "async test, db, with the toolkit": (PLUGIN, "async def test(number, db): pass"),
    "async test, async_session, unused": (PLUGIN, "async def test(number, async_session): pass"),
    "async test, acount() in a thread, without the toolkit": (
        "",
        "async def test(number, db): assert await Group.objects.acount() == 0",
    ),
    "async test, async_session, one statement": (
        PLUGIN,
        "async def test(number, async_session):\n"
        "    assert await async_session.fetch_value('SELECT count(*) FROM auth_group') == 0",
    ),
}


def main() -> None:
    """Run the contestants by turns, and print what came out."""
    tests = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    best = dict.fromkeys(CONTESTANTS, float("inf"))
    for _ in range(RUNS):
        for name, (plugins, test) in CONTESTANTS.items():
            best[name] = min(best[name], measure(plugins, test, tests))
    for name, median in best.items():
        print(f"{name:55} {median:8.0f} µs")


def measure(plugins: str, test: str, tests: int) -> float:
    """The median time of a test in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "conftest.py").write_text(CONFTEST.replace("PLUGINS", plugins))
        source = f"{HEAD.replace('TESTS', str(tests))}\n@every\n{test}\n"
        Path(folder, "test_it.py").write_text(source)
        Path(folder, "pytest.ini").write_text(INI)
        command = [sys.executable, "-m", "pytest", "-q", "--create-db", "-p", "no:cacheprovider"]
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": "tests.settings",
        }
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    medians = [line for line in done.stdout.splitlines() if line.startswith("MEDIAN")]
    if done.returncode or not medians:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return float(medians[0].split()[1])


if __name__ == "__main__":
    main()
