"""The models: what is quantized, and that the forward computes what the declaration says."""

import numpy as np
import pytest
import torch

from forge_harness import oracles
from forge_harness.subject.protocols import Batch

from .support import (
    Count,
    Worst,
    built,
    code_errors,
    expect_none,
    levels,
    observe,
    recording,
    relative,
    scale_groups,
)

_RESPONSE = 1e-3
"""Least relative change of an output that counts as a response; rounding is under 1e-5."""


@pytest.mark.forge_check("architecture.parameter_budget")
def test_parameter_budget(subject, evidence):
    """The trainable parameters are as many as the closed formula says, and within the budget.

    Oracle: counting each parameter once, shared ones too. Exact.
    """
    for task in subject.tasks():
        spec = subject.model_spec(task)
        model = subject.build_model(task, seed=0)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        evidence.equal(
            f"{task}.parameters",
            count,
            expected=spec.parameters,
            unit="parameters",
            reason="declared by a closed formula",
        )
        evidence.at_most(
            f"{task}.budget",
            count,
            limit=spec.max_parameters,
            unit="parameters",
            reason="declared budget of the model",
        )


@pytest.mark.forge_check("architecture.ternary_alphabet")
def test_ternary_alphabet(subject, evidence):
    """The forward uses at most three values a scale group, -s, 0 and +s, in either mode.

    Oracle: counting distinct values of every quantized weight, those within 1e-6 of the scale as
    one (the rounding of w + (wq - w).detach()). Groups are those the subject declares: one a
    weight unless its `quantization_info` says a part or a row.
    """
    for task in subject.tasks():
        model = subject.build_model(task, seed=0)
        granularity = _granularity(subject, task)
        most, groups, lopsided = Worst(), Worst(), Count()
        for mode in (True, False):
            model.train(mode)
            for name, effective in subject.effective_weights(model).items():
                values = effective.detach()
                case = f"{name}, {'training' if mode else 'evaluation'}"
                runs = scale_groups(values)
                groups.see(case, len(runs))
                most.see(case, max(levels(values[run]) for run in runs))
                lopsided.see(case, sum(_lopsided(values[run]) for run in runs))
        evidence.at_most(
            f"{task}.levels",
            most.value,
            limit=3,
            unit="values",
            reason=most.text("distinct values a scale group"),
        )
        expect_none(
            evidence,
            f"{task}.lopsided",
            lopsided,
            "groups",
            "the two outer levels are +s and -s",
        )
        if granularity == "tensor":
            evidence.equal(
                f"{task}.groups",
                int(groups.value),
                expected=1,
                unit="groups",
                reason=groups.text("one scale a weight is declared"),
            )


def _granularity(subject, task):
    info = getattr(subject, "quantization_info", None)
    return info(task).granularity if info else "tensor"


def _lopsided(values):
    """Whether largest and smallest value of a ternary group are not each other's negative."""
    top, bottom = float(values.max()), float(values.min())
    return top > 0 > bottom and abs(top + bottom) > 1e-5 * top


@pytest.mark.forge_check("architecture.quantized_modules")
def test_quantized_modules(subject, evidence):
    """Exactly the declared modules multiply by ternary weights and int8 activations.

    Three views that must agree: the declaration covers every module with a matrix; each quantized
    weight is the float64 quantization of its latent weight, also after the latent moved; and the
    module's own output, its input held fixed, is that of the integer formula in both modes.
    Modules declared full precision respond to changes no ternary weight would see.
    """
    for task in subject.tasks():
        part = built(subject, task)
        undeclared = _undeclared(subject, part)
        evidence.equal(
            f"{task}.undeclared",
            ", ".join(sorted(undeclared)),
            expected="",
            unit="modules",
            reason="every module with a matrix is quantized or full precision, never both",
        )
        error, wrong = _effective_errors(subject, part)
        expect_none(evidence, f"{task}.code_errors", wrong, "codes", "codes of the latent weight")
        evidence.at_most(
            f"{task}.effective_error",
            error.value,
            limit=2 * oracles.SCALE_RTOL,
            reason=error.text("scale of the effective weight against the latent's absolute mean"),
        )
        excess = _forward_excess(subject, part)
        evidence.at_most(
            f"{task}.forward_error",
            excess.value,
            limit=1.0,
            reason=excess.text(
                "module output against the integer formula on its recorded input, over 16 u L1 "
                "plus one code step for inputs at a tie; norms inside a module must be declared"
            ),
        )
        for name in part.spec.full_precision:
            evidence.at_least(
                f"{task}.{name}.response",
                _full_precision_response(subject, part, name),
                limit=_RESPONSE,
                reason="relative change of the output when magnitudes move within code cells",
            )


