"""SQLite with the standard library, each connection in its own thread; usable as an ENGINE."""
