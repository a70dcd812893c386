"""A bounded pool of connections for one event loop; it knows no vendor and no settings."""
