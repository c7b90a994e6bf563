"""Models that are trained in shards (FSDP2): sound ones pass, broken trainers do not."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from forge_harness.types import Outcome

BESIDE = Path(__file__).parents[1] / "subject"
CLIP = "training.clip_effective"
FAULTS = "training.non_finite_stops"
MICRO_BATCHES = "training.accumulation_equivalence"
CHECKS = (
    CLIP,
    FAULTS,
    MICRO_BATCHES,
    "training.decay_groups",
    "training.every_state_saved",
    "training.gradient_reaches_all",
    "training.loss_within_band",
    "training.optimizer_state_exact",
    "training.overfit_one_batch",
    "training.parameters_move",
    "training.partial_window",
    "training.repeat_bit_identical",
    "training.resume_bit_identical",
    "training.resume_twice_bit_identical",
    "training.schedule_trace",
    "training.ste_input_gradient",
    "training.ste_weight_gradient",
)
OF_THE_MODEL = (
    "architecture.causal_mask",
    "architecture.parameter_budget",
    "architecture.quantized_modules",
    "architecture.state_dict_round_trip",
    "architecture.sub_norm_present",
    "architecture.ternary_alphabet",
)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BESIDE))
    yield importlib.import_module("sharded_recipe")
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("check", "built_of_shards"),
    [(check, False) for check in CHECKS] + [(check, True) for check in (*CHECKS, *OF_THE_MODEL)],
)
def test_shards_are_no_false_alarm(run_check, module, check, built_of_shards):
    run = run_check(check, module.Sharded(built_of_shards=built_of_shards))
    assert run.outcome is Outcome.PASS, run.reason


def clipped_to_twice(parameters, limit, **options):
    return CLIPPED(parameters, 2 * limit, **options)


def unclipped(parameters, limit, **options):
    """The norm is that of the gradients, and nothing is done to them."""
    return nn.utils.get_total_norm([p.grad for p in parameters])


def silent(parameters, limit, **options):
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    return norm if math.isfinite(norm) else torch.ones(())


CLIPPED = nn.utils.clip_grad_norm_


@pytest.mark.parametrize("built_of_shards", [False, True])
@pytest.mark.parametrize(
    ("check", "clip", "shows"),
    [
        (CLIP, clipped_to_twice, "norm_at_optimizer is"),
        (CLIP, unclipped, "norm_at_optimizer is"),
        (FAULTS, silent, "nan_in_one_gradient.changed is"),
    ],
)
def test_a_trainer_of_shards_that_is_broken_is_found(
    run_check, module, monkeypatch, check, clip, shows, built_of_shards
):
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    run = run_check(check, module.Sharded(built_of_shards=built_of_shards))
    assert run.outcome is Outcome.FAIL, run.reason
    assert shows in run.reason


def test_micro_batches_that_count_too_much_are_found_in_shards(run_check, module):
    subject = module.Sharded()

    class Session(module.Session):
        def losses(self, ids):
            yield from (loss * 1.01 for loss in super().losses(ids))

    subject.loop = Session
    run = run_check(MICRO_BATCHES, subject)
    assert run.outcome is Outcome.FAIL, run.reason
