"""Comparisons on real data, reported as they fall. One YAML each; ``python -m experiments FILE``."""
