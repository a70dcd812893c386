"""Migrations of the models."""
