"""Commands for manage.py, and what they print."""
