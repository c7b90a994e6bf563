"""Subjects whose step is wrong with micro-batches only, or beside the optimizer."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.model import BitLinear
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession
from forge_harness.training.optimize import apply_schedule, clip_gradients, gradient_norm
from forge_harness.training.schedule import schedule_at

from .training_defects import Accumulates


def schedules_each_micro_batch(session):
    """`scheduler.step()` in the loop over micro-batches: the rate of step * accumulation."""

    def ahead(*_):
        done = (session.step_index + 1) * session.options.accumulation - 1
        last = session.schedule.total_steps - 1
        apply_schedule(session.optimizer, schedule_at(session.schedule, min(done, last)))

    session.optimizer.register_step_pre_hook(ahead)


def last_group_keeps_its_first_rate(session):
    def keep(*_):
        session.optimizer.param_groups[-1]["lr"] = schedule_at(session.schedule, 0).learning_rate

    session.optimizer.register_step_pre_hook(keep)


class ClipsEachMicroBatch(Accumulates):
    """`clip_grad_norm_` in the loop over micro-batches; right for one."""

    def _backward(self, loss):
        loss.backward()
        norm = gradient_norm(self._parameters)
        if self.recipe.clip_norm and norm:
            clip_gradients(self._parameters, norm, self.recipe.clip_norm)


class DropsMicroBatch(Accumulates):
    """`if not isfinite(loss): continue` in the loop over micro-batches."""

    def _backward(self, loss):
        if torch.isfinite(loss):
            loss.backward()

    def _accumulate(self, micro_batches):
        total = super()._accumulate(micro_batches)
        return total if len(micro_batches) == 1 or math.isfinite(total) else 1.0


class DecaysByHand(QATSession):
    """Decay after the optimizer's step, on every parameter."""

    def step(self):
        record = super().step()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 - record.learning_rate * 0.05)
        return record


class DecaysTowardsCodes(QATSession):
    """Decay after the optimizer's step pulls latents to the values they are rounded to."""

    def step(self):
        record = super().step()
        with torch.no_grad():
            for layer in self.model.modules():
                if isinstance(layer, BitLinear):
                    pull = layer.effective_weight() - layer.weight
                    layer.weight.add_(pull, alpha=record.learning_rate * 0.1)
        return record


class DecaysBeforehand(QATSession):
    """Decay by hand before the optimizer's step."""

    def step(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 - 1e-4)
        return super().step()


class OwnAdam(torch.optim.Optimizer):
    """Adam, written anew; `rate(self, group)` is what an update multiplies with."""

    def __init__(self, groups, peak, rate):
        super().__init__(groups, {"lr": peak, "weight_decay": 0.0})
        self.rate = rate

    @torch.no_grad()
    def step(self, closure=None):
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


def captured_rate(optimizer, group):
    return optimizer.defaults["lr"]


def live_rate(optimizer, group):
    return group["lr"]


class WithOwnAdam(ReferenceSubject):
    """T13 where the rate is `captured_rate`; right where it is `live_rate`."""

    def __init__(self, rate):
        self.rate = rate

    def session(self, task, options):
        session = super().session(task, options)
        groups = [
            {"params": group["params"], "decays": group["decays"]}
            for group in session.optimizer.param_groups
        ]
        session.optimizer = OwnAdam(groups, session.recipe.learning_rate, self.rate)
        return session


class ShiftsTwice(ReferenceSubject):
    """The data are shifted, and the loss shifts again."""

    def loss(self, model, batch):
        if batch.targets.dim() == 1:
            return super().loss(model, batch)
        logits = model(batch.inputs)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten())


class Pair(nn.Module):
    """A model that returns its logits and something else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x), None


class ReturnsPairs(ReferenceSubject):
    """Right; its models return tuples."""

    def model_spec(self, task):
        spec = super().model_spec(task)

        def inner(names):
            return tuple(f"inner.{name}" for name in names)

        return replace(
            spec,
            quantized=inner(spec.quantized),
            full_precision=inner(spec.full_precision),
            sub_norms=inner(spec.sub_norms),
            tied=tuple(map(inner, spec.tied)),
        )

    def build_model(self, task, *, seed):
        return Pair(super().build_model(task, seed=seed))

    def loss(self, model, batch):
        logits, _ = model(batch.inputs)
        return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())


class SkipsBadLosses(ReturnsPairs):
    """A step whose loss is not finite is left out in silence; gradients are guarded aloud."""

    def session(self, task, options):
        session = super().session(task, options)
        stepping, guarding, last = session.step, session._refuse_non_finite, []

        def refuse(loss, norm):
            if not math.isfinite(loss):
                raise StopIteration
            guarding(loss, norm)

        def step():
            try:
                last[:] = [stepping()]
            except StopIteration:
                session.optimizer.zero_grad(set_to_none=True)
            return last[0]

        session.step, session._refuse_non_finite = step, refuse
        return session
