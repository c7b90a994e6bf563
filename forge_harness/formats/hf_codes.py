"""Weights stored as codes with a scale each, and whether that scale multiplies or divides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .checkpoint import ReadOptions, ScaleConvention, biases_of
from .hf_config import Quantization
from .hf_found import QUESTION, SCALE, Found, damaged
from .legacy import FLOATS
from .weights import StoredWeight


def convention_of(
    path: Path, quantization: Quantization | None, options: ReadOptions
) -> ScaleConvention:
    """Returns whether a stored scale multiplies the codes or divides them.

    Raises:
        CheckpointError: Neither config.json nor the options say, or they contradict each other.
        DamagedCheckpointError: config.json says that no codes are stored.
    """
    told = options.scale_convention
    if quantization is None:
        if told is None:
            raise CheckpointError(f"{path}: {QUESTION}")
        return told
    if quantization.mode == "online":
        raise DamagedCheckpointError(
            f"{path}: config.json says quantization_mode 'online', and codes with a weight_scale "
            "are stored; expected master weights, or 'offline'.",
            path=str(path),
        )
    if told is not None and told != quantization.scale_convention:
        raise CheckpointError(
            f"{path}: --scale-convention {told} contradicts config.json, whose linear_class "
            f"{quantization.linear_class!r} means {quantization.scale_convention}; leave it out, "
            "or mend config.json."
        )
    return quantization.scale_convention


def coded(found: Found, convention: ScaleConvention) -> dict[str, StoredWeight]:
    """Returns the weights that are stored as codes, by name.

    Raises:
        DamagedCheckpointError: Shape, dtype or scale of one is none of codes.
    """
    storage = "packed" if found.detection.format == "hf-packed" else "unpacked"
    weights = {}
    for name, stored in found.files.tensors.items():
        packed = stored.dtype == "U8" and name.endswith(".weight")
        if not (packed if storage == "packed" else name + SCALE in found.files.tensors):
            continue
        if len(stored.shape) != 2 or (storage == "unpacked" and stored.dtype not in FLOATS):
            raise damaged(found, name, f"has {stored.dtype} {list(stored.shape)}; expected codes")
        rows, columns = stored.shape
        if storage == "packed":
            rows = _rows(found, name, rows)
        scale, nbytes = _scale(found, name, convention)
        weights[name] = StoredWeight(
            name, "packed" if storage == "packed" else "unpacked", (rows, columns), scale, nbytes
        )
    return weights


def _rows(found: Found, name: str, stored: int) -> int:
    noted = found.config.notes.rows.get(name) if found.config else None
    rows = 4 * stored if noted is None else noted
    if -(-rows // 4) != stored:
        raise damaged(
            found, name, f"has {stored} rows of bytes, and config.json says {rows} rows of codes"
        )
    return rows


def _scale(found: Found, name: str, convention: ScaleConvention) -> tuple[float, int]:
    key = name + SCALE
    stored = found.files.tensors.get(key)
    if stored is None:
        raise damaged(found, name, f"is packed and has no {key!r}, without which it has no values")
    if stored.dtype not in FLOATS or stored.shape != (1,):
        raise damaged(
            found,
            name,
            f"has a scale of {stored.dtype} {list(stored.shape)} in {key!r}; expected one floating "
            "value of shape [1]",
        )
    value = found.files.read(key).float()
    if not (value.isfinite() & (value > 0)).all():
        raise damaged(
            found, name, f"has scale {float(value)} in {key!r}; expected a positive finite number"
        )
    if convention == "divide":
        value = torch.reciprocal(value)
        if not value.isfinite().all():
            raise damaged(found, name, f"divides by the value in {key!r}, which gives infinity")
    return float(value), stored.nbytes


def factors_of(
    found: Found, weights: Mapping[str, StoredWeight], convention: ScaleConvention
) -> dict[str, float]:
    """Returns what multiplies the stored biases.

    AutoBitLinear computes (Wx + b) * weight_scale: the scale belongs to the bias as well.
    """
    if convention == "divide":
        return {}
    biases = biases_of(found.files.tensors, weights)
    return {bias: weights[name].scale or 1.0 for name, bias in biases.items()}
