"""Denoisers: exact, learned, wrapped, and in files."""
