"""The models: what is quantized, and that the forward computes what the declaration says."""

import pytest
import torch

from forge_harness import oracles

from .angles import Angles
from .calls import first_tensor, observe, recording, seeded
from .forwards import effective_errors, forward_excess, without_product
from .support import RESPONSE, Count, Worst, built, expect_none, levels, scale_groups

ANGLE_RTOL = 2.0**-14
"""Of the largest angle. Between fp32 (2^-20 for sums of 128 terms) and half precision (2^-12)."""

PARAMETRIZED = ".parametrizations."
"""Between the name of a module and that of a weight that torch computes from others for it."""

WHOLE = "the model"
"""What a module without a name is called: the model, which may hold a matrix itself."""


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
    found = 0
    for task in subject.tasks():
        model = subject.build_model(task, seed=0)
        granularity = _granularity(subject, task)
        most, groups, lopsided = Worst(), Worst(), Count()
        for mode in (True, False):
            model.train(mode)
            for name, effective in subject.effective_weights(model).items():
                found += 1
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
        if granularity == "tensor" and groups.cases:
            evidence.equal(
                f"{task}.groups",
                int(groups.value),
                expected=1,
                unit="groups",
                reason=groups.text(
                    "one scale a weight: quantization_info declares no others, 'part' or 'row'"
                ),
            )
    _some_quantized(evidence, found, "weights")


def _some_quantized(evidence, count, unit):
    evidence.at_least(
        "quantized",
        count,
        limit=1,
        unit=unit,
        reason="over all tasks; otherwise nothing was tested",
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
    weight is the float64 quantization of its latent weight, also after training forwards between
    which the latent moved; and the module's own output, its input held fixed, is that of the
    integer formula in both modes, in training with gradients on and each time after a move.
    Modules declared full precision respond to changes no ternary weight would see. Nor are angles
    of positions rounded to few bits: float64 multiples of each frequency, to 2^-14 of the largest
    (fp32 by any way 2^-20, bf16 2^-9, which is a quarter of a radian at position 128).
    """
    quantized, unheld = 0, []
    for task in subject.tasks():
        angles = _angles(subject, task)
        part = built(subject, task)
        quantized += len(part.spec.quantized)
        undeclared = _undeclared(subject, part)
        evidence.equal(
            f"{task}.undeclared",
            ", ".join(sorted(name or WHOLE for name in undeclared)),
            expected="",
            unit="modules",
            reason="every module with a matrix is quantized or full precision, never both; "
            "the model's own name, where it holds one itself, is ''",
        )
        error, wrong = effective_errors(subject, part)
        expect_none(evidence, f"{task}.code_errors", wrong, "codes", "codes of the latent weight")
        evidence.at_most(
            f"{task}.effective_error",
            error.value,
            limit=2 * oracles.SCALE_RTOL,
            reason=error.text("scale of the effective weight against the latent's absolute mean"),
        )
        excess = forward_excess(subject, part)
        evidence.at_most(
            f"{task}.forward_error",
            excess.value,
            limit=1.0,
            reason=excess.text(
                "module output against the integer formula on its recorded input, over 16 u L1 "
                "plus one code step for inputs at a tie; norms inside a module must be declared: "
                "modules in ModelSpec.sub_norms, code in its forward by quantized_input"
            ),
        )
        for name in part.spec.full_precision:
            evidence.at_least(
                f"{task}.{name or WHOLE}.response",
                _full_precision_response(subject, part, name),
                limit=RESPONSE,
                reason="relative change of the output when magnitudes move within code cells",
            )
        if angles.cases:
            evidence.at_most(
                f"{task}.angle_error",
                angles.value,
                limit=ANGLE_RTOL,
                reason=angles.text("angles of positions over multiples of their frequency"),
            )
        unheld += [f"{task}.{name}" for name in without_product(subject, part)]
    _some_quantized(evidence, quantized, "modules")
    if unheld:
        pytest.skip(
            f"the outputs of {len(unheld)} modules whose weight is no matrix (N, K) have no oracle "
            f"here; their codes and scales were held: {', '.join(unheld[:3])}"
        )


def _angles(subject, task):
    """What the angles of positions are off by where the model is built and in its forward."""
    with Angles() as angles, torch.no_grad():
        model = subject.build_model(task, seed=0)
        subject.loss(model, subject.example_batch(task, batch_size=2, seed=1))
    return angles.error


def _undeclared(subject, part):
    """Names on which declaration, module tree, effective and latent weights disagree."""
    matrices = {
        name.partition(PARAMETRIZED)[0]
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


def _full_precision_response(subject, part, name):
    """Relative output change when the weight's magnitudes trade places within code cells.

    Codes and absolute mean stay, so a module that quantizes this weight does not notice. Where only
    the weight of a module is read, as that of a head that is tied, the model's output responds.
    Masks of dropout are the same ones in either case, and no response.
    """
    module = part.modules[name]
    with recording({name: module}) as calls:
        observe(subject, part.model, part.batch)
    with torch.no_grad():
        output = _answer(subject, part, module, calls[name][:1])
        weights = [
            p
            for owner in (module, *getattr(module, "parametrizations", {}).values())
            for p in owner.parameters(recurse=False)
            if p.dim() >= 2
        ]
        kept = [p.clone() for p in weights]
        for p in weights:
            p.copy_(_shuffled_within_codes(p))
        moved = _answer(subject, part, module, calls[name][:1])
        for p, values in zip(weights, kept, strict=True):
            p.copy_(values)
    scale = float(output.abs().max())
    return float((moved - output).abs().max()) / max(scale, 1e-30)


def _answer(subject, part, module, calls):
    """What a module answers to a call it had, or the model where it had none."""
    for call in calls:
        with seeded(0):
            return first_tensor(module(*call.arguments, **call.keywords))
    return observe(subject, part.model, part.batch)


def _shuffled_within_codes(weight):
    generator = torch.Generator().manual_seed(43)
    if weight.numel() == 1:
        return 1.25 * weight.detach()  # a scale of its own: it has no place to trade with another
    flat = weight.detach().flatten(1)
    codes = torch.from_numpy(oracles.ternary(flat).codes != 0)
    result = flat.clone()
    for kind in (True, False):
        rows, columns = torch.nonzero(codes == kind, as_tuple=True)
        order = torch.randperm(len(rows), generator=generator)
        magnitude = flat[rows, columns].abs()[order]
        result[rows, columns] = magnitude * flat[rows, columns].sign()
    return result.reshape(weight.shape)
