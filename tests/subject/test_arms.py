"""Two arms are told apart by the losses of their first steps."""

import torch

from forge_harness.protocols import TrainOptions
from forge_harness.subject.arms import FIRST_STEPS, first_losses, one_arm
from forge_harness.subject.reference import ReferenceSubject


def session(precision):
    return ReferenceSubject().session("digits", TrainOptions(steps=4, precision=precision))


def test_two_precisions_are_two_arms_and_one_is_one():
    ternary, again, full = (first_losses(session(p)) for p in ("ternary", "ternary", "full"))
    assert len(ternary) == FIRST_STEPS
    assert one_arm(ternary, full) == ""
    assert "full-precision session is its ternary one" in one_arm(ternary, again)


def test_a_first_loss_alone_tells_nothing_of_an_output_layer_of_zeros():
    sessions = session("ternary"), session("full")
    for each in sessions:
        torch.nn.init.zeros_(each.model.get_parameter("head.weight"))
    ternary, full = map(first_losses, sessions)
    assert ternary[0] == full[0]
    assert one_arm(ternary, full) == ""
