"""Tests, on one thread each: models this small only wait for a second, and more so beside others.

torch reads this once, as it is imported, and so does every process that a test starts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
