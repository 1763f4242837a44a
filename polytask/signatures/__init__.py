"""Kinds of signatures, a file each."""
