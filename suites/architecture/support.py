"""What the checks of this suite share: layouts of an input, the worst of many cases, hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forge_harness import oracles

GAINS = frozenset({"weight", "gain", "gamma", "alpha", "scale"})
"""What vectors and numbers are called that multiply; biases begin at zero as a rule, and add."""
RESPONSE = 1e-3
"""Least relative change of an output that counts as a response; rounding is under 1e-5."""


@dataclass(slots=True)
class Worst:
    """The largest value over named cases. NaN counts as infinite, so that it cannot hide."""

    value: float = 0.0
    case: str = "none"
    cases: int = 0

    def see(self, case: str, value: float) -> None:
        """Takes one case into account."""
        self.cases += 1
        seen = math.inf if math.isnan(value) else float(value)
        if seen > self.value or self.cases == 1:
            self.value, self.case = seen, case

    def text(self, why: str) -> str:
        """Returns a reason: why the limit holds, and where the worst value was."""
        return f"{why}; worst of {self.cases} cases: {self.case}"


@dataclass(slots=True)
class Count:
    """Something counted over named cases, with the first case that had any."""

    total: int = 0
    cases: int = 0
    first: str = "none"

    def see(self, case: str, number: int | bool) -> None:
        """Takes one case into account."""
        self.cases += 1
        if number and not self.total:
            self.first = case
        self.total += int(number)

    def text(self, why: str) -> str:
        """Returns a reason: what must be so, and the first case where it was not."""
        return f"{why}; over {self.cases} cases, first: {self.first}"


def expect_none(evidence: Any, name: str, count: Count, unit: str, why: str) -> None:
    """Records a count that must be zero."""
    evidence.equal(name, count.total, expected=0, unit=unit, reason=count.text(why))


def tensor(array: np.ndarray) -> Tensor:
    """Returns a copy as a tensor; the directed inputs are shared between checks."""
    return torch.from_numpy(array.copy())


def layouts(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the values contiguous, column by column, and as a window into a poisoned buffer.

    The NaN around the window reaches every result that reads by flat index.
    """
    yield "contiguous", values
    yield "transposed", values.t().contiguous().t()
    rows, columns = values.shape
    buffer = torch.full((rows + 3, columns + 5), math.nan, dtype=values.dtype)
    window = buffer[1 : 1 + rows, 2 : 2 + columns]
    window.copy_(values)
    yield "window", window


def code_errors(codes: Tensor, expected: np.ndarray, margin: np.ndarray, limit: float) -> int:
    """Counts codes that differ although float64 leaves no doubt about them (margin > limit)."""
    wrong = oracles.int64(codes) != expected
    return int(np.count_nonzero(wrong & (margin > limit)))


def relative(value: Any, expected: Any) -> float:
    """Returns the largest |value - expected| / |expected|."""
    want = oracles.float64(expected)
    difference = np.abs(oracles.float64(value) - want)
    return float(np.max(difference / np.abs(want)))


def error_over_l1(value: Any, expected: np.ndarray, l1: np.ndarray) -> float:
    """Returns the largest |value - expected| / L1; where L1 is 0, any difference is infinite."""
    difference = np.abs(oracles.float64(value) - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / l1)
    return float(np.max(ratio, initial=0.0))


@dataclass(frozen=True, slots=True)
class Built:
    """A task's model with its declaration and one batch."""

    task: str
    spec: Any
    model: nn.Module
    batch: Any
    modules: dict[str, nn.Module] = field(default_factory=dict)
    fresh_gains: dict[str, Tensor] = field(default_factory=dict)
    """Sub-norm -> its gains as the model was built with them, of those that were drawn anew."""


