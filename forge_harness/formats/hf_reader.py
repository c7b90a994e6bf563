"""Hugging Face directories and safetensors files, by what the tensors are and config.json says.

Packed codes, float codes with a scale, dense products of both, master weights to be quantized at
every forward ("online"), and full precision that is quantized on import.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .checkpoint import Checkpoint, Detection, ReadOptions, TensorInfo
from .hf_checkpoint import FloatCheckpoint
from .hf_checks import anomalies_of, check_against_config, unread_tensors
from .hf_codes import coded, convention_of, factors_of
from .hf_files import holds_safetensors
from .hf_found import Found, damaged, look, tied_names
from .weights import StoredWeight


def recognise(path: Path) -> Detection | None:
    """Says what safetensors files are, or None when there are none.

    Raises:
        CheckpointError: Which files make up the model cannot be told.
        DamagedCheckpointError: Header, index or config.json is broken.
    """
    if (path / "forge.json").exists() or not holds_safetensors(path):
        return None
    found = look(path, ReadOptions())
    found.files.close()
    return found.detection


def open_hf(path: Path, options: ReadOptions) -> Checkpoint:
    """Opens a directory or file of safetensors.

    Raises:
        CheckpointError: Something must be told, or an option contradicts config.json.
        DamagedCheckpointError: It does not hold what it claims to hold.
    """
    found = look(path, options)
    try:
        return _opened(path, found, options)
    except BaseException:
        found.files.close()
        raise


def _opened(path: Path, found: Found, options: ReadOptions) -> Checkpoint:
    quantization = found.config.quantization if found.config else None
    facts: dict[str, object] = {}
    weights = dict(found.weights)
    factors: dict[str, float] = {}
    if found.selection is None:
        convention = convention_of(path, quantization, options)
        weights = coded(found, convention)
        factors = factors_of(found, weights, convention)
        facts = {"scale_convention": convention, "packing": _packing(found)}
    if quantization is not None:
        facts |= {
            "linear_class": quantization.linear_class,
            "quantization_mode": quantization.mode,
            "modules_to_not_convert": quantization.skipped and list(quantization.skipped),
            **quantization.own_norms,
        }
    tied = tied_names(found.config, found.model)
    anomalies = anomalies_of(found, weights, factors)
    infos = _infos(found, weights, unread_tensors(found, weights, tied, anomalies), factors)
    check_against_config(found, infos, tied, quantization)
    notes = found.config.notes if found.config else None
    return FloatCheckpoint(
        format=found.detection.format,
        path=path,
        model=found.model,
        infos=infos,
        tied=tied,
        quantization=facts,
        anomalies=anomalies,
        extras=notes.extras if notes else {},
        unread=found.files.unread,
        source=found.files,
        weights=weights,
        factors=factors,
    )


def _packing(found: Found) -> str:
    return "i2-rowblock" if found.detection.format == "hf-packed" else "none"


def _infos(
    found: Found,
    weights: Mapping[str, StoredWeight],
    unread: set[str],
    factors: Mapping[str, float],
) -> dict[str, TensorInfo]:
    infos = {}
    for name, stored in found.files.tensors.items():
        if name in unread:
            continue
        if name not in weights:
            if stored.dtype == "U8" and name.endswith(".weight"):
                raise damaged(found, name, "is packed and is not expected to be")
            # A product with an fp32 scale needs fp32, whatever the factor is stored in.
            dtype = "F32" if name in factors else stored.dtype
            infos[name] = TensorInfo(name, "plain", stored.shape, dtype, stored.nbytes)
            continue
        weight = weights[name]
        infos[name] = TensorInfo(
            name,
            "ternary",
            weight.shape,
            "i2-rowblock" if weight.storage == "packed" else stored.dtype,
            stored.nbytes + weight.scale_nbytes,
            weight.parts or weight.shape[:1],
            master=weight.storage == "master",
        )
    return infos
