"""Formats of programs that train dictionaries."""
