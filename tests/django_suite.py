"""Runs Django's own tests of async code inside sessions: `python tests/django_suite.py VENDOR
[LABEL ...]`.

VENDOR is postgresql, mysql or sqlite3; the labels are Django's test modules, by default those
below. DJANGO_SOURCE names an unpacked source distribution of the Django that is installed; without
it, it is downloaded from the package index. Each async test gets a session that is current in it:
in the transaction of Django's `TestCase`, which sessions share, and in a `TransactionTestCase` one
with a transaction of its own.
"""

from __future__ import annotations

import atexit
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

import django
import django.test
import django.test.testcases
from django.test import SimpleTestCase
from django.test.runner import DiscoverRunner
from django.test.utils import iter_test_cases

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Django's modules that test async querysets, models, related managers, authentication, sessions,
# pages, signals and the cache in the database.
MODULES = (
    "async",
    "auth_tests.test_auth_backends",
    "auth_tests.test_basic",
    "auth_tests.test_decorators",
    "auth_tests.test_middleware",
    "auth_tests.test_models",
    "auth_tests.test_remote_user",
    "generic_relations",
    "pagination",
    "sessions_tests",
    "signals",
)


def in_session(test: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    """The same async test, with a current session."""

    @wraps(test)
    async def run() -> None:
        from django_asyncsession import databases, native

        count()
        session = databases["default"].get_session(begin_on_use=True)
        try:
            with native.use(session):
                await test()
        finally:
            await session.close()
            await databases.close_all()

    return run


def is_async(case: Any) -> bool:
    """Whether a test is a coroutine function and may use the database."""
    test = getattr(case, getattr(case, "_testMethodName", ""), None)
    return iscoroutinefunction(test) and "default" in case.databases


_setup_and_call = SimpleTestCase._setup_and_call  # type: ignore[attr-defined]
ran: list[str] = []


def setup_and_call(self: Any, result: Any, debug: bool = False) -> None:
    """Wrap the test, if it is async and may use the database, before Django does."""
    test = getattr(self, self._testMethodName)
    if is_async(self):
        count = lambda: ran.append(self.id())  # noqa: E731
        setattr(self, self._testMethodName, in_session(test, count))
    _setup_and_call(self, result, debug)


class Runner(DiscoverRunner):
    """Turns native mode on, which the app would do if Django's own tests installed it."""

    def setup_test_environment(self, **kwargs: Any) -> None:
        """As Django's; then native mode."""
        super().setup_test_environment(**kwargs)
        from django_asyncsession import native
        from django_asyncsession.bridge import answer_async_guards
        from django_asyncsession.orm.snapshots import blocked_access

        answer_async_guards(blocked_access)
        native.install()

    def build_suite(self, *args: Any, **kwargs: Any) -> Any:
        """The async tests of the modules only."""
        suite = super().build_suite(*args, **kwargs)
        tests = [test for test in iter_test_cases(suite) if is_async(test)]
        return self.test_suite(tests)

    def suite_result(self, suite: Any, result: Any, **kwargs: Any) -> int:
        """How many failed; also one when nothing ran in a session."""
        print(f"{len(ran)} async tests ran in a session")
        failed: int = super().suite_result(suite, result, **kwargs)
        return failed + (not ran)


def download() -> Path:
    """The source distribution of the Django that is installed, which contains its tests."""
    place = tempfile.mkdtemp(prefix="django-source-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
    wanted = f"django=={django.get_version()}"
    subprocess.run([*pip, "--no-binary", "django", wanted], check=True)
    (archive,) = Path(place).glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


def main(vendor: str, *labels: str) -> None:
    """Run Django's test runner on the modules, or on those with these labels."""
    source = os.environ.get("DJANGO_SOURCE")
    from django_asyncsession.testing.cases import SharingTestCase

    tests = (Path(source).resolve() if source else download()) / "tests"
    os.environ["SUITE_VENDOR"] = vendor
    django.test.TestCase = django.test.testcases.TestCase = SharingTestCase  # type: ignore[misc,assignment]
    SimpleTestCase._setup_and_call = setup_and_call  # type: ignore[attr-defined]
    os.chdir(tests)
    sys.path.insert(0, str(tests))
    sys.modules["django_suite"] = sys.modules["__main__"]
    options = ["--settings=tests.django_suite_settings", "--parallel=1", "--noinput"]
    sys.argv = ["runtests.py", *options, *(labels or MODULES)]
    runpy.run_path(str(tests / "runtests.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
