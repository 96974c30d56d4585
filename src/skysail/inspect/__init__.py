"""Looks at a cloud without changing it: rows, and what its hosts really hold."""
