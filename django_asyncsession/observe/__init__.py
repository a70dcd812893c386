"""What happens on the database, told to whoever runs it: statements that are slow, sessions that
keep their connection."""
