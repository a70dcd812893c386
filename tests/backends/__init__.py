"""Tests of the backends, below sessions."""
