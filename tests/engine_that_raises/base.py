"""Raises what only its author knows."""

raise RuntimeError("this engine needs something")
