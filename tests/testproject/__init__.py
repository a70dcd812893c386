"""Tests of the test project, the shop."""
