"""Sessions that train what others put around the model or its optimizer: the steps are seen.

DDP, torch.compile of all or of layers, and accelerate, whose optimizer has none of torch's hooks.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed, nn

from forge_harness.types import Outcome

PATH = Path(__file__).parents[1] / "subject" / "foreign_language_model.py"
SPEC = importlib.util.spec_from_file_location("foreign_language_model", PATH)
foreign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(foreign)

ACCUMULATION = "training.accumulation_equivalence"
CHECKS = (
    ACCUMULATION,
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


def in_ddp(model, optimizer):
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model), optimizer


def compiled(model, optimizer):
    return torch.compile(model, backend="eager"), optimizer


def compiled_by_layers(model, optimizer):
    model.blocks = nn.ModuleList(torch.compile(b, backend="eager") for b in model.blocks)
    return model, optimizer


def prepared(model, optimizer):
    return Accelerator(cpu=True).prepare(model, optimizer)


class Wrapped(foreign.Words):
    class loop(foreign.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            self.model, self.optimizer = subject.wrap(self.model, self.optimizer)

    def __init__(self, wrap):
        self.wrap = wrap


@pytest.fixture(autouse=True)
def _group():
    yield
    torch.compiler.reset()
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [in_ddp, compiled, compiled_by_layers, prepared])
@pytest.mark.parametrize("check", CHECKS)
def test_a_wrapped_model_is_no_false_alarm(run_check, check, wrap):
    run = run_check(check, Wrapped(wrap))
    assert run.outcome is Outcome.PASS, run.reason


@pytest.mark.parametrize("wrap", [in_ddp, compiled])
def test_an_autocast_around_a_wrapped_model_is_seen(run_check, wrap):
    class Autocast(Wrapped):
        class loop(Wrapped.loop):
            def step(self):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return super().step()

    run = run_check(ACCUMULATION, Autocast(wrap))
    assert run.outcome is Outcome.PASS, run.reason


def in_bf16(model, optimizer):
    """accelerate puts the autocast inside the model's own `forward`."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model, optimizer)


@pytest.mark.parametrize("check", [ACCUMULATION, "training.partial_window"])
def test_an_autocast_inside_a_prepared_model_is_seen(run_check, check):
    try:
        run = run_check(check, Wrapped(in_bf16))
    finally:
        AcceleratorState._reset_state()
    assert run.outcome is Outcome.PASS, run.reason


class CountsTooMuch(Wrapped):
    class loop(Wrapped.loop):
        def losses(self, ids):
            yield from (loss * 1.01 for loss in super().losses(ids))


class DecaysAll(Wrapped):
    def groups(self, model):
        return [{"params": list(model.parameters())}]


class AtAnotherRate(Wrapped):
    class loop(Wrapped.loop):
        def step(self):
            held = getattr(self.optimizer, "optimizer", self.optimizer)
            handle = held.register_step_pre_hook(_faster)
            record = super().step()
            handle.remove()
            return record


def _faster(optimizer, *_):
    for group in optimizer.param_groups:
        group["lr"] *= 1.01


@pytest.mark.parametrize("wrap", [in_ddp, compiled, prepared])
@pytest.mark.parametrize(
    ("subject", "check"),
    [
        (CountsTooMuch, ACCUMULATION),
        (DecaysAll, "training.decay_groups"),
        (AtAnotherRate, "training.schedule_trace"),
    ],
)
def test_a_broken_trainer_of_a_wrapped_model_is_found(run_check, subject, check, wrap):
    run = run_check(check, subject(wrap))
    assert run.outcome is Outcome.FAIL, run.reason


class KeepsGradients(Wrapped):
    """Gradients are cleared after a step only: those of one that is stopped are left."""

    class loop(Wrapped.loop):
        def step(self):
            self.optimizer.zero_grad, clear = lambda: None, self.optimizer.zero_grad
            try:
                record = super().step()
            finally:
                self.optimizer.zero_grad = clear
            clear()
            return record


def test_a_step_that_fails_after_a_stopped_one_says_so(run_check):
    run = run_check("training.non_finite_stops", KeepsGradients(prepared))
    assert run.outcome is Outcome.FAIL, run.reason
    assert "raised_after is RuntimeError: The total norm" in run.reason
