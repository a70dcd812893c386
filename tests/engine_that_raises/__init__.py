"""An engine of a third party that cannot be imported, for a reason of its own."""
