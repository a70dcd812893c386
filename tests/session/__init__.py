"""Tests of what a user holds: a session, its results and streams, and what it leaves behind."""
