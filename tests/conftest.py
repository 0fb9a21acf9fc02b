"""Makes `support` importable: pytest puts this file's folder on the path."""

from hypothesis import settings

# A busy host is no failure: no test asserts time.
settings.register_profile("any host", deadline=None)
settings.load_profile("any host")
