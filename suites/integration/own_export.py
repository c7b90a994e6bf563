"""What an export holds, against the trained model it was made of."""

from __future__ import annotations

from typing import Any

import torch

from forge_harness.formats.detect import open_checkpoint

SCALE_ULP = 2.0**-23
"""Relative spacing of fp32: 1 / (1 / s) moves a scale by one at most."""


def compare_with_trained(evidence: Any, subject: Any, session: Any, path: Any) -> None:
    """Records that codes, scales and other tensors of an export are those of the trained model.

    Oracle: what the subject's own forward multiplies by, and the state dict of its model. Codes
    and plain tensors are exact (plain ones in the type they are stored in), scales to one ulp. A
    plain tensor under a name the model does not know is counted, not compared.
    """
    with open_checkpoint(path) as opened, torch.no_grad():
        effective = subject.effective_weights(session.model)
        stored = set(opened.ternary_names())
        wrong = [m for m in effective if f"{m}.weight" not in stored]
        for module, values in effective.items():
            if f"{module}.weight" in stored:
                wrong += [module] * (not _is_held(opened.ternary(f"{module}.weight"), values))
        state = session.model.state_dict()
        known = [name for name in opened.plain_names() if name in state]
        others = [name for name in known if not _same(opened.plain(name), state[name])]
        unknown = len(opened.plain_names()) - len(known)
    evidence.equal(
        "own_export_misread",
        len(wrong),
        expected=0,
        unit="modules",
        reason=f"of {len(effective)}: codes and scales of the export against the trained model's "
        f"forward; {'; '.join(wrong[:3]) or 'none'}",
    )
    evidence.equal(
        "own_plain_tensors_differ",
        len(others),
        expected=0,
        unit="tensors",
        reason=f"of {len(known)}, {unknown} more have names of their own; "
        f"{'; '.join(others[:3]) or 'none'}",
    )


def _is_held(found: Any, values: torch.Tensor) -> bool:
    values = values.detach().float().cpu()
    if not torch.equal(found.codes().sign(), values.sign().to(torch.int8)):
        return False
    # A row of zeros says nothing of its scale.
    largest = values.abs().amax(dim=1)
    rows = largest > 0
    scales = found.row_scales().reshape(-1).float()[rows]
    return torch.allclose(scales, largest[rows], rtol=SCALE_ULP, atol=0)


def _same(found: torch.Tensor, trained: torch.Tensor) -> bool:
    trained = trained.detach().cpu().to(found.dtype)
    return found.shape == trained.shape and torch.equal(found, trained)
