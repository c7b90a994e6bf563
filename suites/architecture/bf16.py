"""Quantizers given bfloat16: the numbers are those of fp32, and so are the results.

Mixed precision hands a quantizer bf16. Computed in it, 12 % of the activation codes are off by one
and a scale by up to 2^-8, beside the integer path that computes in fp32. Real quantizers that do so
(packed layers of transformers, onebitllms, torchao) return a scale in bf16, which says it; they are
not held to fp32. One that returns fp32, as `Quantizes` has it, is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge_harness import oracles

from .support import Count, Worst, code_errors, expect_none, relative, tensor


@dataclass(slots=True)
class Results:
    """Codes and scales of bf16 input against float64, of the inputs that were taken."""

    scale: Worst = field(default_factory=Worst)
    codes: Count = field(default_factory=Count)
    refused: int = 0
    in_its_own: int = 0
    """Inputs whose scale came back in half precision."""


def bf16_results(
    quantize: Callable[[Tensor], tuple[Tensor, Any]],
    cases: Iterable[tuple[str, np.ndarray]],
    oracle: Callable[[Any], Any],
    margin: float,
) -> Results:
    """Quantizes the cases rounded to bf16, and compares with float64 of the same numbers."""
    found = Results()
    for name, array in cases:
        values = tensor(array).bfloat16()
        try:
            codes, scale = quantize(values)
        except Exception:  # a subject refuses what it does not take by whatever it raises
            found.refused += 1
            continue
        if torch.as_tensor(scale).dtype in (torch.bfloat16, torch.float16):
            found.in_its_own += 1
            continue
        expected = oracle(values)
        found.scale.see(name, relative(scale, expected.scale))
        wrong = code_errors(codes, expected.codes, expected.margin, margin)
        found.codes.see(name, wrong)
    return found


def record_bf16(evidence: Any, found: Results, what: str) -> None:
    """Records how many inputs were compared, and `what` of them: "scale" or "codes"."""
    evidence.record(
        "bf16_inputs",
        found.codes.cases,
        unit="inputs",
        reason=f"compared in fp32; {found.refused} refused, {found.in_its_own} quantized in half "
        "precision as the dtype of their scale says",
    )
    if not found.codes.cases:
        return
    if what == "codes":
        expect_none(evidence, "bf16_code_errors", found.codes, "codes", "float64 of bf16 numbers")
        return
    evidence.at_most(
        "bf16_scale_error",
        found.scale.value,
        limit=oracles.SCALE_RTOL,
        reason=found.scale.text("an fp32 scale of bf16 numbers, relative to float64"),
    )