def built(subject: Any, task: str, *, seed: int = 0, batch_size: int = 2) -> Built:
    """Builds the model of a task and a batch for it.

    The gains of declared sub-norms are drawn, times 0.75 to 1.25: fresh ones are alike, and
    whatever a model does to them, or in front of them, would change nothing. So are matrices and
    gains of zeros, as some layers and branches begin: nothing of what is behind one would show. And
    matrices of one magnitude, as gains of every head and scales of branches begin: nothing in them
    could trade places, and what is behind a small one would not show. Biases of zeros are drawn
    where a quantized module has them: left out, or within the scale, they would be the same.
    """
    model = subject.build_model(task, seed=seed)
    _draw_alike(model, seed)
    spec = subject.model_spec(task)
    fresh = _draw_gains(model, spec.sub_norms, seed)
    _draw_biases(model, spec.quantized, seed)
    batch = subject.example_batch(task, batch_size=batch_size, seed=seed + 1)
    modules = dict(model.named_modules(remove_duplicate=False))
    return Built(task, spec, model, batch, modules, fresh)


def _draw_alike(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.any():
                magnitudes = parameter.abs()
                if parameter.dim() > 1 and bool((magnitudes == magnitudes.max()).all()):
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_((0.75 + 0.5 * drawn).to(parameter) * parameter.sign())
                continue
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values.mul_(parameter.shape[-1] ** -0.5))
            elif name.rpartition(".")[2] in GAINS:
                parameter.copy_(0.75 + 0.5 * torch.rand(parameter.shape, generator=generator))


def _draw_gains(model: nn.Module, norms: Sequence[str], seed: int) -> dict[str, Tensor]:
    fresh: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in norms:
            gain = getattr(modules.get(name), "weight", None)
            if isinstance(gain, nn.Parameter) and gain.dim() == 1:
                fresh[name] = gain.clone()
                gain.mul_(0.75 + 0.5 * torch.rand(gain.shape, generator=generator).to(gain))
    return fresh


def _draw_biases(model: nn.Module, quantized: Sequence[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    for name in quantized:
        bias = getattr(modules.get(name), "bias", None)
        if isinstance(bias, nn.Parameter) and not bias.any():
            with torch.no_grad():
                bias.copy_(torch.randn(bias.shape, generator=generator))


def need_one_scale_a_weight(subject: Any) -> None:
    """Skips the check for a subject that declares, and has, a scale a row.

    `Quantizes.quantize_weight` returns one scale; what is computed with more has no oracle here.
    A subject that declares rows and returns one scale is measured, and so is one that returns rows
    without a word.
    """
    info = getattr(subject, "quantization_info", None)
    tasks = getattr(subject, "tasks", tuple)
    declared = {info(task).granularity for task in tasks()} if info else set()
    if "row" in declared and subject.quantize_weight(torch.eye(2, 3))[1].numel() > 1:
        pytest.skip("one scale a row is declared; Quantizes.quantize_weight is for one a weight")


def scale_groups(effective: Tensor) -> list[slice]:
    """Splits the rows of an effective weight into runs that share one magnitude.

    A weight with one scale is one run. Magnitudes within 1e-5 count as equal: the usual
    w + (wq - w).detach() misses wq by a rounding or two.
    """
    magnitudes = oracles.float64(effective.abs().flatten(1).amax(dim=1))
    groups: list[slice] = []
    start, current = 0, 0.0
    for row, magnitude in enumerate(magnitudes):
        if magnitude == 0:
            continue
        if current and abs(magnitude - current) > 1e-5 * current:
            groups.append(slice(start, row))
            start = row
        current = magnitude
    groups.append(slice(start, len(magnitudes)))
    return groups


def levels(values: Tensor) -> int:
    """Counts distinct values, those within 1e-6 of the largest magnitude as one (see above)."""
    ordered = np.unique(oracles.float64(values))
    if not np.all(np.isfinite(ordered)):
        return ordered.size + 1_000_000
    gap = 1e-6 * float(np.max(np.abs(ordered), initial=0.0))
    return 1 + int(np.count_nonzero(np.diff(ordered) > gap)) if ordered.size else 0
