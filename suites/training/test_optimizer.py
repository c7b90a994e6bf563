"""What the optimizer is given and does: parameters, clipping, schedule, decay, refused values."""

import math

import pytest
import torch

from forge_harness import oracles
from forge_harness.subject.protocols import TrainOptions

from .support import Watch, cheapest, differing, digests, shown, steps, tasks


@pytest.mark.forge_check("training.parameters_move")
def test_parameters_move(subject, evidence):
    """The optimizer owns exactly the model's parameters, and gradients move them, not only decay.

    Oracle: identity of parameter objects; movement left after adding lr * decay * w back, against
    8 roundings of the weight (2 for the update, the rest for products). At a hundredth of the peak
    rate, where a run ends, nine in ten elements with a gradient above the median still move: in
    bf16 such updates round away.
    """
    task = cheapest(subject)
    session = subject.session(task, TrainOptions(steps=4))
    owned = [id(p) for group in session.optimizer.param_groups for p in group["params"]]
    live = [id(p) for p in session.model.parameters() if p.requires_grad]
    evidence.equal(
        "parameters_not_owned",
        len(set(live) ^ set(owned)) + len(owned) - len(set(owned)),
        expected=0,
        unit="parameters",
        reason=f"the optimizer holds each of the {len(live)} live parameters once",
    )
    with Watch(session) as watch:
        steps(session, 4)
    still = [name for name in watch.updates[0].learning_rate if _only_decays(watch.updates, name)]
    evidence.equal(
        "parameters_only_decaying",
        len(still),
        expected=0,
        unit="parameters",
        reason=f"moved by nothing but decay over 4 steps: {shown(still)}",
    )
    peak = subject.schedule_spec(task, TrainOptions(steps=4)).peak
    evidence.at_least(
        "moved_at_low_rate",
        _moved_share(subject, task, peak / 100),
        limit=0.9,
        reason="share of elements with a gradient above the median that move",
    )


def _only_decays(updates, name):
    for update in updates:
        weight = update.before[name].double()
        decay = update.learning_rate[name] * update.weight_decay[name] * weight
        explained = float((update.moved(name) + decay).norm())
        if explained > 8 * oracles.UNIT_ROUNDOFF * float(weight.norm()):
            return False
    return True


def _moved_share(subject, task, rate):
    session = subject.session(task, TrainOptions(steps=4, learning_rate=rate))
    with Watch(session) as watch:
        steps(session, 4)
    moved = total = 0
    for name, gradient in watch.updates[0].gradients.items():
        if gradient is None or name not in watch.updates[0].learning_rate:
            continue
        strong = gradient.abs() > gradient.abs().median()
        change = watch.updates[-1].after[name] != watch.updates[0].before[name]
        moved += int((change & strong).sum())
        total += int(strong.sum())
    return moved / max(1, total)


@pytest.mark.forge_check("training.clip_effective")
def test_clip_effective(subject, evidence):
    """A spike in the gradients reaches the optimizer scaled to the clip norm, as one vector.

    Fault injected: one parameter's gradient times 1e6, by a tensor hook. Oracle: L2 norm over all
    parameters at the optimizer at most the limit (1e-3 for fp32 norms and the usual 1e-6 in the
    denominator), every gradient scaled by the same factor (1e-5), the norm before clipping
    reported, and no change at all under a limit that is not reached.
    """
    task = cheapest(subject)
    raw, record, update = _spiked_step(subject, task, clip_norm=0.5, spike=1e6)
    before = math.sqrt(sum(float(g.double().square().sum()) for g in raw.values()))
    given = {name: g for name, g in update.gradients.items() if g is not None}
    after = math.sqrt(sum(float(g.double().square().sum()) for g in given.values()))
    evidence.at_most(
        "norm_at_optimizer", after, limit=0.5 * 1.001, reason="clip norm 0.5, spike of 1e6"
    )
    evidence.at_least("norm_kept", after, limit=0.5 * 0.99, reason="clipped to the limit, not away")
    evidence.at_most(
        "reported_norm_error",
        abs(record.grad_norm - before) / before,
        limit=1e-4,
        reason="grad_norm is the norm over all gradients before clipping",
    )
    factors = [float(given[name].double().norm() / raw[name].double().norm()) for name in raw]
    evidence.at_most(
        "factor_spread",
        max(factors) / min(factors) - 1,
        limit=1e-5,
        reason="one factor for all gradients: the direction is kept",
    )
    raw, _, update = _spiked_step(subject, task, clip_norm=1e9, spike=1.0)
    changed = [name for name, g in raw.items() if not torch.equal(g, update.gradients[name])]
    evidence.equal(
        "changed_below_limit",
        len(changed),
        expected=0,
        unit="gradients",
        reason=f"a norm under the limit is left alone; changed: {shown(changed)}",
    )


