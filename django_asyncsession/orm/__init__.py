"""Models as tables: columns, queries on them, and rows that are read and written."""
