"""What the optimizer is given and does: parameters, clipping, schedule, decay."""

import math

import pytest
import torch

from forge_harness import oracles
from forge_harness.evidence import largest, smallest
from forge_harness.subject.protocols import TrainOptions

from .decays import LIMIT, decay_error, decaying_update, own_multiple
from .excess import is_worse
from .states import copied, on_gradient
from .support import (
    AsBuilt,
    Watch,
    cannot_show,
    cheapest,
    declared_schedule,
    is_coarse,
    norm,
    optimizer_of,
    others,
    roundoff,
    settle,
    shown,
    steps,
    tasks,
    trained_model,
)

LEAST_LOSS_SCALE = 128.0
"""Scales of half precision begin higher: GradScaler at 65,536, fixed ones at 128 or 1,024."""


@pytest.mark.forge_check("training.parameters_move")
def test_parameters_move(subject, evidence):
    """The optimizer owns exactly the model's parameters, and gradients move them, not only decay.

    Oracle: identity of parameter objects, before and after four steps (what is frozen at first may
    be there already, and must be once it is not); movement left after adding lr * decay * w back,
    against 8 roundings of the weight (2 for the update, the rest for products). At a hundredth of
    the peak rate, where a run ends, nine in ten elements with a gradient above the median still
    move: in bf16 such updates round away. Of tasks but the cheapest, who owns what. Weights that
    are stored in less than fp32 may be rounded stochastically, and show neither. A gradient under
    the roundoff of all of them together is rounding: the loss does not depend on that parameter
    (biases of keys, which a softmax takes away), and how it is moved does not matter.
    """
    task = cheapest(subject)
    session = subject.session(task, TrainOptions(steps=4))
    _expect_owned(session, evidence, "")
    with Watch(session) as watch:
        steps(session, 4)
    _expect_owned(session, evidence, "after_steps.")
    first = watch.updates[0]
    coarse = [name for name in first.learning_rate if is_coarse(first.before[name])]
    still = [
        name
        for name in first.learning_rate
        if name not in coarse and _only_decays(watch.updates, name)
    ]
    idle = [name for name in still if _only_rounding(watch.updates, name)]
    still = [name for name in still if name not in idle]
    evidence.equal(
        "parameters_only_decaying",
        len(still),
        expected=0,
        unit="parameters",
        reason=f"moved by nothing but decay over 4 steps: {shown(still)}; left out, as their "
        f"gradients are rounding alone: {shown(idle)}",
    )
    for other in others(subject):
        _expect_owned(subject.session(other, TrainOptions(steps=4)), evidence, f"{other}.")
    peak = subject.schedule_spec(task, TrainOptions(steps=4)).peak
    evidence.at_least(
        "moved_at_low_rate",
        _moved_share(subject, task, peak / 100),
        limit=0.0 if coarse else 0.9,
        reason="share of elements with a gradient above the median that move",
    )
    cannot_show(coarse, "that gradients move them at a low rate")


def _expect_owned(session, evidence, prefix):
    owned = [id(p) for group in optimizer_of(session).param_groups for p in group["params"]]
    parameters = list(trained_model(session).parameters())
    live = [id(p) for p in parameters if p.requires_grad]
    frozen = {id(p) for p in parameters if not p.requires_grad}
    evidence.equal(
        f"{prefix}parameters_not_owned",
        len(set(live) ^ (set(owned) - frozen)) + len(owned) - len(set(owned)),
        expected=0,
        unit="parameters",
        reason=f"the optimizer holds each of the {len(live)} live parameters once",
    )


def _only_decays(updates, name):
    for update in updates:
        weight = update.before[name].double()
        decay = update.learning_rate[name] * update.weight_decay[name] * weight
        explained = float((update.moved(name) + decay).norm())
        if explained > 8 * oracles.UNIT_ROUNDOFF * float(weight.norm()):
            return False
    return True


