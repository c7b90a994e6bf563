"""Two arms are told apart by the losses of their first steps."""

import dataclasses

import torch

from forge_harness.protocols import TrainOptions
from forge_harness.subject.arms import FIRST_STEPS, first_steps, losses_of, one_arm, uneven
from forge_harness.subject.reference import ReferenceSubject


def session(precision):
    return ReferenceSubject().session("digits", TrainOptions(steps=4, precision=precision))


def test_two_precisions_are_two_arms_and_one_is_one():
    ternary, again, full = (
        losses_of(first_steps(session(p))) for p in ("ternary", "ternary", "full")
    )
    assert len(ternary) == FIRST_STEPS
    assert one_arm(ternary, full) == ""
    assert "full-precision session is its ternary one" in one_arm(ternary, again)


def test_a_first_loss_alone_tells_nothing_of_an_output_layer_of_zeros():
    sessions = session("ternary"), session("full")
    for each in sessions:
        torch.nn.init.zeros_(each.model.get_parameter("head.weight"))
    ternary, full = (losses_of(first_steps(each)) for each in sessions)
    assert ternary[0] == full[0]
    assert one_arm(ternary, full) == ""


def test_steps_over_other_numbers_of_samples_are_uneven():
    ternary, full = (first_steps(session(p)) for p in ("ternary", "full"))
    assert uneven(ternary, full) == ""
    assert "192 in the ternary session and 128 in" in uneven(ternary, full[:2])
    nameless = [dataclasses.replace(step, sample_ids=()) for step in full]
    assert "no step names its samples" in uneven(nameless, nameless)
