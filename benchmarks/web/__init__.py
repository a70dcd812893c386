"""Requests per second: each contestant under uvicorn in a process of its own, and what loads it."""
