"""What the command sets for libraries that would take a core or memory from everybody."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMAND = """
import sys
sys.argv = ["astroclip", "--version"]
from astroclip.cli import main
try:
    main()
except SystemExit:
    pass
"""
SPINNING = """
import time
import numpy as np
a = np.ones((600, 600), np.float32)
a @ a
time.sleep(0.01)
start = time.process_time()
time.sleep(0.3)
print(time.process_time() - start)
"""
POOL = """
import pyarrow
print(pyarrow.default_memory_pool().backend_name)
"""


def after_the_command(script: str, *unset: str, **given: str) -> str:
    """The last word that `script` prints in a process in which the command has run."""
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND + script],
        env={**environment, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[-1]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="BLAS has no threads on a single core")
def test_the_threads_of_numpys_blas_sleep_when_there_is_nothing_to_do():
    """By default they spin for a tenth of a second after each product."""
    of_the_tests = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT")
    assert float(after_the_command(SPINNING, *of_the_tests)) < 0.03


def test_arrow_takes_memory_where_everybody_does():
    """Its own allocator's memory is filled up to huge pages by the kernel, minutes later."""
    assert after_the_command(POOL, "ARROW_DEFAULT_MEMORY_POOL") == "system"


def test_the_environment_may_choose_arrows_allocator():
    assert after_the_command(POOL, ARROW_DEFAULT_MEMORY_POOL="mimalloc") == "mimalloc"