def _only_rounding(updates, name):
    """Whether the gradients of a parameter are not zero, and vanish beside the roundoff of all."""
    for update in updates:
        given = {n: g for n, g in update.gradients.items() if g is not None}
        if name not in given or not 0.0 < norm({name: given[name]}) < (
            oracles.UNIT_ROUNDOFF * norm(given)
        ):
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
    reported, and no change at all under a limit that is not reached. A loss scale that is a power
    of two, as that one run shows it, is taken off before all of this. Gradients in bf16 have four
    roundings of theirs more.
    """
    for task in tasks(subject):
        prefix = "" if task == cheapest(subject) else f"{task}."
        raw, _, update = _spiked_step(subject, task, clip_norm=1e9, spike=1.0)
        scale = _loss_scale(raw, update.gradients)
        _expect_clipped(subject, evidence, task, prefix, scale)
        _expect_unchanged(evidence, prefix, raw, update, scale)


def _loss_scale(raw, given):
    """The power of two by which gradients are above those the optimizer gets; 1 without one.

    Less than `LEAST_LOSS_SCALE` is no such scale, but gradients that are halved on their way.
    """
    before, after = norm(raw), norm({name: given[name] for name in raw})
    ratio = before / after if after else math.inf
    if not 1.0 < ratio < math.inf:
        return 1.0
    power = 2.0 ** round(math.log2(ratio))
    return power if power >= LEAST_LOSS_SCALE and abs(ratio / power - 1) < 1e-6 else 1.0


def _expect_unchanged(evidence, prefix, raw, update, scale):
    changed = [n for n, g in raw.items() if not torch.equal(g, scale * update.gradients[n])]
    evidence.equal(
        f"{prefix}changed_below_limit",
        len(changed),
        expected=0,
        unit="gradients",
        reason=f"a norm under the limit is left alone; changed: {shown(changed)}"
        + (f"; a loss scale of {scale:g} was taken off" if scale > 1 else ""),
    )


def _expect_clipped(subject, evidence, task, prefix, scale):
    raw, record, update = _spiked_step(subject, task, clip_norm=0.5, spike=1e6)
    given = {name: g for name, g in update.gradients.items() if g is not None}
    before, after = norm(raw) / scale, norm(given)
    # The norm of a tensor, that of norms, the factor and its products.
    rounded = 4 * (largest(map(roundoff, given.values())) - oracles.UNIT_ROUNDOFF)
    evidence.at_most(
        f"{prefix}norm_at_optimizer",
        after,
        limit=0.5 * (1.001 + rounded),
        reason="clip norm 0.5, spike of 1e6",
    )
    evidence.at_least(
        f"{prefix}norm_kept",
        after,
        limit=0.5 * (0.99 - rounded),
        reason="clipped to the limit, not away",
    )
    evidence.at_most(
        f"{prefix}reported_norm_error",
        abs(record.grad_norm - before) / before,
        limit=1e-4 + rounded,
        reason="grad_norm is the norm over all gradients before clipping",
    )
    factors = [norm({n: given[n]}) / norm({n: g}) for n, g in raw.items() if g.any()]
    evidence.at_most(
        f"{prefix}factor_spread",
        largest(factors) / smallest(factors) - 1,
        limit=1e-5 + rounded,
        reason="one factor for all gradients: the direction is kept",
    )


def _spiked_step(subject, task, *, clip_norm, spike):
    """Makes one step with a spike; returns raw gradients, the record and what the optimizer saw."""
    session = subject.session(task, TrainOptions(steps=8, clip_norm=clip_norm))
    settle(session)
    model = trained_model(session)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    raw = {}

    def spiked(gradient):
        return gradient * spike

    def recorder(name):
        def hook(gradient):
            raw[name] = copied(gradient)

        return hook

    victim = max(named, key=lambda name: named[name].numel())
    handles = [on_gradient(named[victim], spiked)]
    handles += [on_gradient(parameter, recorder(name)) for name, parameter in named.items()]
    with Watch(session) as watch:
        record = session.step()
    for handle in handles:
        handle.remove()
    if not raw:
        pytest.skip(
            f"{task}: no gradient of a step came by torch's hooks of the parameters: what is given "
            "to the optimizer cannot be compared with it"
        )
    if not watch.updates:
        pytest.skip(
            f"{task}: the optimizer made no step of gradients times {spike:g}: under the session's "
            "loss scale they overflow, and whether they are clipped does not show"
        )
    return raw, record, watch.updates[0]


@pytest.mark.forge_check("training.schedule_trace")
def test_schedule_trace(subject, evidence):
    """Plan, report, live optimizer and the weights themselves follow the declared schedule.

    Oracle: the formulas of `ScheduleSpec` in float64, at every step of the first task, the first
    two of the others, and the first twelve of four micro-batches each (1e-9 relative: float64 in
    another order; four roundings of a rate that is kept in an fp32 tensor). A group may have a rate
    and a decay of its own, at a constant multiple of the plan's. Where the optimizer is AdamW, each
    update is that of a float64 AdamW at its group's rate (1e-4 of the rate, plus 4 roundings of the
    weight), so a rate that is logged but not used shows.
    Any other optimizer, without decay, moves half as far from the same weights at half the rate. A
    kind without a formula is held to its plan. Weights in less than fp32 have 8 roundings of theirs
    (stochastic ones err by twice as much); where those are half of an update it cannot be judged.
    """
    blurred = set()
    for task, count in zip(tasks(subject), (40, *[2] * 100), strict=False):
        options = TrainOptions(steps=40)
        _expect_planned(subject, evidence, task, options)
        blurred |= _trace(subject, evidence, task, options, count, task)
    task = cheapest(subject)
    options = TrainOptions(steps=40, accumulation=4)
    blurred |= _trace(subject, evidence, task, options, 12, f"{task}.accumulated")
    cannot_show(sorted(blurred), "the rate of their updates")


def _expect_planned(subject, evidence, task, options):
    """Holds the plan to the formula of its kind, where there is one."""
    spec = subject.schedule_spec(task, options)
    if spec.kind not in oracles.KINDS:
        evidence.record(
            f"{task}.plan",
            f"not measured: no formula of kind {spec.kind!r}; known are {shown(oracles.KINDS)}",
            reason="report, optimizer and updates are held to the plan; hold the plan to its "
            "formula in a check of your own",
        )
        return
    plan = subject.planned_schedule(task, options)
    planned = [(step.learning_rate, step.weight_decay) for step in plan]
    error, where = _rates_error(planned, oracles.schedule(spec))
    evidence.at_most(
        f"{task}.plan_error",
        error,
        limit=1e-9,
        reason=f"plan of {spec.total_steps} steps against the {spec.kind} formula{where}",
    )


def _trace(subject, evidence, task, options, count, prefix):
    """Holds the first steps of a session to the schedule of its options.

    Returns the parameters whose updates their own rounding hides.
    """
    expected = declared_schedule(subject, task, options)
    session = subject.session(task, options)
    limit = _rate_limit(session.optimizer)
    with Watch(session) as watch:
        records = [watch.step() for _ in range(count)]
    reported = [(r.learning_rate, r.weight_decay) for r in records]
    error, where = _rates_error(reported, expected[:count])
    evidence.at_most(
        f"{prefix}.report_error",
        error,
        limit=limit,
        reason=f"rates the steps report{where}",
    )
    live = [
        (_nearest(u.learning_rate, now.learning_rate), max(u.weight_decay.values()))
        for u, now in zip(watch.updates, expected, strict=False)
    ]
    error, where = _rates_error(live, expected[:count])
    evidence.at_most(
        f"{prefix}.optimizer_error",
        error,
        limit=limit,
        reason="in the optimizer's groups when it steps: the rate nearest to the plan's, the "
        f"largest decay{where}",
    )
    for kind, what in (("learning_rate", "rate"), ("weight_decay", "decay")):
        drift, multiples = _multiples(watch.updates, expected, kind)
        evidence.at_most(
            f"{prefix}.{what}_drift",
            drift,
            limit=limit,
            reason=f"each group's {what} is a constant multiple of the plan's: {multiples}",
        )
    _expect_nothing_outside(evidence, prefix, watch.updates)
    if type(optimizer_of(session)) is torch.optim.AdamW:
        error, name, blurred = _update_error(session, watch.updates)
        evidence.at_most(
            f"{prefix}.update_error",
            error,
            limit=1.0,
            reason=f"updates against float64 AdamW, over their limit; worst: {name}",
        )
    else:
        error, name, blurred = _rate_error(subject, task, options, expected)
        evidence.at_most(
            f"{prefix}.rate_response",
            error,
            limit=1.0,
            reason="|move - 2 * move at half the rate| over 1e-4 of it and 4 roundings of the "
            f"weight; worst: {name}",
        )
    return blurred


def _rate_limit(optimizer):
    """Largest relative error of a rate: float64 in another order, or what its tensor rounds."""
    rates = [group["lr"] for group in optimizer.param_groups]
    kept = [
        rate for rate in rates if isinstance(rate, torch.Tensor) and rate.dtype != torch.float64
    ]
    return 4 * largest(map(roundoff, kept)) if kept else 1e-9


def _expect_nothing_outside(evidence, prefix, updates):
    moved = sorted({name for update in updates for name in update.moved_outside})
    evidence.equal(
        f"{prefix}.moved_outside",
        len(moved),
        expected=0,
        unit="parameters",
        reason=f"changed by a step before or after its optimizer's, bit for bit: {shown(moved)}",
    )


def _nearest(rates, wanted):
    return min(rates.values(), key=lambda rate: abs(rate - wanted))


def _multiples(updates, expected, kind):
    """Largest relative change of a parameter's rate over the plan's, and the first step's."""
    found = {}
    for update, now in zip(updates, expected, strict=False):
        planned = getattr(now, kind)
        for name, rate in getattr(update, kind).items() if planned else ():
            found.setdefault(name, []).append(rate / planned)
    drifts = (
        (largest(ratios) - smallest(ratios)) / largest(map(abs, ratios)) if any(ratios) else 0.0
        for ratios in found.values()
    )
    # What is planned to be 0 throughout has no multiples; whether it is used shows elsewhere.
    multiples = ", ".join(sorted({f"{ratios[0]:.4g}" for ratios in found.values()}))
    return largest((0.0, *drifts)), multiples or "0 throughout"


