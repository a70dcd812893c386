"""Tests of the pool, with fake connections and with real ones."""
