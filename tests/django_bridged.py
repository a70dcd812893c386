"""Runs Django's own sync tests in the bridge: `python tests/django_bridged.py VENDOR [LABEL ...]`.

VENDOR is postgresql, mysql or sqlite3; the labels are Django's test modules, by default those of
transactions. Django's whole test runner is one call of `bridge.run`, so that every query of every
test awaits an event loop. DJANGO_SOURCE names an unpacked source distribution of the Django that
is installed; without it, it is downloaded from the package index.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.django_suite import download

MODULES = ("transactions", "transaction_hooks")


def main(vendor: str, *labels: str) -> None:
    """Run the modules, and end with the exit code of Django's runner."""
    from django_asyncsession import bridge

    source = os.environ.get("DJANGO_SOURCE")
    tests = (Path(source).resolve() if source else download()) / "tests"
    os.environ["BRIDGED_VENDOR"] = vendor
    os.chdir(tests)
    sys.path.insert(0, str(tests))
    options = ["--settings=tests.django_bridged_settings", "--parallel=1", "--noinput"]
    sys.argv = ["runtests.py", *options, *(labels or MODULES)]

    def run() -> Any:
        bridge.answer_async_guards(lambda: None)
        try:
            runpy.run_path(str(tests / "runtests.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    async def in_the_bridge() -> Any:
        return await bridge.run(run)

    sys.exit(asyncio.run(in_the_bridge()))


if __name__ == "__main__":
    main(*sys.argv[1:])
