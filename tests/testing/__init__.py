"""Tests of the toolkit that the package has for tests."""
