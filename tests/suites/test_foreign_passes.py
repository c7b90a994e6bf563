"""Passes of a step that are not those of its samples as one batch, each by itself: what is held."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

ACCUMULATION, WINDOW = "training.accumulation_equivalence", "training.partial_window"
FINITE = "training.non_finite_stops"


class Balanced(foreign.Words):
    """Outputs should be used evenly over a batch, as a router's experts: a loss of training."""

    def loss(self, model, batch):
        logits = model(batch.inputs).flatten(0, -2)
        loss = F.cross_entropy(logits, batch.targets.flatten())
        share = logits.softmax(-1).mean(0)
        balance = foreign.VOCABULARY * share.square().sum()
        return loss + balance if model.training else loss


class BalancedByTheirCount(Balanced):
    """Micro-batches of unequal size count alike."""

    class loop(foreign.Loop):
        def losses(self, ids):
            size = -(-len(ids) // self.options.accumulation)
            parts = [ids[i : i + size] for i in range(0, len(ids), size)]
            for part in parts:
                batch = self.subject.batch("words", "train", part)
                yield self.subject.loss(self.model, batch) / len(parts)


class BalancedTwice(Balanced):
    """The model is called again after each micro-batch: which samples it had does not show."""

    class loop(foreign.Loop):
        def losses(self, ids):
            for loss in super().losses(ids):
                with torch.no_grad():
                    self.model(self.subject.batch("words", "train", ids[:1]).inputs)
                yield loss


class Normalised(foreign.Words):
    """With a batch norm, whose statistics a forward pass moves."""

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            self.batch_norm = nn.BatchNorm1d(foreign.WIDTH)

        def placed(self, ids):
            return self.batch_norm(super().placed(ids).transpose(1, 2)).transpose(1, 2)


class SpoilsStatistics(Normalised):
    class loop(foreign.Loop):
        def step(self):
            try:
                return super().step()
            except RuntimeError:
                self.model.batch_norm.running_var.fill_(torch.nan)
                raise


class SumOverAllPlaces(foreign.Words):
    """Divides by the places of a batch and one, in either mode: no mean over its targets."""

    def loss(self, model, batch):
        return super().loss(model, batch) * len(batch.inputs) / (len(batch.inputs) + 1)


class WarmsUp(foreign.Words):
    """Half of each run is in full precision: then quantization begins."""

    class loop(foreign.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            full = options.precision == "full"
            self.full_precision_steps = 0 if full else self.unquantized()
            self.begins = options.steps if full else self.unquantized()

        def unquantized(self):
            return self.options.steps // 2

        def step(self):
            for module in self.model.modules():
                if isinstance(module, foreign.BitLayer):
                    module.full = self.step_index < self.begins
            return super().step()


class WarmsUpUnsaid(WarmsUp):
    class loop(WarmsUp.loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            del self.full_precision_steps


class WarmsUpForLonger(WarmsUp):
    """It says half, and quantization never begins."""

    class loop(WarmsUp.loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            self.begins = options.steps


class WarmsUpTooLong(WarmsUp):
    class loop(WarmsUp.loop):
        def unquantized(self):
            return 100


class Carries(foreign.Words):
    """What a batch leaves is added to the next one (truncated backpropagation), by its model."""

    class net(foreign.Net):
        def __init__(self, seed):
            super().__init__(seed)
            self.register_buffer("carried", torch.zeros(foreign.WIDTH))

        def placed(self, ids):
            x = super().placed(ids)
            if not self.training:
                return x
            before, self.carried = self.carried, x.detach()[:, -1].mean(0)
            return x + before


class CarriesWhereNoStateShows(Carries):
    class net(Carries.net):
        def __init__(self, seed):
            super().__init__(seed)
            del self.carried
            self.carried = torch.zeros(foreign.WIDTH)


class LeavesGradients(foreign.Words):
    """Those of a step are added to those of the next one."""

    class loop(foreign.Loop):
        def step(self):
            self.optimizer.zero_grad = lambda *_, **__: None
            return super().step()


class AugmentsInItsLoop(foreign.Words):
    """Some tokens are replaced, where the harness cannot read them: in the loop."""

    class loop(foreign.Loop):
        def losses(self, ids):
            model = self.model
            self.model = lambda inputs: model(inputs.masked_fill(torch.rand(inputs.shape) < 0.1, 0))
            yield from super().losses(ids)
            self.model = model

        def step(self):
            model = self.model
            try:
                return super().step()
            finally:
                self.model = model


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        *((kind, check) for kind in (Balanced, Normalised) for check in (ACCUMULATION, WINDOW)),
        (Normalised, FINITE),
        (WarmsUp, ACCUMULATION),
        (WarmsUp, WINDOW),
        (WarmsUp, "training.overfit_one_batch"),
    ],
)
def test_sound_passes_are_no_false_alarm(run_check, subject, check):
    run = run_check(check, subject())
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize(
    ("subject", "check", "start", "words"),
    [
        (BalancedByTheirCount, ACCUMULATION, "gradient_difference_4 is", "the session's own micro"),
        (SumOverAllPlaces, ACCUMULATION, "gradient_difference_4 is", "2 steps of 4 micro-batches)"),
        (SpoilsStatistics, FINITE, "nan_in_one_gradient.changed is 1", "batch_norm.running_var"),
        (WarmsUpUnsaid, ACCUMULATION, "gradient_difference_1 is", "by full_precision_steps"),
        (WarmsUpForLonger, ACCUMULATION, "gradient_difference_1 is", "by full_precision_steps"),
        (CarriesWhereNoStateShows, ACCUMULATION, "gradient_difference_1 is", "is no buffer of its"),
        (LeavesGradients, ACCUMULATION, "gradient_difference_1 is", "left over from the step"),
        (AugmentsInItsLoop, ACCUMULATION, "gradient_difference_1 is", "belongs in batch"),
    ],
)
def test_a_defect_of_passes_shows_all_the_same(run_check, subject, check, start, words):
    run = run_check(check, subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith(start)
    assert words in run.reason


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        (BalancedTwice, "couples the samples of a batch in training mode, and which samples"),
        (WarmsUpTooLong, "full_precision_steps of the session is 100, and the run has 2 steps"),
    ],
)
def test_passes_that_cannot_be_made_again_are_not_measured(run_check, subject, words):
    run = run_check(ACCUMULATION, subject())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert words in run.reason


class NoNumberForZeros(foreign.Words):
    """Gradients where a token is all zeros are 0 times 1 over its scale of 0."""

    def linear(self, x, weight, bias=None):
        if (x == 0).all(-1).any():
            x, weight = x.clone(), weight.clone()
            for operand in (x, weight):
                operand.register_hook(lambda gradient: gradient * torch.nan)
        return super().linear(x, weight, bias)


@pytest.mark.parametrize("check", ["training.ste_input_gradient", "training.ste_weight_gradient"])
def test_a_gradient_that_is_no_number_is_the_worst(run_check, check):
    run = run_check(check, NoNumberForZeros())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "worst case: zero rows" in run.reason
