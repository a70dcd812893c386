"""An ENGINE: Django's PostgreSQL backend as if its driver had no async mode."""
