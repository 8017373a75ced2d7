"""Threads of libraries that would take a core from everybody."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time
sys.argv = ["astroclip", "--version"]
from astroclip.cli import main
try:
    main()
except SystemExit:
    pass
import numpy as np
a = np.ones((600, 600), np.float32)
a @ a
time.sleep(0.01)
start = time.process_time()
time.sleep(0.3)
print(time.process_time() - start)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="BLAS has no threads on a single core")
def test_the_threads_of_numpys_blas_sleep_when_there_is_nothing_to_do():
    """By default they spin for a tenth of a second after each product."""
    one_thread = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT")  # the tests' own
    environment = {name: value for name, value in os.environ.items() if name not in one_thread}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 0.03
