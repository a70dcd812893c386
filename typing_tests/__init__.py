"""Code that only type checkers run."""
