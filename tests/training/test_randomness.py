"""One set of generators in a process, and sessions that do not notice each other."""

from __future__ import annotations

import multiprocessing
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from forge_harness.training.randomness import RandomState


def draws(state: RandomState, times: int) -> list[tuple[float, float, float]]:
    found = []
    for _ in range(times):
        with state.active():
            found.append((float(torch.rand(())), float(np.random.rand()), random.random()))
    return found


def test_two_threads_draw_what_each_would_alone() -> None:
    alone = [draws(RandomState(seed), 200) for seed in range(4)]
    start = threading.Barrier(4)

    def together(seed: int) -> list[tuple[float, float, float]]:
        start.wait(30)
        return draws(RandomState(seed), 200)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(together, range(4))) == alone


def test_states_nest() -> None:
    outer, inner = RandomState(1), RandomState(2)
    with outer.active():
        first = torch.rand(())
        with inner.active():
            nested = torch.rand(())
        second = torch.rand(())
    with RandomState(1).active():
        assert torch.equal(torch.stack([first, second]), torch.rand(2))
    with RandomState(2).active():
        assert torch.equal(nested, torch.rand(()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_it_does_not_have() -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with RandomState(0).active():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(60)
        child = multiprocessing.get_context("fork").Process(target=RandomState, args=(1,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
    finally:
        done.set()
        thread.join()
