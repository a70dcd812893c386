"""The founding document's test and the shop's pass as they are, in processes that have a tool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ecosystem.tools import TOOLS, environment

ROOT = Path(__file__).parents[2]
FILES = ["tests/test_seed.py", "tests/testproject"]
# django-tenants migrates PostgreSQL only.
ONLY = {"tenants": ["-k", "not sqlite and not mysql"]}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", TOOLS)
def test_the_tests_of_the_seed_and_of_the_shop_pass_unchanged(tool: str, tmp_path: Path) -> None:
    report = tmp_path / "report"
    env = {
        **environment(tool, report),
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "TEST_DATABASE_NAME": f"{os.environ['TEST_DATABASE_NAME']}_{tool.replace('-', '_')}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    # What starts with the interpreter is there before pytest.
    imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    options = ["-W", imported, "--maxfail=5", *ONLY.get(tool, [])]
    done = subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    # The tool was there, and saw something, in the tests themselves and in the server they start.
    processes = report.read_text(encoding="utf-8")
    assert "pytest" in processes and "uvicorn" in processes
