"""In CI, Hypothesis draws the same examples every time, so that a red run is a change's doing and can be repeated."""

import os
import signal

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Under nohup, and behind a shell's &, Ctrl-C is ignored here and so in the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
