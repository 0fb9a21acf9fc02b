"""Makes `support` importable: pytest puts this file's folder on the path."""
