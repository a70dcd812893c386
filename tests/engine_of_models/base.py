"""Derives from the engine that the environment names."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from django.apps import apps
from django.contrib.contenttypes.models import ContentType

base: Any = import_module(os.environ["ENGINE_OF_TEST"] + ".base")


class DatabaseWrapper(base.DatabaseWrapper):  # type: ignore[misc]
    """Knows a model, and what was ready when it was imported."""

    content_type = ContentType
    models_were_ready = apps.models_ready
