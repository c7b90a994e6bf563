"""What an export holds, against the trained model it was made of; what the suites share of it."""

from __future__ import annotations

from pathlib import Path

import torch

from forge_harness.evidence import Recorder
from forge_harness.formats.detect import open_checkpoint
from forge_harness.formats.tensors import TernaryTensor
from forge_harness.integration import phase6_preparer
from forge_harness.protocols import BuildsModel, ExportsWeights, LoadsData, TrainingSession
from forge_harness.quant import dequantize

SCALE_ULP = 2.0**-23
"""Relative spacing of fp32: 1 / (1 / s) moves a scale by one at most."""


def preparer(subject: ExportsWeights) -> phase6_preparer.Phase6Preparer:
    """Returns the component over the subject's own evaluation, and its data if it has any."""
    if not isinstance(subject, LoadsData):
        return phase6_preparer.Phase6Preparer(evaluate=subject.evaluate_package)
    info = subject.data_info
    return phase6_preparer.Phase6Preparer(
        evaluate=subject.evaluate_package,
        data=subject.data_digest,
        classes=lambda task: info(task).kind == "classes",
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
    and plain tensors are exact (plain ones in the type they are stored in), scales to one ulp,
    value by value. A model without a module to compare is no sound one. A plain tensor under a
    name the model does not know is counted, not compared.

    Args:
        evidence: Of the check.
        subject: Offers `BuildsModel`.
        session: Whose model was exported.
        path: The export.
        prefix: In front of the names of the evidence.
    """
    with open_checkpoint(path) as opened, torch.no_grad():
        effective = subject.effective_weights(session.model)
        stored = set(opened.ternary_names())
        wrong = [m for m in effective if f"{m}.weight" not in stored]
        for module, values in effective.items():
            if f"{module}.weight" in stored:
                wrong += [module] * (not _is_held(opened.ternary(f"{module}.weight"), values))
        if not effective:
            wrong = ["the subject names no module"]
        state = session.model.state_dict()
        known = [name for name in opened.plain_names() if name in state]
        others = [name for name in known if not _same(opened.plain(name), state[name])]
        unknown = len(opened.plain_names()) - len(known)
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


def _is_held(found: TernaryTensor, values: torch.Tensor) -> bool:
    values = values.detach().float().cpu()
    codes = found.codes()
    if not torch.equal(codes, values.sign().to(torch.int8)):
        return False
    return torch.allclose(dequantize(codes, found.row_scales()), values, rtol=SCALE_ULP, atol=0)


def _same(found: torch.Tensor, trained: torch.Tensor) -> bool:
    trained = trained.detach().cpu().to(found.dtype)
    return found.shape == trained.shape and torch.equal(found, trained)
