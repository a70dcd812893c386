"""Tests of what is logged and advised: slow statements, leaks, a blocked loop."""
