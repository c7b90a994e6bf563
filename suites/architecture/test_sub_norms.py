"""The norms in front of ternary projections: there, effective, and passed by nothing."""

import pytest
import torch

from forge_harness.probes.inputs import prepares_inputs, quantized_input

from .calls import loss_of, recording
from .occasions import occasions
from .support import RESPONSE, Count, Worst, built, expect_none


@pytest.mark.forge_check("architecture.sub_norm_present")
def test_sub_norm_present(subject, evidence):
    """Each declared sub-norm is there, normalises every token, and what follows depends on it.

    Metamorphic: its input times 4 leaves its output as it is (magnitudes of 1e3, where the eps of a
    norm is under 1e-9); tokens of unequal magnitude come out with equal RMS, for gains as built;
    gains that trade places, within one cell of a ternary code, move its output; silencing its
    output moves the loss. Two oracles look for projections without one: none reads, value for
    value, what a declared norm was given to normalise; and blocks that differ in their number
    alone, of one class, declare the same norms.
    """
    declared = 0
    for task in subject.tasks():
        part = built(subject, task, batch_size=8)
        names = part.spec.sub_norms
        declared += len(names)
        missing = [name for name in names if name not in part.modules]
        if not names:
            declared += _held_inside(subject, part, evidence)
            continue
        evidence.equal(
            f"{task}.missing",
            ", ".join(missing),
            expected="",
            unit="modules",
            reason="every declared sub-norm is a module of the model",
        )
        for kind, count, why in (
            ("only_elsewhere", _unlike_their_siblings(part), "modules alike have norms alike"),
            ("bypassed", _bypasses(subject, part), "none reads what a norm is to normalise"),
        ):
            expect_none(evidence, f"{task}.{kind}", count, "modules", why)
        changes, spread, silent, numb = _norm_behaviour(subject, part)
        _hold(evidence, task, changes, spread, "the norm's output")
        expect_none(
            evidence, f"{task}.ignored", silent, "modules", "the loss depends on the norm's output"
        )
        expect_none(
            evidence, f"{task}.numb_gains", numb, "modules", "gains are not quantized, and are used"
        )
    if not declared:
        pytest.skip("no model declares a sub-norm, nor layers that normalise their inputs")


def _hold(evidence, task, changes, spread, what):
    evidence.at_most(
        f"{task}.scale_leak",
        changes.value,
        limit=1e-5,
        reason=changes.text(f"relative change of {what} for 4 times its input"),
    )
    evidence.at_most(
        f"{task}.rms_spread",
        spread.value,
        limit=1e-3,
        reason=spread.text(
            f"largest over smallest RMS of a token of {what}, less 1, without gains"
        ),
    )


def _held_inside(subject, part, evidence):
    """Holds what layers do to their inputs, where it is a norm for any of them; counts those."""
    if not prepares_inputs(subject):
        return 0
    quantized = {name: part.modules[name] for name in part.spec.quantized}
    changes, spread, normalise = Worst(), Worst(), 0
    for _, _, calls in occasions(subject, part, quantized):
        for name, call in calls.items():
            x = _unequal_tokens(call.input.detach())
            with torch.no_grad():
                y, larger = (quantized_input(subject, part.model, name, v) for v in (x, 4 * x))
            change = float((larger - y).abs().max() / y.abs().max())
            normalise += change < RESPONSE
            changes.see(name, change)
            rms = y.square().mean(dim=-1).sqrt()
            spread.see(name, float(rms.max() / rms.min()) - 1)
    if normalise:
        _hold(evidence, part.task, changes, spread, "what a layer quantizes")
    return normalise


def _unlike_their_siblings(part):
    """Modules like one that holds a declared norm, but for the number in their name, without it."""
    unlike = Count()
    for name in part.spec.sub_norms:
        owner, _, norm = name.rpartition(".")
        for other, module in part.modules.items():
            alike = type(module) is type(part.modules[owner])
            alike &= _numberless(other) == _numberless(owner)
            missing = f"{other}.{norm}".removeprefix(".") not in part.spec.sub_norms
            unlike.see(f"{other}, unlike {owner}", alike and missing)
    return unlike


