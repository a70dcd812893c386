"""Compile once: shapes of queries, the plans that Django's compiler makes for them, and the code
that builds rows. Pure: nothing here awaits or talks to a database."""
