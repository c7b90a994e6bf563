"""Whether the tensors are those config.json describes, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from forge_harness.errors import CheckpointError, DamagedCheckpointError, several

from .architecture import HF_FAMILIES, PROJECTIONS, role_of
from .checkpoint import Anomaly, TensorInfo
from .hf_config import Quantization
from .hf_files import CONFIG
from .hf_found import SCALE, Found, damaged
from .native_common import check_tensors
from .weights import StoredWeight, fake_scale

_HEAD = "lm_head.weight"
_CLASSES = ("BitNetForCausalLM", "LlamaForCausalLM")
_HARMLESS = ("rotary_emb.inv_freq",)
"""Buffers old exporters wrote and every reader computes."""


def anomalies_of(
    found: Found, weights: Mapping[str, StoredWeight], factors: Mapping[str, float]
) -> list[Anomaly]:
    """Returns what is odd about the files and was read nevertheless."""
    odd = [
        Anomaly(f"file {name!r} is no part of the model and is not read")
        for name in found.files.unread
        if name.endswith(".safetensors")
    ]
    quantization = found.config.quantization if found.config else None
    if found.model.family in HF_FAMILIES and quantization is not None:
        odd += _odd_head(quantization, stored=_HEAD in weights)
    if quantization is not None and quantization.use_rms_norm:
        odd.append(Anomaly("use_rms_norm: every quantized layer normalises its input by itself"))
    if factors:
        odd.append(
            Anomaly(
                f"{several(len(factors), 'bias', 'biases')} of ternary layers read times "
                "weight_scale, by which AutoBitLinear multiplies them"
            )
        )
    if found.detection.format == "hf-online":
        odd += [
            Anomaly(
                "holds three values only: a master made from codes, or a dense product saved as a "
                "master, whose scale every forward shrinks by the share of codes that are not 0",
                name,
            )
            for name in weights
            if fake_scale(found.files, name) is not None
        ]
    return odd


def _odd_head(quantization: Quantization, *, stored: bool) -> list[Anomaly]:
    """What is odd where transformers and the files differ on whether the head is ternary."""
    if quantization.converts("lm_head", head=True) == stored:
        return []
    what = (
        "holds codes, and transformers spares lm_head unless modules_to_not_convert is a list "
        "without it, so transformers refuses the files"
        if stored
        else "modules_to_not_convert replaces transformers' own list and does not name lm_head, so "
        "transformers makes a BitLinear of it"
    )
    return [Anomaly(what, _HEAD)]


def unread_tensors(
    found: Found,
    weights: Mapping[str, StoredWeight],
    tied: Mapping[str, str],
    odd: list[Anomaly],
) -> set[str]:
    """Returns names that are stored and are no tensors of the model; why goes into `odd`.

    Raises:
        DamagedCheckpointError: A scale without its codes, or a tied copy with other values.
    """
    skipped = set()
    for name in found.files.tensors:
        if name.endswith(".weight" + SCALE):
            if name.removesuffix(SCALE) not in weights:
                raise damaged(found, name, "is the scale of a weight that is stored as no codes")
            skipped.add(name)
        elif name.endswith(_HARMLESS):
            skipped.add(name)
            odd.append(Anomaly("a buffer every reader computes; not read", name))
        elif name in tied and tied[name] in found.files.tensors:
            skipped.add(name)
            _check_copy(found, name, tied[name])
            odd.append(Anomaly(f"stored although it is tied to {tied[name]!r}", name))
    return skipped


def _check_copy(found: Found, alias: str, name: str) -> None:
    one, two = found.files.tensors[alias], found.files.tensors[name]
    if (one.dtype, one.shape) != (two.dtype, two.shape) or not torch.equal(
        found.files.read(alias), found.files.read(name)
    ):
        raise damaged(found, alias, f"is tied to {name!r} by config.json and holds other values")


def check_against_config(
    found: Found,
    infos: Mapping[str, TensorInfo],
    tied: Mapping[str, str],
    quantization: Quantization | None,
) -> None:
    """Checks names, shapes and kinds against what config.json describes.

    Raises:
        CheckpointError: It describes a class of model whose tensors are not known.
        DamagedCheckpointError: A tensor is missing, of another shape, or of another kind.
    """
    shapes = {name: info.shape for name, info in infos.items()}
    if quantization is not None and quantization.use_rms_norm:
        for name in _check_norms(found, infos):
            del shapes[name]
    if problem := check_tensors(found.model, shapes, tied):
        name, what = problem
        _refuse_other_class(found)
        file = found.files.file_of(name) if name in found.files.tensors else found.files.paths[0]
        raise DamagedCheckpointError(
            f"{file}: {what}. Get the files again.", path=str(file), tensor=name
        )
    if found.selection is None and quantization is not None and found.model.family in HF_FAMILIES:
        for info in infos.values():
            _check_kind(found, info, quantization)


def _refuse_other_class(found: Found) -> None:
    """Other classes have other tensors: classifiers, models without a head, code beside the files.

    `BitnetForCausalLM`, the first published models, has the model type "llama" and further norms.
    """
    classes = found.model.config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    if isinstance(named, str) and named not in _CLASSES:
        raise CheckpointError(
            f"{found.config.path if found.config else CONFIG} names the class {named!r}; expected "
            f"{' or '.join(_CLASSES)}, the ones whose tensors are known: save the whole language "
            "model as one of them."
        )


def _check_norms(found: Found, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the norms that `use_rms_norm` puts into ternary layers, which must be there."""
    names = []
    for info in infos.values():
        if info.kind == "plain":
            continue
        name = info.name.removesuffix("weight") + "rms_norm.weight"
        if name not in infos:
            raise damaged(found, name, "is missing, and use_rms_norm in config.json calls for it")
        if infos[name].shape != info.shape[1:]:
            raise damaged(
                found,
                name,
                f"has shape {list(infos[name].shape)}; expected {list(info.shape[1:])}",
            )
        names.append(name)
    return names


def _check_kind(found: Found, info: TensorInfo, quantization: Quantization) -> None:
    role = role_of(info.name, "hf")
    if role is None or role.kind not in PROJECTIONS or role.suffix != "weight":
        return
    converted = quantization.converts(info.name.removesuffix(".weight"))
    if converted != (info.kind == "ternary"):
        raise damaged(
            found,
            info.name,
            "holds no codes, and config.json does not exclude it"
            if converted
            else "holds codes, and modules_to_not_convert excludes it",
        )
