"""Learning rates: the plan, the optimizer's, and those that updates use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.drill.defects.sessions import (
    SessionDefect,
    before_each_step,
    moves_without_rate,
    plan,
)
from forge_harness.drill.defects.steps_optimizer import DECAY, MOVES, SCHEDULE
from forge_harness.protocols import ScheduleSpec, ScheduleStep, TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training.optimize import apply_schedule
from forge_harness.training.schedule import schedule_at

Rate = Callable[[Any, dict[str, Any]], float]
"""(optimizer, parameter group) -> what an update is multiplied with."""


def _rate_of_next_step(session: Any) -> None:
    planned = ReferenceSubject().planned_schedule(session.task, session.options)
    following = planned[min(session.step_index + 1, len(planned) - 1)].learning_rate
    for group in session.optimizer.param_groups:
        group["lr"] = following


def _rate_of_the_epoch(session: Any) -> None:
    apply_schedule(session.optimizer, schedule_at(session.schedule, session.position.epoch))


def _rate_of_each_micro_batch(session: Any) -> None:
    """`scheduler.step()` in the loop over micro-batches: the rate of step * accumulation."""
    done = (session.step_index + 1) * session.options.accumulation - 1
    last = session.schedule.total_steps - 1
    apply_schedule(session.optimizer, schedule_at(session.schedule, min(done, last)))


def _last_group_keeps_its_first_rate(session: Any) -> None:
    first = schedule_at(session.schedule, 0).learning_rate
    session.optimizer.param_groups[-1]["lr"] = first


def _peak_rate_in_update(session: Any) -> None:
    """Logs the schedule, moves by the peak rate."""
    before: dict[nn.Parameter, Tensor] = {}

    def remember(*_: object) -> None:
        before.update({p: p.detach().clone() for p in session.model.parameters()})

    @torch.no_grad()
    def stretch(optimizer: Any, *_: object) -> None:
        factor = session.recipe.learning_rate / optimizer.param_groups[0]["lr"]
        for parameter, old in before.items():
            parameter.copy_(old + factor * (parameter - old))

    session.optimizer.register_step_pre_hook(remember)
    session.optimizer.register_step_post_hook(stretch)


class _HalfTheHorizon(ReferenceSubject):
    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        steps = super().planned_schedule(task, replace(options, steps=options.steps // 2))
        return [*steps, *[steps[-1]] * (options.steps - len(steps))]


class KindOfItsOwn(SessionDefect):
    """Follows a schedule whose kind no formula is stated of."""

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        """The declaration, under another name."""
        return replace(super().schedule_spec(task, options), kind="of_its_own")


class RefusesShortRuns(ReferenceSubject):
    """A warmup of ten steps; shorter runs are refused."""

    def schedule_spec(self, task: str, options: TrainOptions) -> ScheduleSpec:
        """The declaration of a run that is long enough."""
        return super().schedule_spec(task, _with_fixed_warmup(options))

    def planned_schedule(self, task: str, options: TrainOptions) -> Sequence[ScheduleStep]:
        """The plan of a run that is long enough."""
        return super().planned_schedule(task, _with_fixed_warmup(options))


def _with_fixed_warmup(options: TrainOptions) -> TrainOptions:
    return replace(options, extra={**options.extra, "warmup_steps": 10})


class _OwnAdam(torch.optim.Optimizer):
    """Adam, written anew."""

    def __init__(self, groups: Any, peak: float, rate: Rate) -> None:
        super().__init__(groups, {"lr": peak, "weight_decay": 0.0})
        self.rate = rate

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=torch.zeros(()))
                state["t"] += 1
                t = float(state["t"])
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad.square(), 0.02)
                spread = (state["v"] / (1 - 0.98**t)).sqrt() + 1e-8
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self.rate(self, group) * state["m"] / (1 - 0.9**t) / spread)


class WithOwnAdam(ReferenceSubject):
    """An optimizer of its own, right where `rate` is that of the group."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate

    def session(self, task: str, options: TrainOptions) -> Any:
        """A session whose AdamW is exchanged."""
        session: Any = super().session(task, options)
        groups = [
            {"params": group["params"], "decays": group["decays"]}
            for group in session.optimizer.param_groups
        ]
        session.optimizer = _OwnAdam(groups, session.recipe.learning_rate, self.rate)
        return session


def _half_rate_of_norms(session: Any) -> None:
    session.optimizer.param_groups[-1]["lr"] *= 0.5


