"""Routers over many adapters of one base: ``python -m experiments.route``."""
