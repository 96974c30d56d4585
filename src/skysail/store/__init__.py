"""Rows: the schema (every table, one file), the database (transactions) and its migrations."""
