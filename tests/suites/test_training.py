"""Each training check goes red for a seeded defect, for its own reason, and only then."""

import math
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forge_harness.errors import NonFiniteError
from forge_harness.model import BitLinear
from forge_harness.policy import load_policy
from forge_harness.protocols import Batch, QualityRun, TrainOptions
from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession
from forge_harness.types import Outcome

CHECKS = sorted(e.id for e in load_policy().catalogue if e.suite == "training")
FROM_STUDY = {"training.convergence_rate", "training.steps_to_quality"}


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


class SlowStep(ReferenceSubject):
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


def run(arm, seed, accuracy, first_at=60, finite=True):
    """One row of a study whose curve reaches its final accuracy at a step."""
    curve = tuple(
        (step, 2.0 - step / 400, accuracy if step >= first_at else 0.3)
        for step in range(29, 300, 30)
    )
    return QualityRun(
        **{"task": "digits", "arm": arm, "seed": seed, "steps": 300, "learning_rate": 1e-3},
        **{"parameters": 1, "accuracy": accuracy, "loss": 0.1, "finite": finite, "seconds": 1.0},
        **{"block_correct": (9,), "block_size": (10,), "curve": curve, "peak_rss_bytes": 1},
        data_digest="sha256:0",
    )


def study(**ternary):
    defaults = {"accuracy": [0.97] * 10, "first_at": 90, "finite": True} | ternary
    pairs = enumerate(defaults.pop("accuracy"))
    return [run("full", seed, 0.98) for seed in range(10)] + [
        run("ternary", seed, accuracy, **defaults) for seed, accuracy in pairs
    ]


