"""What the tests let other processes do: importable without torch, which would be most of their time."""

import os
import resource
import time
import uuid
from contextlib import suppress
from pathlib import Path

from vaalign_lib.jobs import WORKER, report


def nap(folder):
    """Work for a long time."""
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def of_worker(number):
    report(1)
    return number, WORKER.together, os.environ["OMP_WAIT_POLICY"], os.getpid()


def faults_of_freeing(blocks):
    """Return at how many pages the system stepped in while so many blocks of 16 MiB were filled and freed,
    after the first few.
    """
    for k in range(blocks + 3):
        if k == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pair = [bytearray(2**24) for _ in range(2)]
        del pair
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def fails(folder):
    (folder / "begun").touch()
    raise ValueError("no job")


def job(folder, number):
    report(1)
    (Path(folder) / f"{number}-{uuid.uuid4().hex}").touch()
    if number < 0:
        raise ValueError(f"job {number}")
    return number, os.getpid()


def endless(folder):
    """Beat without ever reporting, as deep inside a trainer, deaf to ordinary exceptions."""
    while True:
        with suppress(Exception):
            (folder / "beat").write_text(str(time.time()))
            time.sleep(0.05)
