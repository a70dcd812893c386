"""Tools that production runs, each switched on in a process as its documentation says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from django.conf import Settings

SITE = Path(__file__).parent / "site"


def switch_on(name: str) -> None:
    """Switch a tool on, in a process that has not begun yet."""
    if "DJANGO_SETTINGS_MODULE" in os.environ:
        TOOLS[name]()


def _in_settings(change: Callable[[Any], None]) -> None:
    """Call `change` with the settings, when Django has read them and has loaded no app."""
    read = Settings.__init__

    def read_and_change(self: Settings, module: str) -> None:
        read(self, module)
        change(self)

    Settings.__init__ = read_and_change  # type: ignore[method-assign]


def saw(*args: Any) -> None:
    """Note that the tool saw this process do something; called by the tool."""
    global _saw
    if not _saw and (report := os.environ.get("ECOSYSTEM_REPORT")):
        _saw = True
        with open(report, "a", encoding="utf-8") as file:
            file.write(" ".join(sys.orig_argv) + "\n")


_saw = False


def environment(name: str, report: Path) -> dict[str, str]:
    """The environment of a process that has the tool, and its children; the processes in which it
    saw something are named in the file `report`."""
    return {
        **os.environ,
        "PYTHONPATH": str(SITE),
        "ECOSYSTEM_TOOL": name,
        "ECOSYSTEM_REPORT": str(report),
    }


def _opentelemetry() -> None:
    from opentelemetry import trace
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
    from opentelemetry.instrumentation.django import DjangoInstrumentor
    from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    from testproject import settings as shop

    class Exporter(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if any(span.name == "INSERT" for span in spans):
                saw()
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Exporter()))
    trace.set_tracer_provider(provider)
    AsyncPGInstrumentor().instrument()
    PsycopgInstrumentor().instrument()
    django = DjangoInstrumentor()
    django.instrument()
    if (middleware := django._opentelemetry_middleware) not in shop.MIDDLEWARE:
        # Which the shop's tests set in a process that has begun with others.
        shop.MIDDLEWARE.insert(0, middleware)


def _sentry() -> None:
    import sentry_sdk
    from sentry_sdk.integrations.django import DjangoIntegration

    class Nowhere(sentry_sdk.Transport):
        def capture_envelope(self, envelope: Any) -> None:
            if any(b"INSERT INTO" in item.get_bytes() for item in envelope.items):
                saw()

    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=Nowhere,
        traces_sample_rate=1.0,
        integrations=[
            DjangoIntegration(middleware_spans=True, cache_spans=True, db_transaction_spans=True),
        ],
    )


def _read_only() -> None:
    import django_read_only

    def install(settings: Any) -> None:
        settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "django_read_only"]

    _in_settings(install)
    blocker = django_read_only.blocker

    def seen(*args: Any) -> Any:
        saw()
        return blocker(*args)

    django_read_only.blocker = seen


def _tenants() -> None:
    _in_settings(_with_tenants)


def _with_tenants(settings: Any) -> None:
    settings.DATABASES = {
        "default": {
            **settings.DATABASES["default"],
            "ENGINE": "django_tenants.postgresql_backend",
        }
    }
    settings.DATABASE_ROUTERS = ["django_tenants.routers.TenantSyncRouter"]
    needed = ["django.contrib.contenttypes", "django_tenants", "tests.ecosystem.tenants"]
    settings.INSTALLED_APPS = list(dict.fromkeys([*settings.INSTALLED_APPS, *needed]))
    settings.SHARED_APPS = settings.INSTALLED_APPS
    settings.TENANT_APPS = ["testproject.shop"]
    settings.TENANT_MODEL = "tenants.Tenant"
    settings.TENANT_DOMAIN_MODEL = "tenants.Domain"
    settings.EXTRA_SET_TENANT_METHOD_PATH = "tests.ecosystem.tools.saw"


TOOLS: dict[str, Callable[[], None]] = {
    "opentelemetry": _opentelemetry,
    "sentry": _sentry,
    "read-only": _read_only,
    "tenants": _tenants,
}
