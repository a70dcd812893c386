"""Comparisons of this package with the driver under it and with other ORMs: `make bench`.

    python -m benchmarks --help

The scripts beside it measure one thing each, without competitors.
"""
