"""What is drawn is the same in every run, so that a red test is red again; `nox -s drawn` draws anew.

No test has a deadline: on a busy machine a drawn example took 0.3 s that takes half a millisecond, and was red.
A shell that starts the tests in the background lets them ignore SIGINT, and all that they start as well: not here.
"""

import os
import signal

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("anew", derandomize=False, deadline=None)
settings.load_profile("anew" if os.environ.get("DRAWN_ANEW") else "same")

signal.signal(signal.SIGINT, signal.default_int_handler)
