"""Wrong evaluations and exports go red even where loop and package agree, for any task."""

import pytest

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome

from .architecture_defects import Dropout
from .deployment_defects import (
    EvaluatesWith,
    ExportsTextWith,
    PredictsTheTokenAfterNext,
    RanksNeverSetEpoch,
    initial_gains,
    mean_of_batch_means,
    of_the_train_split,
    quality,
    rolled_embedding,
    top_two,
    with_digits_alone,
    without_the_last_batch,
)

DEFECTS = {
    "evaluates_the_train_split": (
        "eval_is_quantized",
        with_digits_alone(EvaluatesWith(of_the_train_split)),
        "loss_off_the_split is",
    ),
    "D14_drops_last_batch": (
        "eval_is_quantized",
        with_digits_alone(EvaluatesWith(without_the_last_batch)),
        "loss_off_the_split is",
    ),
    "D09_mean_of_means": (
        "eval_is_quantized",
        with_digits_alone(EvaluatesWith(mean_of_batch_means)),
        "loss_off_the_split is",
    ),
    "counts_the_second_choice": (
        "eval_is_quantized",
        with_digits_alone(EvaluatesWith(top_two)),
        "accuracy_off_the_split is",
    ),
    "T14_shifts_twice": (
        "eval_is_quantized",
        PredictsTheTokenAfterNext(),
        "bytes.loss_off_the_split is",
    ),
    "second_task_exports_rolled_embedding": (
        "eval_is_quantized",
        ExportsTextWith(rolled_embedding),
        "bytes.loss_difference is",
    ),
    "second_task_exports_initial_gains": (
        "eval_is_quantized",
        ExportsTextWith(initial_gains),
        "bytes.loss_difference is 0.0002",
    ),
    "D03_ranks_never_set_epoch": (
        "distributed_equivalence",
        RanksNeverSetEpoch(),
        "different_tensors is",
    ),
}
"""Test id (with the number of the defect list) -> check, subject, what the reason must name."""


@pytest.mark.parametrize(("check", "subject", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, subject, reason):
    result = run_check(f"training.{check}", subject)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


def test_a_subject_with_an_evaluation_of_its_own_is_sound(run_check):
    result = run_check("training.eval_is_quantized", EvaluatesWith(quality))
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("accuracy_off_the_split") == 0


class SmallDropout(Dropout):
    def tasks(self):
        return ("digits",)


def test_dropout_in_training_is_no_wrong_evaluation(run_check):
    result = run_check("training.eval_is_quantized", SmallDropout())
    assert result.outcome is Outcome.PASS, result.reason


class NoData:
    """Trains and exports, and shows no data: the split cannot be evaluated independently."""

    def __getattr__(self, name):
        if name in ("batch", "data_info"):
            raise AttributeError(name)
        return getattr(ReferenceSubject(), name)


def test_without_the_data_the_metric_is_not_measured(run_check):
    result = run_check("training.eval_is_quantized", NoData())
    assert result.outcome is Outcome.NOT_MEASURED
    assert "LoadsData" in result.reason
