"""Settings of all tests of the model and its service."""

from hypothesis import settings

# Compiled functions take their time on the first call: a deadline per example would fail at random.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")
