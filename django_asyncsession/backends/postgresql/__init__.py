"""PostgreSQL with psycopg 3, natively async; usable as an ENGINE."""
