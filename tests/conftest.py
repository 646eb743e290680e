"""One thread a process: tests run side by side, and models this small gain nothing from more."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # also of the processes that tests start
