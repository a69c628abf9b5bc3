"""A trial that takes too long."""

import subprocess
import sys
import threading
import time

import pytest

from tune_implicit.searches.timeout import EXIT_CODE, TrialTimeoutError, ended_after

DEAF = """
import time
from tune_implicit.searches import timeout
timeout.GRACE_S = 0.1
with timeout.ended_after(0.1, lambda: print("told", flush=True)):
    while True:
        try:
            time.sleep(60)
        except timeout.TrialTimeoutError:
            pass
"""


def test_one_that_hangs_is_ended() -> None:
    with pytest.raises(TrialTimeoutError, match=r"longer than `trial_timeout_s`, 0[.]05 s"), ended_after(0.05, list):
        time.sleep(60)


def test_one_that_ends_in_time_is_not() -> None:
    with ended_after(60.0, list):
        pass
    with ended_after(None, list):
        pass


def test_where_it_does_not_notice_its_process_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (EXIT_CODE, b"told\n")


def test_a_trial_in_another_thread_leaves_the_main_one_alone() -> None:
    seen = []

    def work() -> None:
        with ended_after(60.0, list):
            seen.append("ran")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["ran"]
