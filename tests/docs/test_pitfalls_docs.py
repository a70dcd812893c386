"""The page on what requests share: each sentence is shown by a test, here or elsewhere.

With real connections, where sessions of two requests are open at the same time.
"""

from __future__ import annotations

import ast
import asyncio
import re
import threading
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from django.test import override_settings
from django.utils import timezone, translation

from django_asyncsession import DatabaseInterface, conf, threadlocals
from django_asyncsession.bridge import await_

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "pitfalls.rst").read_text(encoding="utf-8")
CODE = re.compile(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", re.MULTILINE)
BLOCKS = [dedent(block) for block in CODE.findall(PAGE)]

# What shows each sentence: the first words of it, and tests with their module. Sentences that
# introduce others need none.
SHOWN = {
    "Sync code of all requests runs in one thread": "test_pitfalls_docs.test_one_thread",
    "Code that was written for a thread of its own": "",
    "This page says which do": "",
    "The context variables, and with them": "test_pitfalls_docs.test_context_variables",
    "The exception that is being handled": (
        "test_handled.test_sync_code_of_a_session_sees_what_is_handled"
    ),
    "The contents of ``threading.local`` objects": (
        "test_threadlocals.test_sessions_at_the_same_time_see_their_own"
    ),
    "What it puts on Django's ``connection``": (
        "test_connection_state.test_the_wrapper_is_for_each_session_what_it_was_after_opening"
    ),
    "The next session finds the object": (
        "test_connection_state.test_what_receivers_of_connection_created_did_holds_also_after_a_reset"
    ),
    "What it sets on the server": (
        "test_next_session.test_postgresql test_next_session.test_mysql"
        " test_next_session.test_sqlite"
    ),
    "The connection is reset before": (
        "test_next_session.test_postgresql test_next_session.test_mysql"
        " test_next_session.test_sqlite"
    ),
    "Globals, class attributes": "test_pitfalls_docs.test_what_is_shared",
    "A ``threading.local`` that is not listed": "test_pitfalls_docs.test_what_is_shared",
    "What a package keeps by the number": "test_pitfalls_docs.test_what_is_shared",
    "A package that stamps rows": "test_pitfalls_docs.test_what_is_shared",
    "List it, and each session finds": (
        "test_threadlocals.test_sessions_at_the_same_time_see_their_own"
    ),
    "A name leads to the object": (
        "test_threadlocals.test_objects_and_classes_stand_for_what_is_in_them"
    ),
    "What is put there is empty": "test_threadlocals.test_a_session_keeps_them_between_its_calls",
    "In native mode the sessions": "test_threadlocals.test_native_mode_has_one_for_all_aliases",
    "Reads of ``session.gather`` and calls": (
        "test_threadlocals.test_reads_of_gather_begin_with_a_copy"
        " test_threadlocals.test_calls_at_the_same_time_begin_with_a_copy"
    ),
    "These packages need not be listed": "test_pitfalls_docs.test_every_known_package_is_named",
    "Nor does what keeps to asgiref": "test_pitfalls_docs.test_context_variables",
    "``manage.py check`` warns": (
        "test_threadlocals.test_what_an_app_has_and_is_not_listed_is_warned_of"
        " test_threadlocals.test_a_name_that_leads_nowhere_is_an_error"
    ),
    "What a sync middleware sets": (
        "test_threadlocals.test_what_a_sync_middleware_set_in_its_thread_is_not_carried"
    ),
    "What async code sets": (
        "test_threadlocals.test_what_async_code_and_threads_have_is_left_alone"
    ),
    "Queries on a model begin": (
        "test_managers.test_update_and_delete_are_those_of_the_queryset"
        " test_queries.test_reads_and_writes_see_what_the_default_manager_sees"
    ),
    "They go through the manager's": (
        "test_managers.test_rows_are_inserted_by_the_managers_own_bulk_create"
        " test_managers.test_update_and_delete_are_those_of_the_queryset"
    ),
    "A manager or a QuerySet that is given": (
        "test_managers.test_a_given_manager_or_queryset_is_taken_as_it_is"
    ),
    "What the manager filters by": (
        "test_managers.test_what_the_manager_sets_is_no_condition_of_the_query"
    ),
    "A ``bulk_create`` that does not end": (
        "test_managers.test_a_bulk_create_that_does_not_end_in_djangos_says_so"
    ),
    "A ``delete`` that does not tell": "test_managers.test_with_a_row_of_a_tree_go_those_below_it",
    "Loading relations, ``refresh``": "test_managers.test_rows_that_are_hidden_can_be_used",
    "``session.add`` of a loaded row": ("test_rows.test_add_writes_only_what_changed"),
    "A model with a ``save()`` of its own": (
        "test_managers.test_a_save_of_the_models_own_is_called_although_nothing_changed"
        " test_managers.test_receivers_hear_of_a_row_that_did_not_change"
    ),
    "A value that is written as it was": (
        "test_managers.test_a_value_that_is_the_same_in_the_column_is_no_change"
    ),
    "Set it in the session instead": (
        "test_threadlocals.test_what_a_sync_middleware_set_in_its_thread_is_not_carried"
    ),
}


def sentences() -> list[str]:
    """Those of the page, without headings and code."""
    text = re.sub(r"^.*\n[=-]{3,}\n", "\n", CODE.sub("\n\n", PAGE), flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|^\* ", text, flags=re.MULTILINE)
    joined = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [
        s for paragraph in joined if paragraph for s in re.split(r"(?<=\.) (?=[A-Z`])", paragraph)
    ]


@pytest.mark.parametrize("sentence", sentences())
def test_every_sentence_is_shown(sentence: str) -> None:
    shown = [tests for words, tests in SHOWN.items() if sentence.startswith(words)]
    assert len(shown) == 1, sentence
    for name in shown[0].split():
        module, test = name.split(".")
        (path,) = TESTS.rglob(f"{module}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert test in {getattr(node, "name", None) for node in tree.body}


def test_every_entry_belongs_to_a_sentence() -> None:
    assert not [words for words in SHOWN if not any(s.startswith(words) for s in sentences())]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_what_the_code_imports_and_sets_exists(number: int) -> None:
    for node in ast.walk(ast.parse(BLOCKS[number])):
        if isinstance(node, ast.ImportFrom) and "django_asyncsession" in str(node.module):
            module = import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ASYNC_SESSION":
            assert set(ast.literal_eval(node.value)) <= set(conf.DEFAULTS)


def test_every_known_package_is_named() -> None:
    named = PAGE.replace("-", "_")
    assert not [m for m in threadlocals.KNOWN if m.partition(".")[0] not in named]


async def together(db: DatabaseInterface, service: Any) -> list[Any]:
    """What sync code of two sessions returns; each gets a function that waits for the other."""
    both = asyncio.Barrier(2)

    async def request(name: str) -> Any:
        async with db.get_session(autocommit=True) as session:
            return await session.run_sync(service, name, lambda: await_(both.wait()))

    return list(await asyncio.gather(request("en"), request("de")))


async def test_one_thread(real_database: DatabaseInterface) -> None:
    def service(name: str, wait: Any) -> int:
        wait()
        return threading.get_ident()

    assert await together(real_database, service) == [threading.get_ident()] * 2


async def test_context_variables(real_database: DatabaseInterface) -> None:
    zones = {"en": "Europe/London", "de": "Europe/Berlin"}

    def service(name: str, wait: Any) -> tuple[str | None, str]:
        translation.activate(name)
        timezone.activate(zones[name])
        wait()
        return translation.get_language(), timezone.get_current_timezone_name()

    assert await together(real_database, service) == list(zones.items())


class Shared:
    """Places that know nothing of sessions."""

    local = threading.local()
    by_thread: dict[int, str] = {}  # noqa: RUF012
    last = ""


async def test_what_is_shared(real_database: DatabaseInterface) -> None:
    def service(name: str, wait: Any) -> tuple[str, str, str]:
        thread = threading.get_ident()
        Shared.local.user = Shared.by_thread[thread] = Shared.last = name
        wait()
        return Shared.local.user, Shared.by_thread[thread], Shared.last

    with override_settings(ASYNC_SESSION={}):
        first, second = await together(real_database, service)
    assert first == second
    del Shared.local.user
