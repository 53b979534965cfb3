"""Denoisers: exact, learned and wrapped ones, and their serialization."""
