"""Hugging Face directories that transformers loads: packed codes, or master weights ("online")."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, several
from forge_harness.quant import EPS

from .architecture import (
    FUSED,
    HF_FAMILIES,
    PROJECTIONS,
    renamed,
    role_of,
    style_of,
    transformers_model,
)
from .checkpoint import (
    Checkpoint,
    ModelDescription,
    ScaleConvention,
    TensorInfo,
    WriteOptions,
    biases_of,
    master_of,
)
from .hf_config import NOTES, OWN_NORMS, Notes
from .hf_files import CONFIG, SINGLE
from .safetensors_file import DTYPES, NAMES, SafetensorsWriter, TensorSpec
from .tensors import TernaryTensor

_SCALE = "_scale"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A ternary tensor as it is written: the whole of a source tensor, or one part of it."""

    source: str
    name: str
    part: int | None
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is written under which name.

    Attributes:
        model: Configuration of the files.
        pieces: Ternary tensors.
        plain: Written name -> source name of the others.
        tied: Alias -> name, in the written spelling.
    """

    model: ModelDescription
    pieces: tuple[_Piece, ...]
    plain: Mapping[str, str]
    tied: Mapping[str, str]

    @property
    def runs(self) -> bool:
        """Whether transformers has a class for the model."""
        return self.model.family in HF_FAMILIES


def write_hf_packed(source: Checkpoint, directory: Path, options: WriteOptions) -> list[str]:
    """Writes codes four a byte with one scale a tensor, and the configuration that says so.

    Args:
        source: What to write; fused projections are split, since a tensor has one scale here.
        directory: Existing and empty; the caller makes it durable.
        options: `scale_convention`.

    Returns:
        What the user should know, one sentence each.

    Raises:
        CheckpointError: The format cannot hold the source.
        DamagedCheckpointError: The source does not hold what it claims to hold.
    """
    plan = _plan(source)
    convention, chosen = _convention(source, options)
    divide = convention == "divide"
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if divide else "autobitlinear",
        "quantization_mode": "offline",
    }
    odd = {p.name: p.shape[0] for p in plan.pieces if p.shape[0] % 4}
    _write_config(source, plan, directory, quantization, odd)
    pieces = {piece.name: piece for piece in plan.pieces}
    specs = [TensorSpec(p.name + _SCALE, "F32", (1,)) for p in plan.pieces]
    specs += [TensorSpec(p.name, "U8", (-(-p.shape[0] // 4), p.shape[1])) for p in plan.pieces]

    def tensor(name: str) -> Tensor:
        if name in pieces:
            return _part(source, pieces[name]).packed
        piece = pieces[name.removesuffix(_SCALE)]
        scale = source.scales(piece.source)[piece.part or 0].reshape(1)
        return torch.reciprocal(scale) if divide else scale

    _write_tensors(source, plan, directory, specs, tensor)
    return [*_notes(plan), *_row_notes(odd), *chosen]


def write_hf_online(source: Checkpoint, directory: Path, options: WriteOptions) -> list[str]:
    """Writes master weights, which transformers quantizes at every forward.

    Stored masters are copied. Where the source holds codes, masters are made that quantize to them
    (`Checkpoint.master`).

    Args:
        source: What to write; fused projections are split.
        directory: Existing and empty; the caller makes it durable.
        options: `master_dtype`, of masters that are made.

    Returns:
        What the user should know, one sentence each.

    Raises:
        CheckpointError: The format cannot hold the source.
        DamagedCheckpointError: The source does not hold what it claims to hold.
    """
    plan = _plan(source)
    _check_scales(source, plan)
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    _write_config(source, plan, directory, quantization, {})
    pieces = {piece.name: piece for piece in plan.pieces}
    specs = [
        TensorSpec(p.name, _master_dtype(source, p, options.master_dtype), p.shape)
        for p in plan.pieces
    ]

    def tensor(name: str) -> Tensor:
        piece = pieces[name]
        master = _master(source, piece)
        return master.to(DTYPES[_master_dtype(source, piece, options.master_dtype)])

    _write_tensors(source, plan, directory, specs, tensor)
    made = sum(not source.infos[piece.source].master for piece in plan.pieces)
    note = (
        f"{made} master weights were made from codes and scales: they quantize to the same codes, "
        "and continue no training that kept masters elsewhere."
    )
    return [*_notes(plan), *([note] if made else [])]


def _check_scales(source: Checkpoint, plan: _Plan) -> None:
    """Refuses scales of codes that no master quantizes to: the quantizer's floor is above them."""
    for piece in plan.pieces:
        if source.infos[piece.source].master:
            continue
        scale = source.scales(piece.source)[piece.part or 0]
        if scale < EPS and _part(source, piece).codes().any():
            raise CheckpointError(
                f"Tensor {piece.source!r} has scale {float(scale):.6g}, and the online quantizer "
                f"of transformers makes none below {EPS:g}; convert to hf-packed, which stores "
                "scales."
            )


def _convention(source: Checkpoint, options: WriteOptions) -> tuple[ScaleConvention, list[str]]:
    """What weight_scale shall do, and the note that says why where nobody asked for it."""
    biases = biases_of(source.infos, source.ternary_names())
    if options.scale_convention == "divide" or not biases:
        return options.scale_convention or "multiply", []
    # AutoBitLinear computes (Wx + b) * weight_scale, BitLinear Wx / weight_scale + b.
    if options.scale_convention == "multiply":
        raise CheckpointError(
            f"Tensor {next(iter(biases.values()))!r} is the bias of a ternary layer, and "
            "autobitlinear multiplies it by weight_scale too; expected --hf-scale divide, which "
            "leaves it alone."
        )
    return "divide", [
        f"weight_scale divides (bitlinear), since autobitlinear would multiply "
        f"{several(len(biases), 'bias', 'biases')} by it too."
    ]