def _spiked_step(subject, task, *, clip_norm, spike):
    """Makes one step with a spike; returns raw gradients, the record and what the optimizer saw."""
    session = subject.session(task, TrainOptions(steps=2, clip_norm=clip_norm))
    named = {n: p for n, p in session.model.named_parameters() if p.requires_grad}
    raw = {}

    def spiked(gradient):
        return gradient * spike

    def recorder(name):
        def hook(gradient):
            raw[name] = gradient.detach().clone()

        return hook

    victim = max(named, key=lambda name: named[name].numel())
    handles = [named[victim].register_hook(spiked)]
    handles += [parameter.register_hook(recorder(name)) for name, parameter in named.items()]
    with Watch(session) as watch:
        record = session.step()
    for handle in handles:
        handle.remove()
    return raw, record, watch.updates[0]


@pytest.mark.forge_check("training.schedule_trace")
def test_schedule_trace(subject, evidence):
    """Plan, report, live optimizer and the weights themselves follow the declared schedule.

    Oracle: the formulas of `ScheduleSpec` in float64, at every step of the first task and the
    first two of the others (1e-9 relative: float64 in another order). Where the optimizer is AdamW,
    each update is that of a float64 AdamW at the planned rate (1e-4 of the rate, plus 4 roundings
    of the weight), so a rate that is logged but not used shows.
    """
    for task, count in zip(tasks(subject), (40, *[2] * 100), strict=False):
        options = TrainOptions(steps=40)
        spec = subject.schedule_spec(task, options)
        expected = oracles.schedule(spec)
        plan = subject.planned_schedule(task, options)
        planned = [(step.learning_rate, step.weight_decay) for step in plan]
        evidence.at_most(
            f"{task}.plan_error",
            _rates_error(planned, expected),
            limit=1e-9,
            reason=f"plan of {spec.total_steps} steps against the {spec.kind} formula",
        )
        session = subject.session(task, options)
        with Watch(session) as watch:
            records = steps(session, count)
        reported = [(r.learning_rate, r.weight_decay) for r in records]
        evidence.at_most(
            f"{task}.report_error",
            _rates_error(reported, expected[:count]),
            limit=1e-9,
            reason="rates the steps report",
        )
        live = [(_largest(u.learning_rate), _largest(u.weight_decay)) for u in watch.updates]
        evidence.at_most(
            f"{task}.optimizer_error",
            _rates_error(live, expected[:count]),
            limit=1e-9,
            reason="rates in the optimizer's groups when it steps; the largest of all groups",
        )
        if type(session.optimizer) is torch.optim.AdamW:
            error, name = _update_error(session.optimizer, watch.updates, expected)
            evidence.at_most(
                f"{task}.update_error",
                error,
                limit=1.0,
                reason=f"updates against float64 AdamW, over their limit; worst: {name}",
            )


def _largest(rates):
    return max(rates.values())


def _rates_error(rates, expected):
    """Largest relative error; a missing or left-over step is infinite."""
    if len(rates) != len(expected):
        return math.inf
    return max(
        abs(value - wanted) / max(abs(wanted), 1e-300) if value != wanted else 0.0
        for pair, both in zip(rates, expected, strict=True)
        for value, wanted in zip(pair, both, strict=True)
    )


def _update_error(optimizer, updates, expected):
    """Largest error of an element over its limit, and the parameter it is in."""
    group = optimizer.param_groups[0]
    worst, where = 0.0, "none"
    for name in updates[0].learning_rate:
        adam = oracles.AdamW(tuple(group["betas"]), group["eps"])
        for update, rates in zip(updates, expected, strict=False):
            weight = oracles.float64(update.before[name])
            decay = rates.weight_decay if update.weight_decay[name] else 0.0
            wanted = adam.update(weight, update.gradients[name], rates.learning_rate, decay)
            limit = 1e-4 * rates.learning_rate + 4 * oracles.UNIT_ROUNDOFF * abs(weight)
            error = float((abs(oracles.float64(update.moved(name)) - wanted) / limit).max())
            if not error <= worst:
                worst, where = error, name
    return worst, where


