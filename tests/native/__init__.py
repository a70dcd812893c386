"""Tests of native mode: Django's own async methods in the current session."""
