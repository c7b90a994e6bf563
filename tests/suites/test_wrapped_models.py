"""Sessions that train what DDP or torch.compile puts around the model: its steps are seen."""

import importlib.util
from pathlib import Path

import pytest
import torch
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


def in_ddp(model):
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_by_layers(model):
    model.blocks = nn.ModuleList(compiled(block) for block in model.blocks)
    return model


class Wrapped(foreign.Words):
    class loop(foreign.Loop):
        def __init__(self, subject, options):
            super().__init__(subject, options)
            self.model = subject.wrap(self.model)

    def __init__(self, wrap):
        self.wrap = wrap


@pytest.fixture(autouse=True)
def _group():
    yield
    torch.compiler.reset()
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [in_ddp, compiled, compiled_by_layers])
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


class CountsTooMuch(Wrapped):
    class loop(Wrapped.loop):
        def losses(self, ids):
            yield from (loss * 1.01 for loss in super().losses(ids))


class DecaysAll(Wrapped):
    def groups(self, model):
        return [{"params": list(model.parameters())}]


@pytest.mark.parametrize("wrap", [in_ddp, compiled])
@pytest.mark.parametrize(
    ("subject", "check"), [(CountsTooMuch, ACCUMULATION), (DecaysAll, "training.decay_groups")]
)
def test_a_broken_trainer_of_a_wrapped_model_is_found(run_check, subject, check, wrap):
    run = run_check(check, subject(wrap))
    assert run.outcome is Outcome.FAIL, run.reason
