"""Optimizers that hold another one, as accelerate prepares them: their steps are seen as well."""

import importlib.util
from pathlib import Path

import pytest
from accelerate import Accelerator

from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

CHECKS = (
    "training.accumulation_equivalence",
    "training.clip_effective",
    "training.decay_groups",
    "training.gradient_reaches_all",
    "training.loss_within_band",
    "training.non_finite_stops",
    "training.overfit_one_batch",
    "training.parameters_move",
    "training.partial_window",
    "training.schedule_trace",
)


class Prepared(foreign.Words):
    class loop(foreign.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            accelerator = Accelerator(cpu=True)
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)


class OneGroup(Prepared):
    def groups(self, model):
        return [{"params": list(model.parameters())}]


class AtAnotherRate(Prepared):
    class loop(Prepared.loop):
        def step(self):
            handle = self.optimizer.optimizer.register_step_pre_hook(_faster)
            record = super().step()
            handle.remove()
            return record


def _faster(optimizer, *_):
    for group in optimizer.param_groups:
        group["lr"] *= 1.01


class KeepsGradients(Prepared):
    """Gradients are cleared after a step only: those of one that is stopped are left."""

    class loop(Prepared.loop):
        def step(self):
            self.optimizer.zero_grad, clear = lambda: None, self.optimizer.zero_grad
            try:
                record = super().step()
            finally:
                self.optimizer.zero_grad = clear
            clear()
            return record


@pytest.mark.parametrize("check", CHECKS)
def test_a_prepared_optimizer_is_no_false_alarm(run_check, check):
    run = run_check(check, Prepared())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check", "shows"),
    [
        (OneGroup, "training.decay_groups", "decay"),
        (AtAnotherRate, "training.schedule_trace", "update_error is"),
    ],
)
def test_what_a_prepared_optimizer_does_wrong_is_found(run_check, subject, check, shows):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert shows in run.reason


def test_a_step_that_fails_after_a_stopped_one_says_so(run_check):
    run = run_check("training.non_finite_stops", KeepsGradients())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "raised_after is RuntimeError: The total norm" in run.reason