@pytest.mark.forge_check("training.decay_groups")
def test_decay_groups(subject, evidence):
    """Weight decay shrinks quantized matrices at its rate, and never norms, biases or embeddings.

    Metamorphic: with all gradients set to zero just before the first step, a parameter moves by
    decay alone: exactly -lr * decay * w for the latent weights, nothing for the others. Tolerance:
    two roundings of the weight. Catches decay added to the gradient, doubled, or on ternary values.
    """
    for task in tasks(subject):
        session = subject.session(task, TrainOptions(steps=4))
        latent = {id(p) for p in subject.latent_weights(session.model).values()}
        latents = [n for n, p in session.model.named_parameters() if id(p) in latent]
        exempt = _exempt(session.model)
        rates = oracles.schedule(subject.schedule_spec(task, TrainOptions(steps=4)))[0]
        with Watch(session, zero_gradients=True) as watch:
            session.step()
        update = watch.updates[0]
        moved = [name for name in exempt if bool(update.moved(name).any())]
        evidence.equal(
            f"{task}.exempt_decayed",
            len(moved),
            expected=0,
            unit="parameters",
            reason=f"of {len(exempt)} norms, biases and embeddings; decayed: {shown(moved)}",
        )
        error = max((_decay_error(update, name, rates) for name in latents), default=math.inf)
        evidence.at_most(
            f"{task}.decay_error",
            error,
            limit=2 * oracles.ONE_ULP,
            reason=f"|move + lr decay w| / |w| of {len(latents)} latent weights, zero gradients",
        )


def _exempt(model):
    """Names of trainable vectors and of every parameter an embedding uses, tied ones too."""
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.dim() < 2 or id(p) in embeddings)
    ]


def _decay_error(update, name, rates):
    weight = update.before[name].double()
    wanted = -rates.learning_rate * rates.weight_decay * weight
    return float((update.moved(name) - wanted).abs().max() / weight.abs().max())


def _nan_gradient(session):
    parameter = max(session.model.parameters(), key=torch.Tensor.numel)
    return parameter.register_hook(lambda g: g.index_fill(-1, torch.tensor([0]), math.nan))


def _inf_gradient(session):
    parameter = min(session.model.parameters(), key=torch.Tensor.numel)
    return parameter.register_hook(lambda g: torch.full_like(g, math.inf))


def _nan_output(session):
    return session.model.register_forward_hook(lambda module, args, out: out * math.nan)


def _inf_output(session):
    return session.model.register_forward_hook(lambda module, args, out: out + math.inf)


FAULTS = {
    "nan_in_one_gradient": _nan_gradient,
    "inf_in_one_gradient": _inf_gradient,
    "nan_in_the_loss": _nan_output,
    "inf_in_the_loss": _inf_output,
}


@pytest.mark.forge_check("training.non_finite_stops")
def test_non_finite_stops(subject, evidence):
    """A NaN or infinity stops the step, aloud, before it reaches weights or optimizer state.

    Faults injected: in one gradient, and in the model's output, after two ordinary steps. Oracle:
    weights and optimizer state are bit for bit those before the step; the step raised, or reported
    a non-finite loss or norm; with the fault gone the next step is finite.
    """
    task = cheapest(subject)
    for fault, inject in FAULTS.items():
        session = subject.session(task, TrainOptions(steps=6))
        steps(session, 2)
        before = _weights_and_moments(session)
        handle = inject(session)
        loud = _is_loud(session)
        handle.remove()
        changed = differing(before, _weights_and_moments(session))
        evidence.equal(
            f"{fault}.changed",
            len(changed),
            expected=0,
            unit="tensors",
            reason=f"weights and optimizer state as before the step; changed: {shown(changed)}",
        )
        evidence.equal(
            f"{fault}.reported",
            loud,
            expected=True,
            reason="the step raises, or reports the non-finite loss or norm",
        )
        record = session.step()
        evidence.record(
            f"{fault}.loss_after", record.loss, unit="nats", reason="training goes on without it"
        )


def _is_loud(session):
    try:
        record = session.step()
    except Exception:
        return True
    return not (math.isfinite(record.loss) and math.isfinite(record.grad_norm))


def _weights_and_moments(session):
    state = {f"model.{name}": value for name, value in session.model.state_dict().items()}
    for index, entry in session.optimizer.state_dict()["state"].items():
        for field, value in entry.items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer.{index}.{field}"] = value
    return digests(state)