def _rates_error(rates, expected):
    """Largest relative error, and for a reason where it is; too few or many steps are infinite."""
    if len(rates) != len(expected):
        return math.inf, f"; {len(rates)} steps instead of {len(expected)}"
    worst, where = 0.0, ""
    for step, (pair, both) in enumerate(zip(rates, expected, strict=True)):
        for what, value, wanted in zip(("rate", "weight decay"), pair, both, strict=True):
            error = abs(value - wanted) / max(abs(wanted), 1e-300) if value != wanted else 0.0
            if is_worse(error, worst):
                worst = error
                where = f"; worst: {what} of step {step}, {value:.6g} for {wanted:.6g}"
    return worst, where


def _update_error(session, updates):
    """Largest error of an element over its limit, the parameter it is in, and those left out."""
    groups = {id(p): group for group in optimizer_of(session).param_groups for p in group["params"]}
    worst, where, blurred = 0.0, "none", set()
    for name in updates[0].learning_rate:
        if _is_blurred(updates[0], name):
            blurred.add(name)
            continue
        group = groups[id(trained_model(session).get_parameter(name))]
        betas = tuple(map(float, group["betas"]))
        adam = oracles.AdamW(betas, group["eps"], bool(group["amsgrad"]))
        for update in updates:
            weight, rate = oracles.float64(update.before[name]), update.learning_rate[name]
            decay = update.weight_decay[name]
            wanted = adam.update(weight, update.gradients[name], rate, decay)
            limit = 1e-4 * rate + oracles.float64(_rounding(update, name))
            error = float((abs(oracles.float64(update.moved(name)) - wanted) / limit).max())
            if is_worse(error, worst):
                worst, where = error, name
    return worst, where, blurred


