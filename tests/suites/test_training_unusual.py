"""A subject that is right is green, however unlike the reference it is."""

import pytest

from forge_harness.types import Outcome

from .training_defects import NoAverageOverRanks, SessionDefect
from .unusual_subjects import (
    Dropout,
    DropsLastBatch,
    FillsTheBatch,
    FrozenNorms,
    GroupBetas,
    RowScales,
    WithReplacement,
    double_rate_of_matrices,
    half_rate_of_norms,
)

RIGHT = {
    "dropout": (
        Dropout(),
        (
            "accumulation_equivalence",
            "partial_window",
            "non_finite_stops",
            "repeat_bit_identical",
            "distributed_equivalence",
        ),
    ),
    "frozen_norms": (
        FrozenNorms(),
        ("non_finite_stops", "gradient_reaches_all", "decay_groups", "schedule_trace"),
    ),
    "half_rate_of_norms": (
        SessionDefect(half_rate_of_norms),
        ("schedule_trace", "decay_groups", "parameters_move"),
    ),
    "double_rate_of_matrices": (
        SessionDefect(double_rate_of_matrices),
        ("schedule_trace", "decay_groups", "parameters_move"),
    ),
    "one_scale_a_row": (RowScales(), ("ste_input_gradient", "ste_weight_gradient")),
    "betas_by_group": (GroupBetas(), ("schedule_trace",)),
    "drops_the_last_batch": (DropsLastBatch(), ("partial_window", "accumulation_equivalence")),
    "fills_the_last_batch": (FillsTheBatch(), ("partial_window",)),
}
CASES = [(name, check) for name, (_, checks) in RIGHT.items() for check in checks]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_unusual_subject_is_green(run_check, name, check):
    result = run_check(f"training.{check}", RIGHT[name][0])
    assert result.outcome is Outcome.PASS, result.reason


def test_samples_drawn_twice_are_still_found(run_check):
    result = run_check("training.partial_window", WithReplacement())
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith("repeated_samples"), result.reason


class HalvesAndDrops(NoAverageOverRanks, Dropout):
    """Each rank on its own half of the batch, with dropout."""


def test_ranks_that_do_not_average_are_found_with_dropout_too(run_check):
    result = run_check("training.distributed_equivalence", HalvesAndDrops())
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith("distance_over_dropout"), result.reason


class NoisyLoss(Dropout):
    """Random by other means than dropout."""

    def loss(self, model, batch):
        import torch

        loss = super().loss(model, batch)
        return loss * (1 + 0.1 * torch.rand(()))


def test_a_loss_that_is_random_otherwise_is_not_measured(run_check):
    result = run_check("training.accumulation_equivalence", NoisyLoss())
    assert result.outcome is Outcome.NOT_MEASURED, result.reason
    assert "random numbers" in result.reason
