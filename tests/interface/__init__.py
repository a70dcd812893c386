"""Tests of databases and their interfaces."""
