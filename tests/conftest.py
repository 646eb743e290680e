"""One thread a process: tests run side by side, and models this small gain nothing from more."""

import os

import pandas as pd
import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # also of the processes that tests start


@pytest.fixture(autouse=True)
def digits_as_pandas_shows_them():
    """A notebook that a test begins changes them for its whole process."""
    yield
    pd.reset_option("display.float_format")
