"""One connection and its transaction: taken when needed, used by one task at a time, given back
clean."""
