"""Tests of plans: shapes, what is shown of them, and what they give."""
