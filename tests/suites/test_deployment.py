"""An evaluation of a subject's own, and one that nobody can repeat."""

import os

import pytest
import torch
from torch import nn

from forge_harness.drill.defects import all_benign
from forge_harness.drill.defects.sound_training import Averages, AveragingSession
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


class OneIsNoNumber(ReferenceSubject):
    """The last of three seeds ends in a loss that is no number."""

    def tasks(self):
        return ("digits",)

    def session(self, task, options):
        session = super().session(task, options)
        if options.seed == 2:
            evaluate = session.evaluate
            session.evaluate = lambda: {**evaluate(), "loss": float("nan")}
        return session


def test_a_median_hides_no_seed_that_is_no_number(run_check):
    result = run_check("training.eval_is_quantized", OneIsNoNumber())
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith("loss_difference is nan")


class WithStatistics(AveragingSession):
    """Both models have a batch norm; the averaged one may be given its statistics, or not."""

    copies = True

    def __init__(self, *args, **parts):
        super().__init__(*args, **parts)
        for model in (self.model, self.trained_model):
            model.seen = nn.BatchNorm1d(2, affine=False)
            # Packages of the reference have no place for them.
            model.seen._non_persistent_buffers_set.update(dict(model.seen.named_buffers()))

    def step(self):
        record = super().step()
        generator = torch.Generator().manual_seed(record.step)
        self.trained_model.seen(torch.randn(4, 2, generator=generator))
        if self.copies:
            for name, buffer in self.trained_model.seen.named_buffers():
                self.model.seen.get_buffer(name).copy_(buffer)
        return record


class WithoutThem(WithStatistics):
    copies = False


@pytest.mark.parametrize("kind", [WithStatistics, WithoutThem])
def test_statistics_of_batch_norms_go_with_the_averages(run_check, kind):
    class Subject(Averages):
        def tasks(self):
            return ("digits",)

        def session(self, task, options):
            return kind(task, options, **self._parts())

    result = run_check("training.eval_is_quantized", Subject())
    if kind.copies:
        assert result.outcome is Outcome.PASS, result.reason
        return
    assert result.outcome is Outcome.FAIL, result.reason
    assert result.reason.startswith("statistics_that_stay is 2 tensors")
