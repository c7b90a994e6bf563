"""Seconds of a training step: ternary against full precision, all in the same trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from forge_harness.model import ByteLM, ByteLMConfig
from forge_harness.protocols import Precision, StepRecord, TrainOptions
from forge_harness.training import QATSession
from forge_harness.training.randomness import RandomState

from . import torchao
from .timing import disturbed_of, interleave, samples_of, speedup, void_of

BASELINE = "full"
CONTEXT = 128
"""Tokens of a sample of the task `bytes`."""
_STEPS = 1_000_000
"""A schedule that no measurement comes to the end of: steps of its warmup cost what others do."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to make the step.

    Attributes:
        name: As the table shows it.
        precision: Of the model that is built.
        extra: `TrainOptions.extra`.
        torchao: Whether torchao's training weights take the place of the model's.
    """

    name: str
    precision: Precision = "ternary"
    extra: Mapping[str, Any] = field(default_factory=dict)
    torchao: bool = False

    def compiled(self) -> Arm:
        """Returns the same through torch.compile."""
        extra = {**self.extra, "compile": True}
        return dataclasses.replace(self, name=f"{self.name}, compiled", extra=extra)


FULL = Arm(BASELINE, "full")
ARMS = (
    FULL,
    Arm("full, bf16 autocast", "full", {"autocast": True}),
    Arm("ternary, exact", extra={"compute": "exact"}),
    Arm("ternary, int8", extra={"compute": "int8"}),
)
TORCHAO = Arm("torchao", "full", torchao=True)


@dataclass(frozen=True, slots=True)
class Steps:
    """What steps with a number of threads cost.

    Attributes:
        threads: Of torch and of the kernels.
        milliseconds: Arm -> median of a whole step: forward, backward, clipping, AdamW.
        over_full: Arm -> (estimate, low, high) of its time over that of full-precision eager fp32.
        over_torchao: Ternary arm -> (estimate, low, high) of times faster than torchao's, eager
            over eager and compiled over compiled.
        first_loss: Arm -> loss of the first step in nats, on the same samples from the same
            weights: what differs is the arithmetic.
        samples: Arm -> seconds of a step, one entry a round.
        disturbed: Arm -> whether another process took the core, one entry a round.
        void: Candidates and ratios of which too few rounds were undisturbed; see `timing.void_of`.
    """

    threads: int
    milliseconds: dict[str, float]
    over_full: dict[str, tuple[float, float, float]]
    over_torchao: dict[str, tuple[float, float, float]]
    first_loss: dict[str, float]
    samples: dict[str, list[float]] = field(repr=False, default_factory=dict)
    disturbed: dict[str, list[bool]] = field(repr=False, default_factory=dict)
    void: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepsMeasured:
    """What `measure` found.

    Attributes:
        parameters: Of the model.
        tokens: Of a step.
        steps: For each number of threads.
    """

    parameters: int
    tokens: int
    steps: list[Steps]


def measure(
    *,
    width: int = 256,
    layers: int = 2,
    batch: int = 16,
    threads: tuple[int, ...] = (1, 2),
    rounds: int = 15,
    compiled: bool = False,
    with_torchao: bool = False,
    so_far: Callable[[StepsMeasured], object] = lambda found: None,
) -> StepsMeasured:
    """Times steps of the byte language model at a size, on the reference data.

    Args:
        width: D; the feed-forward is 3 D wide, a head has 64 entries.
        layers: Blocks.
        batch: Samples of 128 tokens a step.
        threads: Numbers of threads to time with.
        rounds: Steps of each arm, which take turns.
        compiled: Also time each arm but autocast through torch.compile; needs a C++ compiler.
        with_torchao: Also time torchao's `bitnet_training`.
        so_far: Told what was found after each number of threads.

    Raises:
        UsageError: torchao is not there.
        ValueError: The sizes make no model.
    """
    config = ByteLMConfig(
        width=width, layers=layers, heads=max(1, width // 64), hidden=3 * width, context=CONTEXT
    )
    arms = [*ARMS, *([TORCHAO] if with_torchao else [])]
    if compiled:
        arms += [arm.compiled() for arm in arms if "autocast" not in arm.extra]
    if with_torchao:
        torchao.check()
    parameters = sum(p.numel() for p in _built(FULL, config).parameters())
    measured = StepsMeasured(parameters, batch * CONTEXT, steps=[])
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            measured.steps.append(_steps(arms, config, batch, rounds, count))
            so_far(measured)
    finally:
        torch.set_num_threads(before)
    return measured


def _steps(arms: list[Arm], config: ByteLMConfig, batch: int, rounds: int, threads: int) -> Steps:
    # Compiled code has the number of threads in it.
    torch.compiler.reset()
    sessions = {arm.name: _session(arm, config, batch) for arm in arms}
    first = {name: session.step() for name, session in sessions.items()}
    _check_same_samples(first)
    timed = interleave({n: s.step for n, s in sessions.items()}, rounds=rounds, batch=0.0)
    over = {}
    for arm in arms:
        if arm.name != BASELINE and (found := speedup(timed[BASELINE], timed[arm.name])):
            over[arm.name] = (found.estimate, found.low, found.high)
    ratios = [(name, BASELINE) for name in over]
    over_torchao = {}
    for arm in arms:
        peer = TORCHAO.compiled() if "compile" in arm.extra else TORCHAO
        if arm.precision != "ternary" or peer.name not in timed:
            continue
        if found := speedup(timed[arm.name], timed[peer.name]):
            over_torchao[arm.name] = (found.estimate, found.low, found.high)
            ratios.append((peer.name, arm.name))
    return Steps(
        threads=threads,
        milliseconds={name: 1e3 * each.median for name, each in timed.items()},
        over_full=over,
        over_torchao=over_torchao,
        first_loss={name: record.loss for name, record in first.items()},
        samples=samples_of(timed),
        disturbed=disturbed_of(timed),
        void=void_of(timed, ratios),
    )


def _session(arm: Arm, config: ByteLMConfig, batch: int) -> QATSession:
    # Both precisions otherwise start with a learning rate and a gain of their own.
    options = TrainOptions(
        steps=_STEPS,
        precision=arm.precision,
        batch_size=batch,
        learning_rate=1e-3,
        extra={"residual_gain": 1.0, **arm.extra},
    )
    return QATSession("bytes", options, build_model=partial(_build_model, arm, config))


def _build_model(
    arm: Arm, config: ByteLMConfig, task: str, seed: int, precision: Precision
) -> nn.Module:
    del task, seed, precision
    return _built(arm, config)


def _built(arm: Arm, config: ByteLMConfig) -> nn.Module:
    with RandomState(0).active():
        model = ByteLM(config, precision=arm.precision)
    return torchao.converted(model) if arm.torchao else model


def _check_same_samples(first: Mapping[str, StepRecord]) -> None:
    if len({record.sample_ids for record in first.values()}) != 1:
        raise RuntimeError("The arms stepped on different samples; their times do not compare.")
