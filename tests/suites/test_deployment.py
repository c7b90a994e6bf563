"""An evaluation of a subject's own, and one that nobody can repeat."""

import os

from forge_harness.drill.defects import all_benign
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome


def test_a_subject_with_an_evaluation_of_its_own_is_sound(run_check):
    subject = all_benign()["evaluation_of_its_own"].subject()
    result = run_check("training.eval_is_quantized", subject)
    assert result.outcome is Outcome.PASS, result.reason
    assert result.evidence("accuracy_off_the_split") == 0


class Unrepeatable(ReferenceSubject):
    """Each step adds noise that nobody seeds, as atomics of an accelerator do."""

    def tasks(self):
        return ("digits",)

    def session(self, task, options):
        def disturb(*_):
            session.model.get_parameter("head.weight").grad.mul_(1 + 1e-3 * os.urandom(1)[0])

        session = super().session(task, options)
        session.optimizer.register_step_pre_hook(disturb)
        return session


def test_a_run_that_does_not_repeat_is_not_held_to_have_been_changed_by_evaluating(run_check):
    result = run_check("training.eval_is_quantized", Unrepeatable())
    assert result.outcome is Outcome.PASS, result.reason
    assert "two runs of one seed differ" in result.evidence("after_evaluating")


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
