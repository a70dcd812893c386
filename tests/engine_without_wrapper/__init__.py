"""A package that is no engine."""
