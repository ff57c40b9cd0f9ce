"""Benchmarks of fusedres: timings, exact memory traffic and training parity. ``python -m benchmarks --help``."""