def _plan(source: Checkpoint) -> _Plan:
    style = style_of(source.model.family)
    model = source.model if style is None else transformers_model(source.model)
    pieces: list[_Piece] = []
    plain: dict[str, str] = {}
    for name, info in source.infos.items():
        if info.kind == "ternary":
            pieces += _pieces(info, style == "byte-lm")
        else:
            plain[_spelled(name, style == "byte-lm")] = name
    tied = {
        _spelled(alias, style == "byte-lm"): _spelled(name, style == "byte-lm")
        for alias, name in source.tied.items()
    }
    plan = _Plan(model, tuple(pieces), plain, tied)
    if plan.runs:
        _check_linears(plan)
    return plan


def _check_linears(plan: _Plan) -> None:
    for piece in plan.pieces:
        role = role_of(piece.name, "hf")
        if role is None or role.kind not in (*PROJECTIONS, "head"):
            raise CheckpointError(
                f"Tensor {piece.source!r} is ternary and is no linear layer of a "
                f"{plan.model.family} model, the only place where transformers has codes; leave it "
                "out with --exclude."
            )


def _pieces(info: TensorInfo, byte_lm: bool) -> Iterator[_Piece]:
    rows, columns = info.shape
    if len(info.parts) == 1:
        yield _Piece(info.name, _spelled(info.name, byte_lm), None, (rows, columns))
        return
    fused = FUSED.fullmatch(info.name)
    if not byte_lm or fused is None or len(info.parts) != 3:
        raise CheckpointError(
            f"Tensor {info.name!r} has {len(info.parts)} scales, and a Hugging Face weight has "
            "one; split it into its projections first."
        )
    for index, (letter, part) in enumerate(zip("qkv", info.parts, strict=True)):
        name = f"blocks.{fused.group(1)}.attention.{letter}.weight"
        yield _Piece(info.name, _spelled(name, byte_lm), index, (part, columns))


def _spelled(name: str, byte_lm: bool) -> str:
    if not byte_lm:
        return name
    found = renamed(name, "byte-lm", "hf")
    if found is None:
        raise CheckpointError(f"Tensor {name!r} has no counterpart in a transformers model.")
    return found


def _part(source: Checkpoint, piece: _Piece) -> TernaryTensor:
    ternary = source.ternary(piece.source)
    return ternary if piece.part is None else ternary.split()[piece.part]


def _master_dtype(source: Checkpoint, piece: _Piece, made: str) -> str:
    info = source.infos[piece.source]
    return info.layout if info.master else made


def _master(source: Checkpoint, piece: _Piece) -> Tensor:
    if source.infos[piece.source].master and piece.part is None:
        return source.master(piece.source)
    return master_of(_part(source, piece))


def _write_tensors(
    source: Checkpoint,
    plan: _Plan,
    directory: Path,
    specs: list[TensorSpec],
    tensor: Callable[[str], Tensor],
) -> None:
    for name, original in plan.plain.items():
        info = source.infos[original]
        dtype = info.layout if info.layout in DTYPES else NAMES[source.plain(original).dtype]
        specs.append(TensorSpec(name, dtype, info.shape))
    with SafetensorsWriter(directory / SINGLE, specs) as writer:
        for name in writer.order:
            if name in plan.plain:
                writer.write(name, source.plain(plan.plain[name]))
            else:
                writer.write(name, tensor(name))


def _write_config(
    source: Checkpoint,
    plan: _Plan,
    directory: Path,
    quantization: dict[str, Any],
    rows: Mapping[str, int],
) -> None:
    family = plan.model.family
    config = dict(plan.model.config)
    if not plan.runs:
        # A name of our own: transformers must not take the files for a model it knows.
        config["model_type"] = f"forge-{family}"
    else:
        config["model_type"] = family
    spared = _spared(plan)
    if spared is not None:
        quantization = {**quantization, "modules_to_not_convert": spared}
    kept = {key: source.quantization[key] for key in OWN_NORMS if key in source.quantization}
    notes = Notes(
        model=None if plan.runs else plan.model,
        rows=rows,
        tied=None if plan.runs else plan.tied,
        extras=source.extras,
    ).to_json()
    document = {
        **config,
        "quantization_config": quantization | kept,
        **({NOTES: notes} if notes else {}),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def _spared(plan: _Plan) -> list[str] | None:
    """Modules to list as not converted; None where transformers' own rule spares the same ones.

    A list replaces that rule, so it names lm_head too, unless that is ternary.
    """
    if not plan.runs:
        return None
    projections = [
        name.removesuffix(".weight")
        for name in plan.plain
        if (role := role_of(name, "hf")) and role.kind in PROJECTIONS and role.suffix == "weight"
    ]
    head = any(piece.name == "lm_head.weight" for piece in plan.pieces)
    if not projections and not head:
        return None
    return sorted(projections if head else {*projections, "lm_head"})


def _notes(plan: _Plan) -> list[str]:
    if plan.runs:
        return []
    return [
        f"transformers has no model for family {plan.model.family!r}; the files have its layout, "
        "and this package and plain safetensors readers read them."
    ]


def _row_notes(odd: Mapping[str, int]) -> list[str]:
    if not odd:
        return []
    name, rows = next(iter(odd.items()))
    return [
        f"transformers cannot load {several(len(odd), 'tensor')} whose rows are no multiple of 4 "
        f"({name}: {rows}); the count is recorded in {CONFIG}."
    ]
