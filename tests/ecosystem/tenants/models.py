"""Who has a schema, and under which names it is served; the recipe for django-tenants."""

from __future__ import annotations

from typing import Any

from django.dispatch import receiver
from django_tenants.models import DomainMixin, TenantMixin

from django_asyncsession.signals import connection_leased


class Tenant(TenantMixin):
    """A tenant."""


class Domain(DomainMixin):
    """A host name of a tenant."""


@receiver(connection_leased)
def set_tenant(connection: Any, request: Any, **kwargs: Any) -> None:
    """Each connection that a session takes is its request's tenant's, until it gives it back."""
    if (tenant := getattr(request, "tenant", None)) is not None:
        connection.set_tenant(tenant)