DEFECTS = {
    "G01_no_estimator": ("ste_input_gradient", RoundsInTheGraph(), "error"),
    "G07_latent_weight": (
        "ste_input_gradient",
        Estimator(input_grad=lambda g, x, w, xq, wq: g @ w),
        "error",
    ),
    "G09_first_upstream_entry": (
        "ste_input_gradient",
        Estimator(read=lambda g: g.flatten()[0].expand(g.shape).clone()),
        "error",
    ),
    "G12_assumes_contiguous": (
        "ste_input_gradient",
        Estimator(read=as_if_contiguous),
        "transposed",
    ),
    "G13_writes_upstream": (
        "ste_input_gradient",
        Estimator(read=lambda g: g.mul_(1.0 + 1e-3) if g.is_contiguous() else g),
        "upstream_changed",
    ),
    "G01_no_weight_estimator": ("ste_weight_gradient", RoundsInTheGraph(), "error"),
    "G03_clipped": (
        "ste_weight_gradient",
        Estimator(weight_grad=masked_by_clip),
        "error",
    ),
    "G07_raw_activations": (
        "ste_weight_gradient",
        Estimator(weight_grad=lambda g, x, w, xq, wq: g.t() @ x),
        "quantize to zero",
    ),
    "G08_leaks_through_scale": ("ste_weight_gradient", LeaksThroughScale(), "error"),
    "G11_bf16_gradient": (
        "ste_weight_gradient",
        Estimator(weight_grad=lambda g, x, w, xq, wq: (g.t() @ xq).bfloat16().float()),
        "error",
    ),
    "G10_bias_over_batch_only": (
        "ste_weight_gradient",
        Estimator(bias_grad=lambda g: g.flatten(0, -2).mean(0)),
        "bias_error",
    ),
    "G01_one_layer_detached": (
        "gradient_reaches_all",
        SessionDefect(cuts_gradient),
        "parameters_without_gradient",
    ),
    "G05_gradient_now_and_then": (
        "gradient_reaches_all",
        SessionDefect(gradient_every_other_step),
        "parameters_without_gradient",
    ),
    "parameter_replaced": (
        "parameters_move",
        SessionDefect(replaces_parameter),
        "parameters_not_owned",
    ),
    "parameter_forgotten": (
        "parameters_move",
        SessionDefect(forgets_parameter),
        "parameters_not_owned",
    ),
    "only_decay": (
        "parameters_move",
        SessionDefect(only_decay_moves_it),
        "parameters_only_decaying",
    ),
    "T10_bf16_latents": (
        "parameters_move",
        SessionDefect(keeps_latents_in_bf16),
        "moved_at_low_rate",
    ),
    "D05_shuffled_labels": ("overfit_one_batch", ShuffledLabels(), "loss_ratio"),
    "other_samples": ("overfit_one_batch", OtherSamples(), "other_samples"),
    "G01_loss_too_high": ("loss_within_band", RoundsInTheGraph(), "loss is"),
    "T16_loss_too_low": (
        "loss_within_band",
        SessionDefect(reports(loss=lambda loss: loss / 2)),
        "loss is",
    ),
    "T01_undivided": (
        "accumulation_equivalence",
        SessionDefect(as_kind(Undivided)),
        "gradient_difference_4",
    ),
    "T01_mean_of_means": (
        "accumulation_equivalence",
        SessionDefect(as_kind(MeanOfMeans)),
        "gradient_difference_4",
    ),
    "T07_zero_grad_in_the_loop": (
        "accumulation_equivalence",
        SessionDefect(as_kind(ClearsEachMicroBatch)),
        "gradient_difference_4",
    ),
    "T07_never_cleared": (
        "accumulation_equivalence",
        SessionDefect(keeps_gradients),
        "gradient_difference_1",
    ),
    "T18_moving_average": (
        "accumulation_equivalence",
        SessionDefect(as_kind(MovingAverage)),
        "gradient_difference_4",
    ),
    "G11_bf16_buffers": (
        "accumulation_equivalence",
        SessionDefect(as_kind(AccumulatesInBf16)),
        "gradient_difference",
    ),
    "T03_loss_scaled": (
        "accumulation_equivalence",
        SessionDefect(reports(loss=lambda loss: loss * 21 / 22)),
        "loss_difference_1",
    ),
    "T01_nominal_count": (
        "partial_window",
        SessionDefect(as_kind(NominalCount)),
        "gradient_difference",
    ),
    "T04_never_clipped": ("clip_effective", SessionDefect(never_clips), "norm_at_optimizer"),
    "T19_clips_by_parameter": (
        "clip_effective",
        SessionDefect(clips_each_parameter),
        "norm_kept",
    ),
    "T05_clips_scaled": ("clip_effective", SessionDefect(scales_gradients(1e-3)), "norm_kept"),
    "T19_norm_of_one_shard": (
        "clip_effective",
        SessionDefect(reports(grad_norm=lambda norm: norm / 2)),
        "reported_norm_error",
    ),
    "T12_rate_of_next_step": (
        "schedule_trace",
        SessionDefect(before_each_step(rate_of_next_step)),
        "optimizer_error",
    ),
    "T13_rate_not_used": ("schedule_trace", SessionDefect(peak_rate_in_update), "update_error"),
    "T21_half_horizon": ("schedule_trace", HalfTheHorizon(), "plan_error"),
    "T08_decays_everything": ("decay_groups", SessionDefect(decays_everything), "exempt_decayed"),
    "T09_coupled": ("decay_groups", SessionDefect(before_each_step(coupled_decay)), "decay_error"),
    "T09_doubled": ("decay_groups", SessionDefect(before_each_step(doubled_decay)), "decay_error"),
    "V05_unseeded": ("repeat_bit_identical", UnseededWeights(), "first_different_step"),
    "V05_seed_ignored": ("repeat_bit_identical", OneSeedForAll(), "tensors_of_another_seed"),
    "C01_moments_dropped": (
        "resume_bit_identical",
        SessionDefect(resumed=drops_moments),
        "first_different_step",
    ),
    "C04_epoch_restarted": (
        "resume_bit_identical",
        SessionDefect(resumed=restarts_epoch),
        "sample_ids",
    ),
    "C07_warmup_repeats": (
        "resume_bit_identical",
        SessionDefect(resumed=restarts_schedule),
        "first_different_step",
    ),
    "C19_latents_rounded": (
        "resume_bit_identical",
        SessionDefect(resumed=rounds_latents),
        "first_different_step",
    ),
    "C06_sample_lost": (
        "resume_twice_bit_identical",
        SessionDefect(resumed=skips_a_sample),
        "sample_ids",
    ),
    "C01_moments_empty": (
        "optimizer_state_exact",
        SessionDefect(resumed=drops_moments),
        "different_entries",
    ),
    "C19_moments_in_bf16": (
        "optimizer_state_exact",
        SessionDefect(resumed=moments_in_bf16),
        "different_entries",
    ),
    "C17_betas_default": (
        "optimizer_state_exact",
        SessionDefect(resumed=forgets_betas),
        "different_entries",
    ),
    "C03_generators_not_restored": (
        "every_state_saved",
        SessionDefect(resumed=fresh_generators),
        "not_restored",
    ),
    "C08_state_incomplete": (
        "every_state_saved",
        SessionDefect(hides_optimizer),
        "uncovered_tensors",
    ),
    "C08_changed_by_saving": (
        "every_state_saved",
        SessionDefect(saving=rounds_latents),
        "changed_by_saving",
    ),
    "C20_torn_snapshot": ("every_state_saved", TornSnapshot(), "not_restored"),
    "no_guard": ("non_finite_stops", SessionDefect(unguarded), "nan_in_one_gradient.changed"),
    "guard_on_loss_only": (
        "non_finite_stops",
        SessionDefect(guards_the_loss_only),
        "nan_in_one_gradient.changed",
    ),
    "skips_in_silence": (
        "non_finite_stops",
        SessionDefect(skips_in_silence),
        "nan_in_one_gradient.reported",
    ),
    "ranks_not_averaged": ("distributed_equivalence", NoAverageOverRanks(), "different_tensors"),
    "L06_evaluates_latents": (
        "eval_is_quantized",
        SessionDefect(evaluates_latents),
        "loss_difference",
    ),
    "T15_mode_left": (
        "eval_is_quantized",
        SessionDefect(stays_in_evaluation_mode),
        "modes_left_changed",
    ),
    "T16_loss_divided": (
        "eval_is_quantized",
        SessionDefect(divides_validation_loss),
        "loss_with_accumulation",
    ),
    "T20_exports_average": ("eval_is_quantized", ExportsAverage(), "loss_difference"),
    "evaluating_moves_data": (
        "eval_is_quantized",
        SessionDefect(evaluation_moves_data),
        "changed_by_evaluating",
    ),
    "R11_clock_stopped_early": (
        "throughput_recorded",
        SessionDefect(reports(seconds=lambda seconds: seconds / 10)),
        "reported_share_of_time",
    ),
}
"""Test id (with the number of the defect list) -> check, subject, what the reason must name."""

