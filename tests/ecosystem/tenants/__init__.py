"""A site of two tenants with django-tenants: the shop's authors, in a schema for each."""
