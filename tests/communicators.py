"""Channels' communicators, without daphne: its package imports that for the live server, which no
test here uses."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest import mock

_daphne = ModuleType("daphne.testing")
_daphne.DaphneProcess = None  # type: ignore[attr-defined]
_missing = importlib.util.find_spec("daphne") is None
_modules = {"daphne": ModuleType("daphne"), "daphne.testing": _daphne} if _missing else {}

# What the block imports stays: only the stand-ins go.
with mock.patch.dict(sys.modules, _modules):
    from channels.testing import HttpCommunicator, WebsocketCommunicator

    _imported = {name: module for name, module in sys.modules.items() if "daphne" not in name}
sys.modules.update(_imported)

__all__ = ["HttpCommunicator", "WebsocketCommunicator"]
