"""What is drawn is the same in every run, so that a red test is red again; `nox -s drawn` draws anew."""

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("anew", derandomize=False)
settings.load_profile("anew" if os.environ.get("DRAWN_ANEW") else "same")
