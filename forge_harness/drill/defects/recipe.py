"""Schedules other than declared, and seeds that are not set or reach nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.protocols import ScheduleSpec, ScheduleStep, TrainingSession, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

from .configuration import ResolvesAnother

Plan = list[ScheduleStep]


class PlansAnother(ReferenceSubject):
    """Plans another schedule than it declares, or takes other options for either."""

    def __init__(
        self,
        plan: Callable[[Plan], Plan] = lambda plan: plan,
        options: Callable[[TrainOptions], TrainOptions] = lambda options: options,
        spec: Callable[[ScheduleSpec], ScheduleSpec] = lambda spec: spec,
    ) -> None:
        self.plan, self.options, self.spec = plan, options, spec

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        """See `Trains.schedule_spec`."""
        return self.spec(super().schedule_spec(task, self.options(options)))

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        """See `Trains.planned_schedule`."""
        return self.plan(list(super().planned_schedule(task, self.options(options))))


class PlansHalf(ReferenceSubject):
    """Decays to the end of half the run, and stays there."""

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        """See `Trains.planned_schedule`."""
        short = replace(options, steps=-(-options.steps // 2))
        plan = list(super().planned_schedule(task, short))
        return [*plan, *plan[-1:] * (options.steps - len(plan))]


class NoTasks(ReferenceSubject):
    """Names no tasks."""

    def tasks(self) -> Sequence[str]:
        """None."""
        return ()


class WeightsDrawnAnew(ReferenceSubject):
    """Weights of every model come from the system's randomness."""

    def build_model(self, task: str, *, seed: int) -> nn.Module:
        """See `BuildsModel.build_model`."""
        return super().build_model(task, seed=_drawn())


class OrderDrawnAnew(ReferenceSubject):
    """The samples of a run come in an order of the system's randomness."""

    def epoch_order(self, task: str, *, seed: int, **asked: Any) -> Sequence[int]:
        """See `LoadsData.epoch_order`."""
        return super().epoch_order(task, seed=_drawn(), **asked)


class SessionSeed(ReferenceSubject):
    """Every session has seed 0, whatever was asked for."""

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """See `Trains.session`."""
        return super().session(task, replace(options, seed=0))


class SeedDrawnAnew(ReferenceSubject):
    """A seed that is not given is drawn at each load."""

    def load_config(self, *, flags: Any = None, **layers: Any) -> Any:
        """See `Configures.load_config`."""
        return super().load_config(flags={"run.seed": _drawn(), **(flags or {})}, **layers)


def _drawn() -> int:
    # Not torch.seed(): that would move the generators of whoever runs the drill.
    return random.SystemRandom().randrange(2**31)


def schedules(subject: Any) -> object:
    """Declared and planned schedules of both tasks, in a short and a longer run."""
    return [
        [subject.schedule_spec(task, options), list(subject.planned_schedule(task, options))]
        for task in ("digits", "bytes")
        for options in (TrainOptions(steps=5), TrainOptions(steps=30, learning_rate=0.01))
    ]


def named_tasks(subject: Any) -> object:
    """The names of the tasks."""
    return list(subject.tasks())


def seeds_loaded(subject: Any) -> object:
    """The kind of the seed of two loads, and whether they agree: it may be random."""
    first, second = (subject.load_config(environ={}, flags={}).values() for _ in range(2))
    return [type(first["run.seed"]).__name__, first["run.seed"] == second["run.seed"]]


def runs_apart(subject: Any) -> object:
    """Which of six runs, two of each seed, end alike: what each ends with may be random."""
    ends: list[tuple[float, Tensor]] = []
    for seed in (1, 1, 2, 2, 3, 3):
        session = subject.session("digits", TrainOptions(seed=seed, steps=3))
        losses = [session.step().loss for _ in range(3)]
        ends.append((losses[-1], next(session.model.parameters()).detach().sum()))
    return [[bool(one == other) for other in ends] for one in ends]


def _one_ahead(plan: Plan) -> Plan:
    return [*plan[1:], plan[-1]]


def _decay_never_ends(plan: Plan) -> Plan:
    return [replace(step, weight_decay=plan[0].weight_decay) for step in plan]


def _a_tenth(plan: Plan) -> Plan:
    return [replace(step, learning_rate=step.learning_rate / 10) for step in plan]


def _not_a_number_later(plan: Plan) -> Plan:
    return [*plan[:1], *(replace(step, learning_rate=math.nan) for step in plan[1:])]


_golden = partial(
    Defect,
    stage=Stage.CONFIGURATION,
    check="configuration.schedule_golden",
    alive=schedules,
)
_warmup = partial(
    Defect,
    stage=Stage.CONFIGURATION,
    check="configuration.warmup_within_run",
    alive=schedules,
)
_seed = partial(Defect, stage=Stage.CONFIGURATION, check="configuration.seed_fixed")
_run = partial(
    Defect,
    stage=Stage.TRAINING,
    check="environment.deterministic_run",
    alive=runs_apart,
)

