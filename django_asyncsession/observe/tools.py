"""Whether a tool has put itself where it sees each statement that passes Django's cursors."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType
from typing import Any, Final

import django
from django.db.backends import utils
from django.db.models.sql.compiler import SQLCompiler

_DJANGO: Final = str(Path(django.__file__).parent)
# Of each function that was there when somebody asked, whether it is Django's.
_is_own: dict[Any, bool] = {}


def is_watched() -> bool:
    """Whether one of the functions that statements pass is not Django's own: then each statement
    has to go that way."""
    cursor = utils.CursorWrapper
    for function in (cursor.execute, cursor._execute, SQLCompiler.execute_sql):  # type: ignore[attr-defined]
        if type(function) is not FunctionType:
            # A proxy, which may say of everything that it is what it stands for.
            return True
        own = _is_own.get(function)
        if own is None:
            code = getattr(function, "__code__", None)
            own = _is_own[function] = code is not None and code.co_filename.startswith(_DJANGO)
        if not own:
            return True
    return False