def _rounding(update, name):
    """Largest error of a parameter's elements by storing them, before and after an update."""
    weight = update.before[name]
    size = weight.double().abs()
    if is_coarse(weight):
        return 8 * roundoff(weight) * (size + update.moved(name).abs())
    return 4 * roundoff(weight) * size


def _is_blurred(update, name):
    """Whether rounding is half of what an update adds to the usual element, or more."""
    moved = update.moved(name).abs()
    coarse = is_coarse(update.before[name])
    return coarse and bool(_rounding(update, name).median() > moved.median() / 2)


def _rate_error(subject, task, options, expected):
    """How far the first update, whose state is empty, is from linear in the rate; as above."""
    first = next(index for index, now in enumerate(expected) if now.learning_rate)
    whole, half = (_undecayed(subject, task, options, first, factor) for factor in (1.0, 0.5))
    worst, where, blurred = 0.0, "none", set()
    for name in whole.learning_rate:
        if _is_blurred(whole, name):
            blurred.add(name)
            continue
        moved = whole.moved(name)
        limit = 1e-4 * moved.abs() + _rounding(whole, name) + 1e-37
        error = float(((moved - 2 * half.moved(name)).abs() / limit).max())
        if is_worse(error, worst):
            worst, where = error, name
    return worst, where, blurred


