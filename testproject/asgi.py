"""The ASGI application: uvicorn testproject.asgi:application."""

from __future__ import annotations

import os

from django_asyncsession.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
application = get_asgi_application()