STUDIES = {
    "half_diverge": ("convergence_rate", study(accuracy=[0.97, 0.5] * 5), "digits.rate is 0.5"),
    "never_finite": ("convergence_rate", study(finite=False), "digits.rate is 0"),
    "no_ternary_run": ("convergence_rate", study(accuracy=[]), "digits.rate is nan"),
    "late": ("steps_to_quality", study(first_at=260), "steps_ratio is 3"),
    "never_there": ("steps_to_quality", study(accuracy=[0.5] * 10), "steps_ratio is inf"),
}


@pytest.mark.parametrize(("check", "subject", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_defect_turns_the_check_red(run_check, check, subject, reason):
    result = run_check(f"training.{check}", subject)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


@pytest.mark.parametrize(("check", "runs", "reason"), STUDIES.values(), ids=STUDIES)
def test_study_turns_the_check_red(run_check, check, runs, reason):
    result = run_check(f"training.{check}", ReferenceSubject(), study=runs)
    assert result.outcome is Outcome.FAIL, result.reason
    assert reason in result.reason


@pytest.mark.parametrize("check", CHECKS)
def test_reference_is_green(run_check, check):
    result = run_check(check, ReferenceSubject(), study=study())
    assert result.outcome is Outcome.PASS, result.reason


def test_every_check_has_a_defect():
    seeded = [entry[0] for entry in (*DEFECTS.values(), *STUDIES.values())]
    assert {f"training.{check}" for check in seeded} == set(CHECKS)


def test_slow_training_is_over_its_limit(run_check):
    result = run_check("performance.training_overhead", SlowStep())
    assert result.outcome is Outcome.FAIL, result.reason
    assert "overhead_ratio" in result.reason


def test_sessions_of_the_defects_still_train():
    """Defects must be alive but not crash: a check that errors proves nothing."""
    for _, subject, _ in DEFECTS.values():
        session = subject.session("digits", TrainOptions(steps=3))
        for _ in range(3):
            assert session.step().step >= 0
