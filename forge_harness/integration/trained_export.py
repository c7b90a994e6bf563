"""What an export holds, against the trained model it was made of; what the suites share of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from forge_harness.errors import CheckpointError
from forge_harness.evidence import Recorder
from forge_harness.formats.checkpoint import Checkpoint, biases_of
from forge_harness.formats.detect import open_checkpoint
from forge_harness.integration import phase6_preparer
from forge_harness.integration.left_out import left_out
from forge_harness.integration.phase6_preparer import NotReadyError
from forge_harness.policy import Policy
from forge_harness.protocols import BuildsModel, ExportsWeights, LoadsData, TrainingSession
from forge_harness.quant import dequantize
from forge_harness.quant.bounds import WEIGHT_SCALE_RTOL

SCALE_ULP = 2.0**-23
"""Relative spacing of fp32: 1 / (1 / s) moves a scale by one at most."""


def preparer(
    subject: ExportsWeights, policy: Policy | None = None
) -> phase6_preparer.Phase6Preparer:
    """Returns the component over the subject's own evaluation, and its data if it has any."""
    evaluate = partial(_evaluated, subject)
    if not isinstance(subject, LoadsData):
        return phase6_preparer.Phase6Preparer(evaluate=evaluate, policy=policy)
    info = subject.data_info
    return phase6_preparer.Phase6Preparer(
        evaluate=evaluate,
        data=subject.data_digest,
        classes=lambda task: info(task).kind == "classes",
        policy=policy,
    )


def _evaluated(subject: ExportsWeights, task: str, package: Path) -> Mapping[str, float]:
    try:
        return subject.evaluate_package(task, package)
    except Exception as error:
        # What a subject raises over a format it does not know is its own affair. Where the package
        # lies now is no part of what is said: it goes into the package.
        said = str(error).replace(str(package), "PACKAGE")
        raise CheckpointError(
            f"the subject's evaluate_package does not evaluate the native package that phase 6 "
            f"gets ({type(error).__name__}: {said}); read it by forge_harness.formats.detect."
            "open_checkpoint, or export native packages"
        ) from error


def unlearned(refused: NotReadyError, task: str, session: TrainingSession) -> str:
    """Returns why a package is refused, where its task takes more steps than it was given.

    Empty where anything else is not met, or the live model is better than its package.

    Args:
        refused: Of the package.
        task: Of the package.
        session: Whose model was exported.
    """
    blocking = refused.readiness.blocking
    if [criterion.name for criterion in blocking] != ["accuracy"] or blocking[0].value is None:
        return ""
    live, limit = float(session.evaluate()["accuracy"]), blocking[0].limit
    if not live < limit:
        return ""
    return (
        f"{task} has an accuracy of {live:.3g} after {session.step_index} steps, and phase 6 takes "
        f"nothing below {limit:g}: name a task first that is learned in as many"
    )


def compare_with_trained(
    evidence: Recorder,
    subject: BuildsModel,
    session: TrainingSession,
    path: Path,
    *,
    prefix: str = "",
) -> None:
    """Records that codes, scales and other tensors of an export are those of the trained model.

    Oracle: what the subject's own forward multiplies by, and the state dict of its model. Codes
    and plain tensors are exact (plain ones in the type they are stored in), scales to the rounding
    of fp32 and of the type the model multiplies in, value by value, and biases of quantized modules
    to one ulp: some formats store them over the scale.
    A model without a module to compare is no sound one. A plain tensor under a name the model does
    not know is counted, not compared. What is nowhere in the export, though the loss needs it and
    nothing stored gives it, is named: see `left_out`.

    Args:
        evidence: Of the check.
        subject: Offers `BuildsModel`.
        session: Whose model was exported.
        path: The export.
        prefix: In front of the names of the evidence.
    """
    with open_checkpoint(path) as opened, torch.no_grad():
        effective = subject.effective_weights(session.model)
        wrong = _misread(opened, effective) if effective else ["the subject names no module"]
        state = session.model.state_dict()
        known = [name for name in opened.plain_names() if name in state]
        biases = set(biases_of(state, set(opened.ternary_names())).values())
        others = [
            name
            for name in known
            if not _same(opened.plain(name), state[name], rounded=name in biases)
        ]
        unknown = len(opened.plain_names()) - len(known)
        missing = left_out(subject, session.model, opened, effective)
    evidence.equal(
        f"{prefix}own_export_misread",
        len(wrong),
        expected=0,
        unit="modules",
        reason=f"of {len(effective)}: codes and scales of the export against the trained model's "
        f"forward; {'; '.join(wrong[:3]) or 'none'}",
    )
    evidence.equal(
        f"{prefix}own_plain_tensors_differ",
        len(others),
        expected=0,
        unit="tensors",
        reason=f"of {len(known)}, {unknown} more have names of their own; "
        f"{'; '.join(others[:3]) or 'none'}",
    )
    evidence.equal(
        f"{prefix}own_plain_tensors_left_out",
        len(missing),
        expected=0,
        unit="tensors",
        reason="parameters that the trained model's loss needs and the export holds nowhere; "
        f"{'; '.join(missing[:3]) or 'none'}",
    )


def _misread(opened: Checkpoint, effective: Mapping[str, torch.Tensor]) -> list[str]:
    stored = set(opened.ternary_names())
    wrong = [module for module in effective if f"{module}.weight" not in stored]
    for module, values in effective.items():
        if f"{module}.weight" in stored:
            wrong += [module] * (not _is_held(opened, f"{module}.weight", values))
    return wrong


def _is_held(opened: Checkpoint, name: str, values: torch.Tensor) -> bool:
    """Whether a tensor has these codes and scales, up to what fp32 leaves open.

    The scale is a sum in any order, and the reciprocal of a reciprocal: Hugging Face's layers
    multiply by scales two ulps from those of the division (2.3e-7 seen). A weight in the middle
    between two codes, to that rounding, has either: where the export stores weights (hf-online),
    codes are made by the reader, with roundings of its own.
    """
    found, values = opened.ternary(name), values.detach().cpu()
    if values.shape != found.shape:
        return False
    tolerance = WEIGHT_SCALE_RTOL + torch.finfo(values.dtype).eps
    codes, scales = values.sign().to(torch.int8), found.row_scales()
    if (differ := found.codes() != codes).any():
        steps = opened.master(name).float() / scales
        is_middle = (steps.abs() - 0.5).abs() <= 0.5 * WEIGHT_SCALE_RTOL
        is_beside = (codes == 0) | (codes == steps.sign())
        if (differ & ~(is_middle & is_beside)).any():
            return False
    return torch.allclose(dequantize(codes, scales), values.float(), rtol=tolerance, atol=0)


def _same(found: torch.Tensor, trained: torch.Tensor, *, rounded: bool) -> bool:
    trained = trained.detach().cpu().to(found.dtype)
    if found.shape != trained.shape:
        return False
    # Over the scale and times it again: half an ulp each.
    return torch.equal(found, trained) or (
        rounded and torch.allclose(found, trained, rtol=SCALE_ULP, atol=0)
    )