def _undecayed(subject, task, options, index, factor):
    """The update of one step without decay, at a multiple of its rate."""
    session = subject.session(task, options)
    steps(session, index)

    def change(optimizer, *_):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
            group["weight_decay"] = 0.0

    handle = optimizer_of(session).register_step_pre_hook(change)
    with Watch(session) as watch:
        session.step()
    handle.remove()
    return watch.updates[0]


@pytest.mark.forge_check("training.decay_groups")
def test_decay_groups(subject, evidence):
    """Weight decay shrinks quantized matrices at its rate, and never norms, biases or embeddings.

    Metamorphic: with all gradients set to zero just before each step, a parameter moves by decay
    alone: exactly -lr * decay * w for the latent weights (torch's SGD has decay go through its
    momentum), nothing for the others, and nothing before or after the optimizer's own step. Looked
    at in the first step that has a rate and a decay. Tolerance: two roundings of the weight; those
    of less than fp32 are more than the decay there is. Catches decay added to the gradient,
    doubled, on ternary values, or written by hand after the step. An optimizer of one's own may
    bring each update to the norm of its weight (LAMB): then the decay does not show.
    """
    coarse, multiples = set(), {}
    for task in tasks(subject):
        options = TrainOptions(steps=4)
        session = AsBuilt(subject, task, subject.session(task, options))
        model = trained_model(session)
        latent = {id(p) for p in subject.latent_weights(model).values() if p.requires_grad}
        latents = [n for n, p in model.named_parameters() if id(p) in latent]
        exempt = _exempt(model)
        plan = declared_schedule(subject, task, options)
        update = decaying_update(session, plan)
        _expect_nothing_outside(evidence, task, [update])
        moved = [name for name in exempt if bool(update.moved(name).any())]
        evidence.equal(
            f"{task}.exempt_decayed",
            len(moved),
            expected=0,
            unit="parameters",
            reason=f"of {len(exempt)} norms, biases and embeddings; decayed: {shown(moved)}",
        )
        unowned = [name for name in latents if name not in update.learning_rate]
        evidence.equal(
            f"{task}.not_decayed",
            len(unowned),
            expected=0,
            unit="parameters",
            reason=f"of {len(latents)} latent weights, no group of the optimizer has: "
            f"{shown(unowned)}",
        )
        coarse |= {name for name in latents if is_coarse(update.before[name])}
        shows = [n for n in latents if n not in coarse and update.before[n].any()]
        decays = [now.weight_decay for now in plan[: session.step_index]]
        errors = {name: decay_error(session, update, name, decays) for name in shows}
        own = {n: own_multiple(session, update, n) for n in shows if not errors[n] <= LIMIT}
        if own and decays[-1] and None not in own.values():
            multiples |= {f"{task}.{name}": f"{multiple:.3g}" for name, multiple in own.items()}
        elif shows:
            evidence.at_most(
                f"{task}.decay_error",
                largest(errors.values()),
                limit=LIMIT,
                reason=f"|move + lr decay w| / |w| of {len(shows)} latent weights, zero gradients",
            )
    cannot_show(sorted(coarse), "the decay of one step")
    if multiples:
        name, multiple = next(iter(multiples.items()))
        pytest.skip(
            f"the optimizer, none of torch's, shrinks {len(multiples)} weights by other multiples "
            f"of the rate than the decay ({name}: {multiple}): decay in a trust ratio, or doubled"
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
