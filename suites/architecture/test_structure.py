"""What surrounds the quantized layers: sub-norms, the causal mask, the state dict."""

import pytest
import torch

from forge_harness.subject.protocols import Batch

from .support import RESPONSE, Count, Worst, built, expect_none, observe, recording


@pytest.mark.forge_check("architecture.sub_norm_present")
def test_sub_norm_present(subject, evidence):
    """Each declared sub-norm is there, normalises every token, and what follows depends on it.

    Metamorphic: its input times 4 leaves its output as it is (magnitudes of 1e3, where the eps of a
    norm is under 1e-9); tokens of unequal magnitude come out with equal RMS; silencing its output
    moves the loss.
    """
    declared = 0
    for task in subject.tasks():
        part = built(subject, task, batch_size=8)
        names = part.spec.sub_norms
        declared += len(names)
        missing = [name for name in names if name not in part.modules]
        if not names:
            continue
        evidence.equal(
            f"{task}.missing",
            ", ".join(missing),
            expected="",
            unit="modules",
            reason="every declared sub-norm is a module of the model",
        )
        changes, spread, silent = _norm_behaviour(subject, part)
        evidence.at_most(
            f"{task}.scale_leak",
            changes.value,
            limit=1e-5,
            reason=changes.text("relative change of the norm's output for 4 times its input"),
        )
        evidence.at_most(
            f"{task}.rms_spread",
            spread.value,
            limit=1e-3,
            reason=spread.text("largest over smallest RMS of a token, less 1, gains taken out"),
        )
        expect_none(
            evidence, f"{task}.ignored", silent, "modules", "the loss depends on the norm's output"
        )
    if not declared:
        pytest.skip("no model declares a sub-norm")


def _norm_behaviour(subject, part):
    changes, spread, silent = Worst(), Worst(), Count()
    norms = {name: part.modules[name] for name in part.spec.sub_norms}
    with recording(norms) as calls, torch.no_grad():
        loss = subject.loss(part.model, part.batch)
    for name, norm in norms.items():
        if not calls[name]:
            silent.see(f"{name}: never called", True)
            continue
        x = _unequal_tokens(calls[name][0].arguments[0])
        with torch.no_grad():
            y, larger = norm(x), norm(4 * x)
        changes.see(name, float((larger - y).abs().max() / y.abs().max()))
        rms = (y / _gains(norm, y)).square().mean(dim=-1).sqrt()
        spread.see(name, float(rms.max() / rms.min()) - 1)
        handle = norm.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
        with torch.no_grad():
            silent.see(name, bool(torch.equal(subject.loss(part.model, part.batch), loss)))
        handle.remove()
    return changes, spread, silent


def _gains(norm, y):
    """What a norm multiplies by after normalising; 1 where it cannot be told or is 0."""
    gains = getattr(norm, "weight", None)
    if gains is None or gains.shape != y.shape[-1:]:
        return torch.ones(y.shape[-1:])
    return torch.where(gains == 0, torch.ones_like(gains), gains).detach()


def _unequal_tokens(x):
    rows = x.reshape(-1, x.shape[-1])
    rms = rows.square().mean(dim=-1, keepdim=True).sqrt()
    used = rows[(rms > 0).flatten()] / rms[rms > 0][:, None]
    return used * torch.logspace(3, 5, len(used))[:, None]


@pytest.mark.forge_check("architecture.causal_mask")
def test_causal_mask(subject, evidence):
    """A later token never moves an earlier output.

    Metamorphic: replace all tokens after a position; outputs up to it stay (1e-6 of the largest
    output: masked terms are exact zeros, so they are equal bit for bit unless the kernel reorders
    sums), outputs at and after it respond. An activation scale taken over the sequence shows too.
    """
    causal = [task for task in subject.tasks() if subject.model_spec(task).causal]
    if not causal:
        pytest.skip("no model is declared causal")
    for task in causal:
        part = built(subject, task)
        leak, least = _influence(subject, part)
        evidence.at_most(
            f"{task}.leak",
            leak.value,
            limit=1e-6,
            reason=leak.text("relative change of outputs before the first changed token"),
        )
        evidence.at_least(
            f"{task}.response",
            least,
            limit=RESPONSE,
            reason="relative change of outputs after it; otherwise nothing was tested",
        )


def _influence(subject, part):
    leak, least = Worst(), float("inf")
    inputs = part.batch.inputs
    length = inputs.shape[1]
    before = _outputs(subject, part, inputs)
    scale = float(before.abs().max())
    for mode in (True, False):
        part.model.train(mode)
        for cut in sorted({0, 1, length // 2, length - 2}):
            changed = inputs.clone()
            # Reversed and shifted within the alphabet seen: valid ids, all different places.
            changed[:, cut + 1 :] = torch.roll(inputs, 1, dims=0)[:, cut + 1 :].flip(1)
            moved = (_outputs(subject, part, changed) - before).abs()
            kept, later = moved[:, : cut + 1], moved[:, cut + 1 :]
            leak.see(f"tokens after position {cut}", float(kept.max()) / scale)
            least = min(least, float(later.max()) / scale)
    return leak, least


def _outputs(subject, part, inputs):
    return observe(subject, part.model, Batch(inputs=inputs, targets=part.batch.targets))


@pytest.mark.forge_check("architecture.state_dict_round_trip")
def test_state_dict_round_trip(subject, evidence, tmp_path):
    """A model loaded from a saved state dict is the same model; tied weights stay tied.

    Oracle: bitwise equality of every tensor and of the loss, after a trip through a file into a
    model built from another seed; a missing key is refused.
    """
    for task in subject.tasks():
        part = built(subject, task)
        torch.save(part.model.state_dict(), tmp_path / f"{task}.pt")
        state = torch.load(tmp_path / f"{task}.pt", weights_only=True)
        other = subject.build_model(task, seed=1)
        other.load_state_dict(state, strict=True)
        for first, second in part.spec.tied:
            tensors = other.state_dict(keep_vars=True)
            evidence.equal(
                f"{task}.{second}.tied",
                tensors[first].data_ptr() == tensors[second].data_ptr(),
                expected=True,
                reason=f"declared to share one tensor with {first}",
            )
        changed = _changed(part.model, other)
        expect_none(evidence, f"{task}.changed", changed, "tensors", "bitwise equal, dtype kept")
        with torch.no_grad():
            losses = [float(subject.loss(m, part.batch)) for m in (part.model, other)]
        evidence.equal(
            f"{task}.loss", losses[1], expected=losses[0], unit="nats", reason="same weights"
        )
        evidence.equal(
            f"{task}.missing_key_refused",
            _refuses_missing(other, state),
            expected=True,
            reason="a state dict without one quantized weight does not load strictly",
        )


def _changed(model, other):
    changed = Count()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    after = dict(other.named_parameters()) | dict(other.named_buffers())
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            changed.see(f"{name} is in one model only", True)
            continue
        one, two = before[name], after[name]
        changed.see(name, one.dtype != two.dtype or not torch.equal(one, two))
    return changed


def _refuses_missing(model, state):
    incomplete = dict(state)
    incomplete.pop(next(iter(incomplete)))
    try:
        model.load_state_dict(incomplete, strict=True)
    except (KeyError, RuntimeError):
        return True
    return False
