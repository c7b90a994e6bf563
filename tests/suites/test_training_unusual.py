"""A subject that is right is green, however unlike the reference it is."""

import pytest
import torch

from forge_harness.drill.defects import all_benign
from forge_harness.types import Outcome

ELSEWHERE = {
    "adam_of_ones_own",
    "arithmetic_of_its_own",
    "evaluation_of_its_own",
    "hidden_transform",
    "reentrantly_checkpointed",
    "returns_pairs",
}
"""Tests in other files hold these to more than being green."""
CASES = [
    (kind, check)
    for kind in all_benign().values()
    if kind.id not in ELSEWHERE
    for check in kind.checks
    if check.startswith("training.")
]


@pytest.mark.parametrize(("kind", "check"), CASES, ids=lambda value: getattr(value, "id", value))
def test_unusual_subject_is_green(run_check, kind, check):
    result = run_check(check, kind.subject())
    assert result.outcome is Outcome.PASS, result.reason


def test_a_loss_that_is_random_otherwise_is_not_measured(run_check):
    subject = all_benign()["dropout_in_digits"].subject()
    usual = subject.loss
    # Random by other means than dropout.
    subject.loss = lambda model, batch: usual(model, batch) * (1 + 0.1 * torch.rand(()))
    result = run_check("training.accumulation_equivalence", subject)
    assert result.outcome is Outcome.NOT_MEASURED, result.reason
    assert "random numbers" in result.reason
