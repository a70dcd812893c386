"""Bridged database wrappers, made from the wrapper class of an alias's own ENGINE."""
