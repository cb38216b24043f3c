"""Configurations: plain data, read top to bottom."""
