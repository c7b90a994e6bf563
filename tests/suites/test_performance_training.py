"""Performance: cost of training steps that are not those of the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from forge_harness.quant import absmax_int8, absmean_ternary, dequantize
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.types import Outcome


class OtherBatches(ReferenceSubject):
    """Sessions of each precision take batches of a size of their own."""

    def __init__(self, **sizes):
        self.sizes = sizes

    def tasks(self):
        return ("digits",)

    def session(self, task, options):
        size = self.sizes[options.precision]
        return super().session(task, replace(options, batch_size=size))


@pytest.mark.parametrize(
    ("check", "ternary", "full"),
    [
        ("performance.training_overhead", 16, 128),
        ("performance.peak_memory", 16, 128),
        ("performance.training_throughput", 128, 16),
    ],
)
def test_steps_over_other_batches_do_not_compare(run_check, check, ternary, full):
    """A ternary step cost less because it did less."""
    run = run_check(check, OtherBatches(ternary=ternary, full=full))
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    counts = f"{3 * ternary} in the ternary session and {3 * full} in the full-precision one"
    assert counts in run.reason


class TrainsElsewhere(ReferenceSubject):
    """Steps in a thread of their own, where no hook of this one sees what autograd saves."""

    def tasks(self):
        return ("digits",)

    def session(self, task, options):
        session = super().session(task, options)
        step, pool = session.step, ThreadPoolExecutor(1)
        session.step = lambda: pool.submit(step).result()
        return session


def test_memory_of_steps_that_nothing_shows_of_is_not_measured(run_check):
    run = run_check("performance.peak_memory", TrainsElsewhere())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "autograd saved nothing" in run.reason


class KeptOnContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.kept = [dequantize(*absmax_int8(x)), dequantize(*absmean_ternary(weight))]
        return ctx.kept[0] @ ctx.kept[1].t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.kept
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class KeepsOnContext(ReferenceSubject):
    """Keeps dequantized values for the backward, as attributes of the context."""

    def linear(self, x, weight, bias=None):
        y = KeptOnContext.apply(x, weight)
        return y if bias is None else y + bias


def test_what_a_function_keeps_on_its_context_counts(run_check):
    run = run_check("performance.peak_memory", KeepsOnContext())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "saved_ratio is" in run.reason
