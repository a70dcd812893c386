"""Tests of SQLite."""
