"""Tests of transactions: who has the turn, nested blocks, levels, and how they end."""
