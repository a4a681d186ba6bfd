"""One thread that computes, and threads whose teams end with them."""

import os
import subprocess
import sys
import threading

import pytest

from diffa.hands import Hand, passing


def test_a_hand_is_one_thread_in_which_an_iterator_goes_on():
    hand, told = Hand(), []

    def count():
        for number in range(3):
            told.append(threading.get_ident())
            yield number

    assert list(hand.each(count())) == [0, 1, 2]
    assert set(told) == {hand(threading.get_ident)} and told[0] != threading.get_ident()


def test_a_hand_passes_arguments_and_errors_on():
    hand = Hand()
    assert hand(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        hand(divmod, 7, 0)

    def broken():
        yield 1
        raise KeyError("two")

    made = hand.each(broken())
    assert next(made) == 1
    with pytest.raises(KeyError, match="two"):
        next(made)


def test_what_passes_returns_or_raises_and_is_gone():
    seen = []

    def work(given):
        seen.append(threading.current_thread())
        return given + 1

    assert passing(work, 1) == 2
    assert seen[0] is not threading.current_thread() and not seen[0].is_alive()
    with pytest.raises(SystemExit):
        passing(sys.exit, 3)


_TEAMS = """
import os, time, torch
from diffa.hands import passing
torch.set_num_threads(2)
def threads():
    return len(os.listdir("/proc/self/task"))
def work():
    torch.ones(512, 512).mm(torch.ones(512, 512)).exp()
    return threads()
before, during = threads(), passing(work)
until = time.monotonic() + 10
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)  # the system's threads end a moment after Python's
after = threads()
print(before, during, after, work())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_a_team_ends_with_the_thread_that_started_it():
    """The main thread's own stays, which is why a server computes nothing there."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: there are no teams")
    program = [sys.executable, "-c", _TEAMS]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    before, during, after, stays = map(int, done.stdout.split())
    assert during >= before + 2, "the thread and one more of its team"
    assert after == before < stays
