"""What the configuration says of training and quantization, held against what happens."""

import pytest

from forge_harness import oracles
from forge_harness.protocols import Packs, Quantizes, TrainOptions

STEPS = (1, 2, 7, 40, 301)
"""Run lengths: degenerate, odd, and one of the quick profile's size."""
FLOAT64_STEPS = 64
"""Rounding of some tens of float64 operations, in units of 2**-52."""


def tasks_of(subject):
    """Returns the subject's task names, or one placeholder when it names none."""
    return list(subject.tasks()) if hasattr(subject, "tasks") else ["default"]


@pytest.mark.forge_check("configuration.schedule_golden")
def test_schedule_golden(subject, evidence):
    """Learning rate and weight decay of every step equal the declared formula.

    Oracle: `oracles.schedule`, written from the text of `ScheduleSpec`. Tolerance: 64 units of
    float64 rounding, so an off-by-one of a single step (1e-3 and more) cannot hide.
    """
    worst, steps, wrong_lengths = 0.0, 0, 0
    for task in tasks_of(subject):
        for total in STEPS:
            options = TrainOptions(seed=0, steps=total)
            planned = list(subject.planned_schedule(task, options))
            expected = oracles.schedule(subject.schedule_spec(task, options))
            wrong_lengths += len(planned) != total or len(expected) != total
            for found, golden in zip(planned, expected, strict=False):
                steps += 1
                for name in ("learning_rate", "weight_decay"):
                    value, truth = getattr(found, name), getattr(golden, name)
                    worst = max(worst, abs(value - truth) / max(abs(truth), 1e-12))
    evidence.equal("plans_of_wrong_length", wrong_lengths, expected=0, reason="one entry a step")
    evidence.at_least("steps_compared", steps, limit=1, unit="steps", reason="over all tasks")
    evidence.at_most(
        "relative_error",
        worst,
        limit=FLOAT64_STEPS * 2.0**-52,
        reason="float64 rounding of the formula",
    )


@pytest.mark.forge_check("configuration.warmup_within_run")
def test_warmup_within_run(subject, evidence):
    """Warmup ends within the run, and the peak it leads to is reached, for short runs too."""
    too_long, never = [], []
    for task in tasks_of(subject):
        for total in STEPS:
            options = TrainOptions(seed=0, steps=total)
            spec = subject.schedule_spec(task, options)
            if spec.warmup_steps >= total:
                too_long.append(f"{task}: {spec.warmup_steps} of {total} steps")
            rates = [step.learning_rate for step in subject.planned_schedule(task, options)]
            # Two-stage schedules fall from the first step on: half the peak is what is left at
            # the boundary.
            if max(rates) < spec.peak / 2:
                never.append(f"{task}: {max(rates):.3g} of {spec.peak:.3g} in {total} steps")
    evidence.equal(
        "warmups_too_long", len(too_long), expected=0, reason="; ".join(too_long) or "all end"
    )
    evidence.equal(
        "peaks_never_reached", len(never), expected=0, reason="; ".join(never) or "all are reached"
    )


@pytest.mark.forge_check("configuration.quantization_consistent")
def test_quantization_consistent(subject, evidence):
    """The quantization the configuration states is that of the weights: modules, scale, packing.

    The two scale conventions differ by a factor of absmean squared and load alike; a swapped
    packing order keeps every statistic. Oracles: the weights the forward uses, and a column of
    eight codes whose packed bytes are written down.
    """
    for task in subject.tasks():
        info = subject.quantization_info(task)
        model = subject.build_model(task, seed=0)
        effective = subject.effective_weights(model)
        stated = set(info.excluded)
        quantized = {
            name
            for name, values in effective.items()
            if len(values.unique()) <= _levels(info, values)
        }
        evidence.equal(
            f"{task}_excluded_but_ternary",
            ", ".join(sorted(quantized & stated)) or "none",
            expected="none",
            reason="modules the configuration excludes",
        )
        evidence.equal(
            f"{task}_stated_but_not_ternary",
            ", ".join(sorted(set(effective) - quantized)) or "none",
            expected="none",
            reason=f"modules with more levels than granularity {info.granularity!r} allows",
        )
        matrices = {name for name, module in model.named_modules() if _has_matrix(module)}
        evidence.equal(
            f"{task}_unaccounted",
            ", ".join(sorted(matrices - set(effective) - stated)) or "none",
            expected="none",
            reason="every module with a matrix is quantized or excluded by name",
        )
    if isinstance(subject, Quantizes):
        _scale_convention(subject, info, evidence)
    if isinstance(subject, Packs) and info.packing == "i2-rowblock":
        _packing(subject, evidence)


def _levels(info, values):
    return 3 if info.granularity == "tensor" else 3 * values.shape[0]


def _has_matrix(module):
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _scale_convention(subject, info, evidence):
    import torch

    weight = torch.linspace(-0.03, 0.05, 96).reshape(8, 12)
    _, scale = subject.quantize_weight(weight)
    mean = float(weight.abs().double().mean())
    expected = mean if info.scale_convention == "multiply" else 1 / mean
    evidence.within(
        "scale",
        float(scale),
        low=expected * (1 - oracles.SCALE_RTOL),
        high=expected * (1 + oracles.SCALE_RTOL),
        reason=f"convention {info.scale_convention!r}, absolute mean {mean:.6g}",
    )


def _packing(subject, evidence):
    import numpy as np
    import torch

    codes = torch.as_tensor(np.asarray(oracles.KNOWN_CODES, dtype=np.int8)).reshape(-1, 1)
    packed = subject.pack(codes).flatten().tolist()
    evidence.equal(
        "packed_bytes",
        " ".join(f"{byte:02x}" for byte in packed),
        expected=" ".join(f"{int(byte):02x}" for byte in np.ravel(oracles.KNOWN_BYTES)),
        reason="eight codes whose bytes are written down",
    )
