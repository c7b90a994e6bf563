"""Trainers whose optimizer computes the gradients itself, by a closure that `step` is given.

Lightning's automatic optimization does so: its hooks before the step see no gradient.
"""

import importlib.util
import time
from pathlib import Path

import pytest
from torch import nn

from forge_harness.subject.protocols import StepRecord
from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

ACCUMULATION = "training.accumulation_equivalence"
CLIPPING = "training.clip_effective"
DECAY = "training.decay_groups"
SCHEDULE = "training.schedule_trace"
CHECKS = (
    ACCUMULATION,
    CLIPPING,
    DECAY,
    "training.gradient_reaches_all",
    "training.non_finite_stops",
    "training.parameters_move",
    "training.partial_window",
    SCHEDULE,
)


class Closed(foreign.Words):
    def clip(self, parameters, limit):
        return nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)

    class loop(foreign.Loop):
        def rates(self):
            plan = self.plan[self.step_index]
            return plan.learning_rate, plan.weight_decay

        def step(self):
            start, (rate, decay) = time.perf_counter(), self.rates()
            for group in self.optimizer.param_groups:
                group["lr"], group["weight_decay"] = rate, decay * group.get("decays", 1.0)
            ids, norm = self.next_ids(), 0.0

            def closure():
                nonlocal norm
                self.optimizer.zero_grad()
                total = 0.0
                for loss in self.losses(ids):
                    loss.backward()
                    total += float(loss.detach())
                parameters = [p for p in self.model.parameters() if p.grad is not None]
                norm = float(self.subject.clip(parameters, self.options.clip_norm or 1.0))
                return total

            total = self.optimizer.step(closure)
            self.step_index += 1
            plan = self.plan[self.step_index - 1]
            return StepRecord(
                step=self.step_index - 1,
                loss=total,
                learning_rate=plan.learning_rate,
                weight_decay=plan.weight_decay,
                grad_norm=norm,
                sample_ids=tuple(ids),
                seconds=time.perf_counter() - start,
            )


class CountsTooMuch(Closed):
    class loop(Closed.loop):
        def losses(self, ids):
            yield from (loss * 1.01 for loss in super().losses(ids))


class DecaysAll(Closed):
    def groups(self, model):
        return [{"params": list(model.parameters())}]


class AtAnotherRate(Closed):
    class loop(Closed.loop):
        def rates(self):
            rate, decay = super().rates()
            return rate * 1.01, decay


class ClipsToTwice(Closed):
    def clip(self, parameters, limit):
        return super().clip(parameters, 2 * limit)


@pytest.mark.parametrize("check", CHECKS)
def test_gradients_of_a_closure_are_seen(run_check, check):
    run = run_check(check, Closed())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        (CountsTooMuch, ACCUMULATION),
        (DecaysAll, DECAY),
        (AtAnotherRate, SCHEDULE),
        (ClipsToTwice, CLIPPING),
    ],
)
def test_a_broken_trainer_with_a_closure_is_found(run_check, subject, check):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "nan" not in run.reason