def _undeclared(subject, part):
    """Names on which declaration, module tree, effective and latent weights disagree."""
    matrices = {
        name
        for name, module in part.modules.items()
        if any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }
    quantized, full = set(part.spec.quantized), set(part.spec.full_precision)
    effective = set(subject.effective_weights(part.model))
    latent = set(subject.latent_weights(part.model))
    return (
        (matrices ^ (quantized | full))
        | (quantized & full)
        | (quantized ^ effective)
        | (quantized ^ latent)
    )


def _effective_errors(subject, part):
    error, wrong = Worst(), Count()
    for moment in ("as built", "after the latent moved"):
        effective = subject.effective_weights(part.model)
        for name, latent in subject.latent_weights(part.model).items():
            for run in scale_groups(effective[name]):
                expected = oracles.ternary(latent[run])
                values = effective[name][run].detach()
                codes = torch.sign(values).to(torch.int8)
                limit = oracles.TERNARY_MARGIN
                case = f"{name}, {moment}"
                wrong.see(case, code_errors(codes, expected.codes, expected.margin, limit))
                if codes.any():
                    error.see(case, relative(values.abs().max(), expected.scale))
        with torch.no_grad():
            for latent in subject.latent_weights(part.model).values():
                latent[::2] *= 1.75
    return error, wrong


def _forward_excess(subject, part):
    """Worst module output error over its limit, in training and in evaluation mode."""
    excess = Worst()
    modules = {name: part.modules[name] for name in part.spec.quantized}
    norms = {name: part.modules[name] for name in part.spec.sub_norms if name in part.modules}
    for mode in (True, False):
        part.model.train(mode)
        with recording(modules | norms) as calls, torch.no_grad():
            subject.loss(part.model, part.batch)
        effective = subject.effective_weights(part.model)
        for name, module in modules.items():
            case = f"{name}, {'training' if mode else 'evaluation'}"
            if not calls[name]:
                excess.see(f"{case}: never called", float("inf"))
            for index, call in enumerate(calls[name]):
                inner = [n for n in norms if n.startswith(f"{name}.") and len(calls[n]) > index]
                x = calls[inner[-1]][index].output if inner else call.arguments[0]
                excess.see(case, _module_error(x, effective[name], module, call.output))
    part.model.train()
    return excess


def _module_error(x, weight, module, output):
    q, s, margin = oracles.int8_tokens(x)
    values = oracles.float64(weight)
    bias = getattr(module, "bias", None)
    offset = 0.0 if bias is None else oracles.float64(bias)
    tokens, magnitude = q * s, np.abs(values)
    expected = tokens @ values.T + offset
    doubtful = (margin <= oracles.INT8_MARGIN) * s
    limit = doubtful @ magnitude.T
    limit += 2 * oracles.LINEAR_RTOL_L1 * (np.abs(tokens) @ magnitude.T + np.abs(offset) + 1e-30)
    return float(np.max(np.abs(oracles.float64(output) - expected) / limit))


def _full_precision_response(subject, part, name):
    """Relative output change when the weight's magnitudes trade places within code cells.

    Codes and absolute mean stay, so a module that quantizes this weight does not notice.
    """
    module = part.modules[name]
    with recording({name: module}) as calls, torch.no_grad():
        subject.loss(part.model, part.batch)
        weights = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        kept = [p.clone() for p in weights]
        for p in weights:
            p.copy_(_shuffled_within_codes(p))
        call = calls[name][0]
        moved = module(*call.arguments, **call.keywords)
        for p, values in zip(weights, kept, strict=True):
            p.copy_(values)
    scale = float(call.output.abs().max())
    return float((moved - call.output).abs().max()) / max(scale, 1e-30)


def _shuffled_within_codes(weight):
    generator = torch.Generator().manual_seed(43)
    flat = weight.detach().flatten(1)
    codes = torch.from_numpy(oracles.ternary(flat).codes != 0)
    result = flat.clone()
    for kind in (True, False):
        rows, columns = torch.nonzero(codes == kind, as_tuple=True)
        order = torch.randperm(len(rows), generator=generator)
        magnitude = flat[rows, columns].abs()[order]
        result[rows, columns] = magnitude * flat[rows, columns].sign()
    return result.reshape(weight.shape)


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
            reason=spread.text("largest over smallest RMS of a token, less 1, at fresh gains"),
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
        rms = y.square().mean(dim=-1).sqrt()
        spread.see(name, float(rms.max() / rms.min()) - 1)
        handle = norm.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
        with torch.no_grad():
            silent.see(name, bool(torch.equal(subject.loss(part.model, part.batch), loss)))
        handle.remove()
    return changes, spread, silent


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
            limit=_RESPONSE,
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
