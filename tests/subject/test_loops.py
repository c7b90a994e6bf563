"""A loop of its own goes one step at a time, ends as it would, and is not kept for ever."""

import gc
import weakref

import pytest
import torch

from forge_harness.subject.loops import LoopEndedError, SteppedLoop


def test_a_loop_waits_between_steps():
    seen = []

    def train(pause):
        for step in range(3):
            seen.append(step)
            pause(step * 10)
        seen.append("end")

    loop = SteppedLoop(train)
    assert seen == []
    assert [loop.advance(), loop.advance()] == [0, 10]
    assert seen == [0, 1]
    assert loop.advance() == 20
    for _ in range(2):
        with pytest.raises(LoopEndedError, match="is at its end"):
            loop.advance()
    assert seen == [0, 1, 2, "end"]


def test_what_a_loop_raises_is_raised_where_the_step_was_asked_for():
    def train(pause):
        pause(0)
        raise FloatingPointError("loss is nan")

    loop = SteppedLoop(train)
    loop.advance()
    with pytest.raises(FloatingPointError, match="loss is nan"):
        loop.advance()
    with pytest.raises(LoopEndedError, match="ended with FloatingPointError: loss is nan"):
        loop.advance()


def test_loops_take_turns_and_may_be_advanced_by_one_another():
    def count(pause):
        for step in range(3):
            pause(step)

    inner = SteppedLoop(count)

    def both(pause):
        pause(("outer", inner.advance()))
        pause(("outer", inner.advance()))

    outer = SteppedLoop(both)
    found = [outer.advance(), inner.advance(), outer.advance()]
    assert found == [("outer", 0), 1, ("outer", 2)]


def test_a_loop_that_is_dropped_is_ended_and_collected():
    ended = []

    def begin():
        model = torch.nn.Linear(2, 2)

        def train(pause):
            try:
                while True:
                    pause(model.weight)
            finally:
                ended.append(True)

        return SteppedLoop(train), weakref.ref(model)

    loop, model = begin()
    loop.advance()
    assert model() is not None
    del loop
    gc.collect()
    assert ended == [True]
    assert model() is None
