"""One thread that computes on several cores, and others that do not."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from diffa.errors import DiffaError
from diffa.runtime.threads import ComputeThread, single_core


def test_a_hand_is_one_thread_in_which_an_iterator_goes_on():
    hand, told = ComputeThread(), []

    def count():
        for number in range(3):
            told.append(threading.get_ident())
            yield number

    assert list(hand.iterate(count())) == [0, 1, 2]
    assert set(told) == {hand(threading.get_ident)} and told[0] != threading.get_ident()


def test_a_hand_passes_arguments_and_errors_on():
    hand = ComputeThread()
    assert hand(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        hand(divmod, 7, 0)

    def broken():
        yield 1
        raise KeyError("two")

    made = hand.iterate(broken())
    assert next(made) == 1
    with pytest.raises(KeyError, match="two"):
        next(made)


def test_a_hand_has_the_cores_of_whoever_makes_it():
    """Not those that some other thread has set last, which is what new threads get."""
    done = _run(_CORES)
    assert done == ["2", "2"]


def test_single_core_for_a_while(monkeypatch):
    counts = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    with pytest.raises(KeyError), single_core():
        assert counts == [3, 1]
        raise KeyError
    assert counts == [3, 1, 3]


def test_a_hand_says_that_the_process_ends():
    hand = ComputeThread()
    hand._pool.shutdown()  # as Python does when it exits
    with pytest.raises(DiffaError, match="the process ends"):
        hand(print)


_CORES = """
import threading, torch
from diffa.runtime.threads import ComputeThread
torch.set_num_threads(2)
assert torch.get_num_threads() == 2  # asked once, a thread keeps its number
thread = threading.Thread(target=torch.set_num_threads, args=(1,))
thread.start()
thread.join()
print(torch.get_num_threads(), ComputeThread()(torch.get_num_threads))
"""
_TEAMS = """
import os, torch
from diffa.runtime.threads import single_core
torch.set_num_threads(2)
def work():
    torch.ones(512, 512).mm(torch.ones(512, 512)).exp()
    return len(os.listdir("/proc/self/task"))
before = len(os.listdir("/proc/self/task"))
with single_core():
    narrow = work()
print(before, narrow, work())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_a_thread_has_a_team_once_it_computes_on_several_cores():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: there are no teams")
    before, narrow, wide = map(int, _run(_TEAMS))
    assert before == narrow < wide


def _run(program: str) -> list[str]:
    words = [sys.executable, "-c", program]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
