"""Settings whose passwords print as stars."""

from __future__ import annotations

import copy
import re
from collections.abc import Awaitable, Mapping
from typing import Any

from django_asyncsession.bridge import await_


class Secret(str):
    """A password that prints as stars, in error pages too, where the locals of each frame are
    shown."""

    def __repr__(self) -> str:
        return "'********'"


# What Django hides in the settings that its error pages show, and what may set anything.
_is_secret = re.compile(
    "API|AUTH|TOKEN|KEY|SECRET|PASS|SIGNATURE|^(options|init_command)$", re.IGNORECASE
).search


def _secret(value: Any) -> Any:
    """The password, masked; a callable is called for it at each connect, and awaited if it is a
    coroutine function."""
    if callable(value):
        value = value()
        if isinstance(value, Awaitable):
            value = await_(value)
    return Secret(value) if isinstance(value, str) else value


def masked(settings_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an alias's settings whose passwords print as stars, in its options too, however
    deep."""
    return {name: _masked(name, value) for name, value in settings_dict.items()}


def _masked(name: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {inner: _masked(inner, value[inner]) for inner in value}
    if isinstance(value, str) and _is_secret(str(name)):
        return Secret(value)
    return copy.deepcopy(value)