def _numberless(name):
    return ["#" if entry.isdecimal() else entry for entry in name.split(".")]


def _bypasses(subject, part):
    """Quantized modules whose input is the input of a declared norm, before it was normalised.

    What a module multiplies is the output of the declared norm inside it, if there is one.
    """
    norms = {name: part.modules[name] for name in part.spec.sub_norms}
    quantized = {name: part.modules[name] for name in part.spec.quantized}
    with recording(norms | quantized) as calls:
        loss_of(subject, part.model, part.batch)
    bypassed = Count()
    for norm in norms:
        for name in quantized:
            if any(inner.startswith(f"{name}.") for inner in norms):
                continue
            pairs = [(one, two) for one in calls[norm] for two in calls[name]]
            reads = any(
                torch.equal(one.input, two.input) and not torch.equal(one.input, one.output)
                for one, two in pairs
            )
            bypassed.see(f"{name} reads the input of {norm}", reads)
    return bypassed


def _norm_behaviour(subject, part):
    changes, spread, silent, numb = Worst(), Worst(), Count(), Count()
    norms = {name: part.modules[name] for name in part.spec.sub_norms}
    never = set(norms)
    for now, seed, calls in occasions(subject, part, norms):
        never -= calls.keys()
        for name, call in calls.items():
            fresh = part.fresh_gains.get(name)
            _see_norm(norms[name], name, call.input, fresh, (changes, spread, numb))
            silent.see(name, _is_silent(subject, now, norms[name], seed))
    for name in sorted(never):
        silent.see(f"{name}: never called", True)
    return changes, spread, silent, numb


@torch.no_grad()
def _see_norm(norm, name, x, fresh_gains, seen):
    changes, spread, numb = seen
    x = _unequal_tokens(x)
    y, larger = norm(x), norm(4 * x)
    fresh = y
    if fresh_gains is not None:
        fresh = _with_gains(norm, fresh_gains, x)
        traded = _with_gains(norm, norm.weight.roll(1), x)
        moved = float((traded - y).abs().max() / y.abs().max())
        numb.see(name, not moved >= RESPONSE)
    changes.see(name, float((larger - y).abs().max() / y.abs().max()))
    rms = _normalised(norm, fresh, fresh_gains).square().mean(dim=-1).sqrt()
    spread.see(name, float(rms.max() / rms.min()) - 1)


def _is_silent(subject, part, norm, seed):
    """Whether the loss of a batch is the same where the norm says nothing but zeros."""
    loss = loss_of(subject, part.model, part.batch, seed)
    handle = norm.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
    silenced = loss_of(subject, part.model, part.batch, seed)
    handle.remove()
    return silenced == loss


def _with_gains(norm, gains, x):
    """The output of a norm with other gains; it keeps its own."""
    kept = norm.weight.clone()
    norm.weight.copy_(gains)
    y = norm(x)
    norm.weight.copy_(kept)
    return y


def _normalised(norm, y, fresh):
    """The output of a norm without its bias and gains, where they can be told; gains of 0 stay."""
    gains, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    gains = gains if fresh is None else fresh
    if bias is not None and bias.shape == y.shape[-1:]:
        y = y - bias.detach()
    if gains is None or gains.shape != y.shape[-1:]:
        return y
    return y / torch.where(gains == 0, torch.ones_like(gains), gains).detach()


def _unequal_tokens(x):
    """Tokens of unequal magnitude, in the shape they came in; others take the place of zeros."""
    rows = x.reshape(-1, x.shape[-1])
    rms = rows.square().mean(dim=-1, keepdim=True).sqrt()
    if not rms.any():  # the first step of a recurrence, whose state is nothing yet
        rows = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        rms = rows.square().mean(dim=-1, keepdim=True).sqrt()
    used = rows[(rms > 0).flatten()] / rms[rms > 0][:, None]
    filled = used[torch.arange(len(rows)) % len(used)]
    return (filled * torch.logspace(3, 5, len(rows))[:, None]).view(x.shape)
