"""A database engine as a third party would write it, on top of Django's."""
