"""Tests of what differs between databases, and of what all connections keep."""
