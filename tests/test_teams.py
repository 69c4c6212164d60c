"""Loops that are run by threads which another library keeps."""

import ctypes
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import ropecy
from ropecy.kernels._parallel import Team

MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
TEAM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


class Recorded:
    """A team like OpenMP's, of threads that begin with each loop and end with it, and what it was asked for."""

    def __init__(self, late=0.0):
        self.asked, self.late = [], late
        self._function = TEAM(self._run)
        self.team = Team(ctypes.cast(self._function, ctypes.c_void_p).value)

    def _run(self, function, data, count, flags):
        self.asked.append((count, flags))
        member = MEMBER(function)
        others = [threading.Thread(target=member, args=(data,)) for _ in range(count - 1)]
        for thread in others:
            thread.start()
        member(data)
        for thread in others:
            thread.join()
        time.sleep(self.late)


def until_asked(team, compute):
    """What is computed when the team is asked again: one that was late, maybe in another test, rests for a while."""
    before, end = len(team.asked), time.monotonic() + 60
    while time.monotonic() < end:
        with team.team:
            found = compute()
        if len(team.asked) > before:
            return found
        time.sleep(0.05)
    raise AssertionError("no loop was given to the team")


@pytest.fixture
def compute(rng):
    """Exact attention with enough to do for three threads, and few queries with many keys."""
    Q, K, V = rng.standard_normal((3, 4, 400, 64), dtype=np.float32)
    return lambda: np.concatenate(
        [ropecy.attention(X, K, V, method="exact", threads=3).ravel() for X in (Q, Q[:, :2])]
    )


def test_a_team_runs_the_loops_of_its_block_alone(compute):
    expected = compute()
    team = Recorded()
    assert np.array_equal(until_asked(team, compute), expected)
    asked = list(team.asked)
    assert np.array_equal(compute(), expected)
    assert team.asked == asked
    assert all(2 <= count <= 3 and flags == 0 for count, flags in asked)


def test_another_thread_has_no_team(compute):
    team = Recorded()
    with team.team:
        other = threading.Thread(target=compute)
        other.start()
        other.join()
    assert not team.asked


def test_a_team_that_is_late_rests(compute):
    expected = compute()
    team = Recorded(late=0.005)  # so that it rests for half a second
    assert np.array_equal(until_asked(team, compute), expected)
    assert len(team.asked) == 1
    with team.team:
        assert np.array_equal(compute(), expected)
    assert len(team.asked) == 1
    until_asked(team, compute)


def test_no_team_changes_nothing(compute):
    expected = compute()
    with Team(0):
        assert np.array_equal(compute(), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_asks_no_team(compute):
    compute()
    team = Recorded()
    child = os.fork()
    if not child:
        with team.team:
            compute()
        os._exit(len(team.asked))
    assert os.waitpid(child, 0)[1] == 0


# A worker of a DataLoader does no more before it computes.
CHILD = """
import os, signal, torch, ropecy.torch

torch.set_num_threads(2)
torch.randn(4_000_000).exp_()  # PyTorch has a team now, and ropecy has run nothing
x = torch.ones(1, 4, 700, 64)
child = os.fork()
if not child:
    signal.alarm(60)
    torch.set_num_threads(1)
    ropecy.torch.scaled_dot_product_attention(x, x, x, method="exact", threads=2)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_does_not_wait_for_the_team_that_pytorch_had():
    pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", CHILD], check=True)


def test_operators_of_pytorch_run_on_a_team(monkeypatch):
    torch = pytest.importorskip("torch")
    import ropecy.torch as door
    from ropecy.torch import operators

    team, x = Recorded(), torch.randn(4, 400, 64, requires_grad=True)
    monkeypatch.setattr(operators, "torch_threads", team.team)
    out = door.scaled_dot_product_attention(x, x, x, method="exact", threads=3)

    def forward():
        door.scaled_dot_product_attention(x, x, x, method="exact", threads=3)

    def backward():
        out.sum().backward(retain_graph=True)

    end = time.monotonic() + 60
    for work in (forward, backward):
        team.asked.clear()
        while not team.asked and time.monotonic() < end:
            time.sleep(0.05)  # a team that was late rests
            work()
        assert team.asked