DEFECTS = (
    _golden(
        id="T12_plan_one_step_ahead",
        title="The plan has the learning rate of step t + 1 at step t",
        shows="relative_error is",
        subject=lambda: PlansAnother(_one_ahead),
        source="pytorch/pytorch#7889",
        subtlety=4,
    ),
    _golden(
        id="T21_plan_ends_at_half",
        title="The horizon of the plan is half of the run",
        shows="relative_error is",
        subject=PlansHalf,
        source="pytorch/torchtitan#2340",
        subtlety=4,
    ),
    _golden(
        id="decay_never_ends",
        title="Weight decay does not end at the boundary of the two stages",
        shows="relative_error is",
        subject=lambda: PlansAnother(_decay_never_ends),
        subtlety=4,
    ),
    _golden(
        id="T12_rates_not_a_number",
        title="No learning rate but the first is a number",
        shows="relative_error is nan",
        subject=lambda: PlansAnother(_not_a_number_later),
        subtlety=2,
    ),
    _golden(
        id="plan_one_step_short",
        title="The plan lacks the last step",
        shows="plans_of_wrong_length is",
        subject=lambda: PlansAnother(lambda plan: plan[:-1]),
        subtlety=3,
    ),
    _golden(
        id="no_tasks",
        title="No task is named: nothing is compared",
        shows="steps_compared is 0 steps, under its limit",
        subject=NoTasks,
        alive=named_tasks,
        subtlety=2,
    ),
    _golden(
        id="V01_learning_rate_ignored",
        title="The learning rate asked for is ignored for that of the recipe",
        shows="peaks_not_as_asked is 2",
        subject=lambda: PlansAnother(options=lambda given: replace(given, learning_rate=None)),
        source="pytorch/ao#4518",
        subtlety=3,
    ),
    _warmup(
        id="warmup_of_a_thousand_steps",
        title="Warmup takes a thousand steps, however short the run is",
        shows="warmups_too_long is",
        subject=lambda: PlansAnother(spec=lambda spec: replace(spec, warmup_steps=1000)),
        subtlety=3,
    ),
    _warmup(
        id="never_at_its_peak",
        title="The learning rate never comes near its declared peak",
        shows="peaks_never_reached is",
        subject=lambda: PlansAnother(_a_tenth),
        subtlety=3,
    ),
    _seed(
        id="V05_loaded_seed_drawn_anew",
        title="A seed that is not given is drawn at each load",
        shows="run.seed_again is",
        subject=SeedDrawnAnew,
        alive=seeds_loaded,
        source="mlcommons/inference#2036",
        subtlety=3,
    ),
    _seed(
        id="V05_loaded_seed_left_open",
        title="The seed in force is no number: it is left to whoever draws it",
        shows="run.seed_is_a_number is False",
        subject=lambda: ResolvesAnother(values=lambda values: {"run.seed": "random"}),
        alive=seeds_loaded,
        source="mlcommons/inference#2036",
        subtlety=3,
    ),
    _seed(
        id="V05_weights_drawn_anew",
        title="Models are initialized from the system's randomness",
        shows="loss_again is",
        subject=WeightsDrawnAnew,
        alive=runs_apart,
        source="pytorch/torchtitan#1983",
        subtlety=3,
    ),
    _seed(
        id="V05_session_seed_not_used",
        title="Every training session has seed 0, whatever is configured",
        shows="seed_has_effect is False",
        subject=SessionSeed,
        alive=runs_apart,
        source="pytorch/torchtitan#1983",
        subtlety=3,
    ),
    _run(
        id="V05_run_with_weights_drawn_anew",
        title="Two runs of one seed start from other weights",
        shows="repeated_digest is",
        subject=WeightsDrawnAnew,
        source="pytorch/torchtitan#1983",
        subtlety=3,
    ),
    _run(
        id="V05_run_with_order_drawn_anew",
        title="Two runs of one seed see their samples in other orders",
        shows="repeated_digest is",
        subject=OrderDrawnAnew,
        source="deepchecks/deepchecks b68f44edb",
        subtlety=4,
    ),
    _run(
        id="V05_run_deaf_to_its_seed",
        title="Runs of different seeds are the same run",
        shows="seed_has_effect is False",
        subject=SessionSeed,
        source="pytorch/torchtitan#1983",
        subtlety=3,
    ),
)


class KeepsBfloat16(ReferenceSubject):
    """A state in a format that NumPy has no type for."""

    def session(self, task: str, options: TrainOptions) -> Any:
        """See `Trains.session`."""
        session: Any = super().session(task, options)
        true = session.state_tensors
        session.state_tensors = lambda: {k: v.bfloat16() for k, v in true().items()}
        return session


BENIGN = (
    Benign(
        id="keeps_bfloat16",
        title="The state of a session is in bfloat16",
        subject=KeepsBfloat16,
        checks=("environment.deterministic_run",),
    ),
)
