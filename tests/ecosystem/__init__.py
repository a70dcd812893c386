"""Tests with other packages, installed for real: `tox run -e ecosystem`, or TEST_ECOSYSTEM=1."""
