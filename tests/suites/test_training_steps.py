"""Defects of a step that show with micro-batches, beside the optimizer, or in its own optimizer."""

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from .step_defects import (
    ClipsEachMicroBatch,
    DecaysBeforehand,
    DecaysByHand,
    DecaysTowardsCodes,
    DropsMicroBatch,
    ReturnsPairs,
    ShiftsTwice,
    SkipsBadLosses,
    WithOwnAdam,
    captured_rate,
    last_group_keeps_its_first_rate,
    live_rate,
    schedules_each_micro_batch,
)
from .training_defects import SessionDefect, as_kind

DEFECTS = {
    "T12_per_micro_batch": (
        "schedule_trace",
        SessionDefect(schedules_each_micro_batch),
        "digits.accumulated.optimizer_error",
    ),
    "T05_clips_each_micro_batch": (
        "accumulation_equivalence",
        SessionDefect(as_kind(ClipsEachMicroBatch)),
        "clipped_difference",
    ),
    "drops_a_micro_batch": (
        "non_finite_stops",
        SessionDefect(as_kind(DropsMicroBatch)),
        "nan_in_the_first_of_two_losses.changed",
    ),
    "skips_bad_losses_of_a_model_that_returns_tuples": (
        "non_finite_stops",
        SkipsBadLosses(),
        "nan_in_the_loss.reported",
    ),
    "T08_by_hand": (
        "decay_groups",
        SessionDefect(as_kind(DecaysByHand)),
        "digits.moved_outside is 10",
    ),
    "T08_by_hand_before": (
        "decay_groups",
        SessionDefect(as_kind(DecaysBeforehand)),
        "digits.moved_outside is 10",
    ),
    "T09_towards_codes": (
        "decay_groups",
        SessionDefect(as_kind(DecaysTowardsCodes)),
        "digits.moved_outside is 6",
    ),
    "T09_towards_codes_in_the_schedule": (
        "schedule_trace",
        SessionDefect(as_kind(DecaysTowardsCodes)),
        "digits.moved_outside is 6",
    ),
    "T13_custom_optimizer": ("schedule_trace", WithOwnAdam(captured_rate), "digits.rate_response"),
    "T13_one_group_only": (
        "schedule_trace",
        SessionDefect(last_group_keeps_its_first_rate),
        "digits.rate_drift",
    ),
    "T14_shifted_twice": ("gradient_reaches_all", ShiftsTwice(), "bytes.target_elsewhere is inf"),
}


@pytest.mark.parametrize(("check", "subject", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, subject, reason):
    result = run_check(f"training.{check}", subject)
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith(reason), result.reason


def test_an_optimizer_of_ones_own_is_green(run_check):
    result = run_check("training.schedule_trace", WithOwnAdam(live_rate))
    assert result.outcome is Outcome.PASS, result.reason
    assert 0 < result.evidence("digits.rate_response") < 1


@pytest.mark.parametrize("check", ["non_finite_stops", "gradient_reaches_all"])
def test_a_model_that_returns_tuples_is_reached(run_check, check):
    result = run_check(f"training.{check}", ReturnsPairs())
    assert result.outcome is Outcome.PASS, result.reason
    name = "nan_in_the_loss.injected" if check == "non_finite_stops" else "digits.targets_moved"
    assert result.evidence(name) >= 1


class CallsForward(ReferenceSubject):
    """Calls `forward` of its models, which torch's hooks do not see."""

    def loss(self, model, batch):
        from forge_harness.training import training_loss

        return training_loss(model.forward, batch)


def test_a_fault_that_cannot_be_put_in_is_said_to_be_missing(run_check):
    result = run_check("training.non_finite_stops", CallsForward())
    assert result.outcome is Outcome.WARN, result.reason
    assert "nan_in_the_loss.injected is 0" in result.reason
