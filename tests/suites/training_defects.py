"""Subjects with one behaviour of training changed, after the defects of real projects."""

import math
import time
from contextlib import suppress
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.errors import NonFiniteError
from forge_harness.model import BitLinear
from forge_harness.protocols import Batch
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession


class Estimator(ReferenceSubject):
    """The straight-through estimator with one of its gradients exchanged.

    `input_grad` and `weight_grad` get (grad, x, weight, x_quantized, weight_quantized) as rows.
    """

    def __init__(self, input_grad=None, weight_grad=None, bias_grad=None, read=lambda g: g):
        self.input_grad = input_grad or (lambda g, x, w, xq, wq: g @ wq)
        self.weight_grad = weight_grad or (lambda g, x, w, xq, wq: g.t() @ xq)
        self.bias_grad = bias_grad or (lambda g: g.flatten(0, -2).sum(0))
        self.read = read

    def linear(self, x, weight, bias=None):
        q, s = self.quantize_activation(x)
        codes, beta = self.quantize_weight(weight)
        return _Estimator.apply(x, weight, bias, q * s, codes * beta, self)


class _Estimator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, xq, wq, rules):
        ctx.save_for_backward(x, weight, xq, wq)
        ctx.rules, ctx.has_bias = rules, bias is not None
        return F.linear(xq, wq, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, xq, wq = ctx.saved_tensors
        grad = ctx.rules.read(grad)
        rows = [t.reshape(-1, t.shape[-1]) for t in (grad, x)]
        parts = (*rows, weight, xq.reshape(-1, xq.shape[-1]), wq)
        grad_bias = ctx.rules.bias_grad(grad) if ctx.has_bias else None
        return (
            ctx.rules.input_grad(*parts).reshape(x.shape),
            ctx.rules.weight_grad(*parts),
            grad_bias,
            *(None, None, None),
        )


class RoundsInTheGraph(ReferenceSubject):
    """round() without an estimator: only the scales pass a gradient."""

    def linear(self, x, weight, bias=None):
        s = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        beta = weight.abs().mean().clamp(min=1e-5)
        return F.linear((x / s).round() * s, (weight / beta).round().clamp(-1, 1) * beta, bias)


class LeaksThroughScale(ReferenceSubject):
    def linear(self, x, weight, bias=None):
        beta = weight.abs().mean().clamp(min=1e-5)
        codes = self.quantize_weight(weight)[0]
        ste = weight / beta.detach() + (codes - weight / beta.detach()).detach()
        xq = x + (torch.mul(*self.quantize_activation(x)) - x).detach()
        return F.linear(xq, ste * beta, bias)


def masked_by_clip(g, x, w, xq, wq):
    return (g.t() @ xq) * (w.abs() <= wq.abs().max())


def as_if_contiguous(grad):
    if grad.untyped_storage().nbytes() < 4 * grad.numel():
        return grad
    return grad.as_strided(grad.shape, torch.empty(grad.shape).stride())


class SessionDefect(ReferenceSubject):
    """Sessions, new and resumed, changed by `patch(session)`."""

    def __init__(self, patch=None, resumed=None, saving=None):
        self.patch = patch or (lambda session: None)
        self.resumed = resumed or (lambda session: None)
        self.saving = saving or (lambda session: None)

    def session(self, task, options):
        session = super().session(task, options)
        self.patch(session)
        return session

    def save_session(self, session, path):
        super().save_session(session, path)
        self.saving(session)

    def resume_session(self, task, options, path):
        session = super().resume_session(task, options, path)
        self.patch(session)
        self.resumed(session)
        return session


def largest(session):
    return max(session.model.parameters(), key=torch.Tensor.numel)


def cuts_gradient(session):
    layer = next(m for m in session.model.modules() if isinstance(m, BitLinear))
    kept = layer.linear
    layer.linear = lambda x, w, b=None: kept(x, w.detach(), b)


def gradient_every_other_step(session):
    largest(session).register_hook(lambda g: g * (session.step_index % 2))


def replaces_parameter(session):
    layer = next(m for m in session.model.modules() if isinstance(m, BitLinear))
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def forgets_parameter(session):
    session.optimizer.param_groups[-1]["params"].pop()


def only_decay_moves_it(session):
    largest(session).register_hook(lambda g: g * 0)


def before_each_step(change):
    def patch(session):
        session.optimizer.register_step_pre_hook(lambda *args: change(session))

    return patch


@torch.no_grad()
def rounds_latents(session):
    for parameter in session.model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def keeps_latents_in_bf16(session):
    rounds_latents(session)
    session.optimizer.register_step_post_hook(lambda *args: rounds_latents(session))


class Accumulates(QATSession):
    """Sessions whose sum over micro-batches is weighted by `weights(sizes, accumulation)`."""

    weights = staticmethod(lambda sizes, count: [size / sum(sizes) for size in sizes])

    def _accumulate(self, micro_batches):
        batches = [self.data.batch(self.task, "train", ids) for ids in micro_batches if ids]
        sizes = [batch.targets.numel() for batch in batches]
        weights = self.weights(sizes, len(micro_batches))
        total = 0.0
        for batch, weight in zip(batches, weights, strict=True):
            loss = self._loss(self.model, batch)
            self._backward(loss * weight)
            total += float(loss.detach()) * weight
        return total

    def _backward(self, loss):
        loss.backward()


class Undivided(Accumulates):
    weights = staticmethod(lambda sizes, count: [1.0] * len(sizes))


class MeanOfMeans(Accumulates):
    weights = staticmethod(lambda sizes, count: [1 / len(sizes)] * len(sizes))


class NominalCount(Accumulates):
    """Divides by the micro-batches a full window has."""

    weights = staticmethod(
        lambda sizes, count: [1 / count if len(sizes) < count else s / sum(sizes) for s in sizes]
    )


class ClearsEachMicroBatch(Accumulates):
    def _backward(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()


class AccumulatesInBf16(Accumulates):
    def _backward(self, loss):
        loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = parameter.grad.bfloat16().float()


class MovingAverage(Accumulates):
    def _backward(self, loss):
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        loss.backward()


def as_kind(kind):
    def patch(session):
        session.__class__ = kind

    return patch


def keeps_gradients(session):
    session.optimizer.zero_grad = lambda set_to_none=True: None


def never_clips(session):
    session.recipe = replace(session.recipe, clip_norm=math.inf)


def clips_each_parameter(session):
    limit = session.recipe.clip_norm / math.sqrt(len(list(session.model.parameters())))
    never_clips(session)

    def clip(session):
        for parameter in session.model.parameters():
            nn.utils.clip_grad_norm_([parameter], limit)

    before_each_step(clip)(session)


def scales_gradients(factor):
    def change(session):
        for parameter in session.model.parameters():
            parameter.grad.mul_(factor)

    return before_each_step(change)


def rate_of_next_step(session):
    plan = ReferenceSubject().planned_schedule(session.task, session.options)
    following = plan[min(session.step_index + 1, len(plan) - 1)].learning_rate
    for group in session.optimizer.param_groups:
        group["lr"] = following


def peak_rate_in_update(session):
    """Logs the schedule, moves by the peak rate."""
    before = {}

    def remember(*args):
        before.update({p: p.detach().clone() for p in session.model.parameters()})

    @torch.no_grad()
    def stretch(optimizer, *args):
        factor = session.recipe.learning_rate / optimizer.param_groups[0]["lr"]
        for parameter, old in before.items():
            parameter.copy_(old + factor * (parameter - old))

    session.optimizer.register_step_pre_hook(remember)
    session.optimizer.register_step_post_hook(stretch)


class HalfTheHorizon(ReferenceSubject):
    def planned_schedule(self, task, options):
        plan = super().planned_schedule(task, replace(options, steps=options.steps // 2))
        return [*plan, *[plan[-1]] * (options.steps - len(plan))]


def decays_everything(session):
    for group in session.optimizer.param_groups:
        group["decays"] = True


@torch.no_grad()
def coupled_decay(session):
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.add_(parameter, alpha=group["weight_decay"])
        group["weight_decay"] = 0.0


def doubled_decay(session):
    for group in session.optimizer.param_groups:
        group["weight_decay"] *= 2


class UnseededWeights(ReferenceSubject):
    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        with torch.no_grad():
            # Drawn outside the seeded region, as a module built too early does.
            model.get_parameter("head.weight").add_(time.perf_counter_ns() % 1000 * 1e-6)
        return model


class OneSeedForAll(ReferenceSubject):
    def session(self, task, options):
        return super().session(task, replace(options, seed=1))


def drops_moments(session):
    session.optimizer.state.clear()


def restarts_epoch(session):
    session.position.epoch = 0


def skips_a_sample(session):
    session.position.advance(1)


def restarts_schedule(session):
    spec = session.schedule
    session.schedule = replace(spec, warmup_steps=session.step_index + 3)


def moments_in_bf16(session):
    for entry in session.optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()


def forgets_betas(session):
    for group in session.optimizer.param_groups:
        group["betas"] = (0.9, 0.999)


def fresh_generators(session):
    session.random = QATSession(session.task, replace(session.options, seed=77)).random


def hides_optimizer(session):
    full = session.state_tensors
    session.state_tensors = lambda: {
        name: tensor for name, tensor in full().items() if not name.startswith("optimizer")
    }


class TornSnapshot(ReferenceSubject):
    """Writes the checkpoint when it is read: the tensors are those of a later step."""

    def save_session(self, session, path):
        self.saved = session

    def resume_session(self, task, options, path):
        super().save_session(self.saved, path)
        return super().resume_session(task, options, path)


def unguarded(session):
    session._refuse_non_finite = lambda loss, norm: None
    session.recipe = replace(session.recipe, clip_norm=math.inf)


def guards_the_loss_only(session):
    kept = session._refuse_non_finite
    session._refuse_non_finite = lambda loss, norm: kept(loss, 0.0)


def skips_in_silence(session):
    stepping, last = session.step, []

    def step():
        with suppress(NonFiniteError):
            last[:] = [stepping()]
        return last[0]

    session.step = step


class ShuffledLabels(ReferenceSubject):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return Batch(inputs=batch.inputs, targets=torch.randint_like(batch.targets, 10))


class OtherSamples(ReferenceSubject):
    def session(self, task, options):
        return super().session(task, replace(options, fixed_batch=None))


def reports(**changes):
    """Step records with fields passed through functions."""

    def patch(session):
        stepping = session.step

        def step():
            record = stepping()
            new = {name: change(getattr(record, name)) for name, change in changes.items()}
            return replace(record, **new)

        session.step = step

    return patch


class NoAverageOverRanks(ReferenceSubject):
    def train_distributed(self, task, options, *, ranks):
        half = replace(options, batch_size=options.batch_size // ranks, accumulation=1)
        session = self.session(task, half)
        for _ in range(options.steps):
            session.step()
        return session.model.state_dict()


def evaluates_latents(session):
    kept = session.evaluate

    def evaluate():
        layers = [m for m in session.model.modules() if isinstance(m, BitLinear)]
        for layer in layers:
            layer.precision = "full"
        result = kept()
        for layer in layers:
            layer.precision = "ternary"
        return result

    session.evaluate = evaluate


def stays_in_evaluation_mode(session):
    kept = session.evaluate

    def evaluate():
        result = kept()
        session.model.eval()
        return result

    session.evaluate = evaluate


def divides_validation_loss(session):
    kept = session.evaluate

    def evaluate():
        result = kept()
        return {**result, "loss": result["loss"] / session.options.accumulation}

    session.evaluate = evaluate


def evaluation_moves_data(session):
    kept = session.evaluate

    def evaluate():
        session.position.advance(1)
        return kept()

    session.evaluate = evaluate


class ExportsAverage(ReferenceSubject):
    """Ships weights averaged with the initial ones, as an exporter of EMA weights does."""

    def export_package(self, session, path):
        start = self.build_model(session.task, seed=session.options.seed).state_dict()
        kept = {name: t.clone() for name, t in session.model.state_dict().items()}
        session.model.load_state_dict({name: (kept[name] + start[name]) / 2 for name in kept})
        super().export_package(session, path)
        session.model.load_state_dict(kept)


class OneSetting(ReferenceSubject):
    """Knows the fast arithmetic only: each that the checks of cost try takes seconds to time."""

    def session(self, task, options):
        if options.extra:
            raise ValueError("there is one setting")
        if options.precision == "ternary":
            options = replace(options, extra={"compute": "int8"})
        return super().session(task, options)


class SlowStep(OneSetting):
    """Ternary steps take three times their CPU time."""

    def session(self, task, options):
        session = super().session(task, options)
        if options.precision == "ternary":
            stepping = session.step

            def step():
                start = time.process_time()
                record = stepping()
                end = start + 3 * (time.process_time() - start)
                while time.process_time() < end:
                    pass
                return record

            session.step = step
        return session
