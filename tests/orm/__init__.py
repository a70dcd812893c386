"""Tests of models as tables: columns, queries, and rows that are written."""