def _double_rate_of_matrices(session: Any) -> None:
    session.optimizer.param_groups[0]["lr"] *= 2.0


class _GroupBetas(ReferenceSubject):
    """Norms and embeddings have betas of their own."""

    def session(self, task: str, options: TrainOptions) -> Any:
        session: Any = super().session(task, options)
        session.optimizer.param_groups[-1]["betas"] = (0.8, 0.999)
        return session


DEFECTS = (
    Defect(
        id="T12_rate_of_next_step",
        title="Each step uses the learning rate of the next",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="optimizer_error is",
        subject=lambda: SessionDefect(before_each_step(_rate_of_next_step)),
        alive=observe.trained,
        source="pytorch/pytorch#7889",
        subtlety=4,
    ),
    Defect(
        id="T12_per_epoch",
        title="The schedule is read at the epoch instead of the step",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="optimizer_error is",
        subject=lambda: SessionDefect(before_each_step(_rate_of_the_epoch)),
        alive=observe.trained,
        source="vllm-project/speculators#900",
        subtlety=3,
    ),
    Defect(
        id="T12_per_micro_batch",
        title="The scheduler is stepped in the loop over micro-batches",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="digits.accumulated.optimizer_error is",
        subject=lambda: SessionDefect(before_each_step(_rate_of_each_micro_batch)),
        alive=partial(observe.trained, accumulation=4),
        source="facebookresearch/deit#145",
        subtlety=4,
    ),
    Defect(
        id="T13_rate_not_used",
        title="The learning rate is logged as planned, and updates use the peak",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="update_error is",
        subject=lambda: SessionDefect(_peak_rate_in_update),
        alive=observe.trained,
        source="pytorch/ao#736",
        subtlety=4,
    ),
    Defect(
        id="T13_custom_optimizer",
        title="An optimizer of one's own uses the rate it was built with",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="digits.rate_response is",
        subject=lambda: WithOwnAdam(lambda optimizer, group: optimizer.defaults["lr"]),
        alive=moves_without_rate,
        source="pytorch/ao#736",
        subtlety=4,
    ),
    Defect(
        id="T13_one_group_only",
        title="The schedule reaches the first parameter group only",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="digits.rate_drift is",
        subject=lambda: SessionDefect(before_each_step(_last_group_keeps_its_first_rate)),
        alive=observe.trained,
        subtlety=4,
    ),
    Defect(
        id="T21_half_horizon",
        title="The plan reaches its end at half the run",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="plan_error is",
        subject=_HalfTheHorizon,
        alive=plan,
        source="pytorch/torchtitan#2340",
        subtlety=4,
    ),
    Defect(
        id="T21_own_kind_not_followed",
        title="A schedule of a kind without a formula, and the optimizer is a step ahead of it",
        stage=Stage.TRAINING,
        check=SCHEDULE,
        shows="digits.optimizer_error is",
        subject=lambda: KindOfItsOwn(before_each_step(_rate_of_next_step)),
        alive=observe.trained,
        subtlety=4,
    ),
)

BENIGN = (
    Benign(
        id="schedule_of_its_own",
        title="A schedule of a kind without a formula, followed as planned",
        subject=KindOfItsOwn,
        checks=(SCHEDULE, DECAY, "configuration.warmup_within_run"),
    ),
    Benign(
        id="refuses_short_runs",
        title="A warmup of fixed length, and runs that are shorter are refused",
        subject=RefusesShortRuns,
        checks=("configuration.schedule_golden", "configuration.warmup_within_run"),
    ),
    Benign(
        id="half_rate_of_norms",
        title="Norms and embeddings learn at half the plan's rate",
        subject=lambda: SessionDefect(before_each_step(_half_rate_of_norms)),
        checks=(SCHEDULE, DECAY, MOVES),
    ),
    Benign(
        id="double_rate_of_matrices",
        title="Matrices learn at twice the plan's rate",
        subject=lambda: SessionDefect(before_each_step(_double_rate_of_matrices)),
        checks=(SCHEDULE, DECAY, MOVES),
    ),
    Benign(
        id="betas_by_group",
        title="Norms and embeddings have betas of their own",
        subject=_GroupBetas,
        checks=(SCHEDULE,),
    ),
    Benign(
        id="adam_of_ones_own",
        title="An optimizer written anew, which follows the rates of its groups",
        subject=lambda: WithOwnAdam(lambda optimizer, group: float(group["lr"])),
        checks=(SCHEDULE,),
    ),
)
