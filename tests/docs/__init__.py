"""Tests of the README and of the guides: what they say and show holds."""
