"""Commands that tests start as processes."""
