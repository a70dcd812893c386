"""Django's plain PostgreSQL wrapper, psycopg blocking, bridged by a thread of each connection."""

from __future__ import annotations

from django.db.backends.postgresql import base

from django_asyncsession.backends import threaded


class DatabaseWrapper(threaded.Mixin, base.DatabaseWrapper):
    """What any third-party backend becomes."""
