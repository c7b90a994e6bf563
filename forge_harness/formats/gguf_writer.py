"""GGUF files of TQ1_0 or TQ2_0: header by the `gguf` package, tensors streamed in runs of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, several

from . import tq
from .checkpoint import Checkpoint, TensorInfo, WriteOptions, refuse_layer_norms
from .gguf_arch import OWN, Architecture, choose, gguf_names, rotated_heads
from .gguf_config import keys_of
from .gguf_file import DEFAULT_ALIGNMENT, MAX_DIMENSIONS, MAX_NAME_BYTES
from .gguf_notes import COLUMNS, COMPUTE, EXTRAS, MODEL, SCALES, TENSORS, TIED
from .gguf_rope import interleaved, interleaving, obstacle, with_rows
from .gguf_types import OF_DTYPE, TQ1_0, TQ2_0
from .native_common import written_json
from .safetensors_file import DTYPES
from .tensors import TernaryTensor

Target = Literal["gguf-tq1_0", "gguf-tq2_0"]
_KINDS: dict[Target, tuple[int, int]] = {"gguf-tq1_0": (TQ1_0, 36), "gguf-tq2_0": (TQ2_0, 37)}
"""Format -> tensor type and `general.file_type`."""
_ONE = int(np.float16(1).view(np.uint16))
_SMALLEST = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor as it is written.

    Attributes:
        source: Name in the source.
        name: Name in the file.
        part: Which part of a fused source; None for all of it.
        shape: Of what is written, unpadded.
        heads: Heads over which its rows are reordered; 0 for none.
        scale: Exact scale of a ternary tensor; None for another.
        dtype: Of another tensor.
    """

    source: str
    name: str
    part: int | None
    shape: tuple[int, ...]
    heads: int
    scale: float | None = None
    dtype: str = "F32"


def write_gguf(source: Checkpoint, path: Path, to: Target, options: WriteOptions) -> list[str]:
    """Writes a GGUF file; the caller stages and renames it.

    Blocks are byte for byte those of ggml's own quantizer for codes * scale.

    Args:
        source: What to write; fused projections are split.
        path: New file.
        to: Which of the two types.
        options: `gguf_scale`.

    Returns:
        What the user should know, one sentence each.

    Raises:
        CheckpointError: The format cannot hold the source, or `gguf` is not installed.
        DamagedCheckpointError: The source does not hold what it claims to hold.
    """
    refuse_layer_norms(source, "a GGUF file")
    gguf = _library()
    kind, file_type = _KINDS[to]
    stored = choose(source.model, list(source.infos))
    pieces = [piece for info in source.infos.values() for piece in _pieces(source, stored, info)]
    _check(source, pieces, options)
    writer = gguf.GGUFWriter(path, stored.name)
    try:
        _add_keys(writer, source, stored, pieces, file_type)
        offsets = _add_infos(gguf, writer, pieces, kind, options)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.fout[0].flush()
        start = -(-writer.fout[0].tell() // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
        _write_data(source, writer.fout[0].fileno(), start, pieces, offsets, kind, options)
    finally:
        writer.close()
    return [*_notes(stored, pieces), *_scale_notes(pieces, options)]


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "Writing GGUF needs the gguf package; run pip install 'bitnet-forge-harness[hf]'."
        ) from error
    return gguf


def _pieces(source: Checkpoint, stored: Architecture, info: TensorInfo) -> Iterator[_Piece]:
    names = gguf_names(info.name, stored.style)
    if info.kind == "plain":
        heads = rotated_heads(stored.name, names[0], stored.model)
        dtype = _plain_type(info, stored)
        yield _Piece(info.name, names[0], None, info.shape, heads, dtype=dtype)
        return
    if len(info.parts) != len(names):
        raise CheckpointError(
            f"Tensor {info.name!r} has {len(info.parts)} scales, and a GGUF tensor has one; split "
            "it into its projections first."
        )
    scales = source.scales(info.name).tolist()
    for index, (name, rows, scale) in enumerate(zip(names, info.parts, scales, strict=True)):
        heads = rotated_heads(stored.name, name, stored.model)
        part = index if len(names) > 1 else None
        yield _Piece(info.name, name, part, (rows, info.shape[1]), heads, scale)


def _plain_type(info: TensorInfo, stored: Architecture) -> str:
    """Returns the type a plain tensor has in the file, which safetensors calls the same."""
    if info.layout in ("F32", "F16", "BF16"):
        return info.layout if len(info.shape) > 1 else "F32"
    # llama.cpp computes with no others.
    if DTYPES.get(info.layout) in OF_DTYPE and stored.name.startswith(OWN):
        return info.layout
    raise CheckpointError(
        f"Tensor {info.name!r} is {info.layout}, which a GGUF file of architecture {stored.name!r} "
        "cannot hold; expected F32, F16 or BF16: convert it in the source."
    )


def _check(source: Checkpoint, pieces: list[_Piece], options: WriteOptions) -> None:
    for piece in pieces:
        if len(piece.name.encode()) >= MAX_NAME_BYTES:
            raise CheckpointError(
                f"Tensor name {piece.name!r} is {len(piece.name.encode())} bytes long; ggml allows "
                "63."
            )
        if piece.heads and (problem := obstacle(piece.shape[0], piece.heads)):
            raise CheckpointError(
                f"Tensor {piece.name!r} cannot be put into llama.cpp's row order: {problem}."
            )
        if 0 in piece.shape or not 1 <= len(piece.shape) <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"Tensor {piece.name!r} has shape {piece.shape}, which a GGUF file cannot hold."
            )
        if piece.scale is None or options.gguf_scale != "block" or _fits_half(piece.scale):
            continue
        ternary = _ternary(source, piece)
        if any(bool(ternary.codes(*rows).any()) for rows in ternary.chunks()):
            raise CheckpointError(
                f"Tensor {piece.name!r} has scale {piece.scale:.6g}, which fp16 does not hold; "
                "write exact scales with --gguf-scale tensor."
            )


def _fits_half(scale: float) -> bool:
    """Whether fp16 holds a scale to its precision; one that multiplies only zeros need not."""
    return scale < 65520 and bool(float(np.float16(scale)) >= _SMALLEST)


def _add_keys(
    writer: Any,  # noqa: ANN401 - a GGUFWriter
    source: Checkpoint,
    stored: Architecture,
    pieces: list[_Piece],
    file_type: int,
) -> None:
    writer.add_uint32("general.file_type", file_type)
    if stored.model is not None:
        for key, value in keys_of(stored.model).items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{stored.name}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "none")
    model = {"family": source.model.family, "config": dict(source.model.config)}
    writer.add_string(MODEL, written_json(model, "a GGUF file").decode())
    writer.add_string(TIED, written_json(dict(source.tied), "a GGUF file").decode())
    if source.extras:
        writer.add_string(EXTRAS, written_json(dict(source.extras), "a GGUF file").decode())
    if compute := source.quantization.get("compute"):
        writer.add_string(COMPUTE, compute)
    ternary = [piece for piece in pieces if piece.scale is not None]
    if ternary:
        writer.add_array(TENSORS, [piece.name for piece in ternary])
        writer.add_array(SCALES, [float(p.scale or 0) for p in ternary])
        if any(piece.shape[1] % tq.BLOCK for piece in ternary):
            writer.add_array(COLUMNS, [piece.shape[1] for piece in ternary])


def _add_infos(
    gguf: Any,  # noqa: ANN401 - the module
    writer: Any,  # noqa: ANN401 - a GGUFWriter
    pieces: list[_Piece],
    kind: int,
    options: WriteOptions,
) -> dict[str, int]:
    """Announces every tensor; returns where each starts behind the header."""
    offsets: dict[str, int] = {}
    position = 0

    def announce(name: str, shape: tuple[int, ...], dtype: Any, nbytes: int, raw: Any) -> None:  # noqa: ANN401
        nonlocal position
        writer.add_tensor_info(name, shape, dtype, nbytes, raw)
        offsets[name] = position
        position += -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT

    types = gguf.GGMLQuantizationType
    for piece in pieces:
        if piece.scale is None:
            size = DTYPES[piece.dtype].itemsize
            shape = (*piece.shape[:-1], size * piece.shape[-1])
            nbytes = int(np.prod(shape))
            announce(piece.name, shape, np.dtype(np.uint8), nbytes, types[piece.dtype])
            continue
        width = tq.row_bytes(kind, piece.shape[1])
        blocks = (piece.shape[0], width)
        announce(piece.name, blocks, np.dtype(np.uint8), blocks[0] * width, types(kind))
        if options.gguf_scale == "tensor":
            announce(_scale_name(piece), (1,), np.dtype(np.float32), 4, types.F32)
    return offsets


def _scale_name(piece: _Piece) -> str:
    return piece.name.removesuffix(".weight") + ".scale"


def _write_data(
    source: Checkpoint,
    file: int,
    start: int,
    pieces: list[_Piece],
    offsets: dict[str, int],
    kind: int,
    options: WriteOptions,
) -> None:
    end = start
    for piece in pieces:
        at = start + offsets[piece.name]
        if piece.scale is None:
            end = _put(file, _plain(source, piece), at)
            continue
        apart = options.gguf_scale == "tensor"
        # Where no half has the scale all codes are 0, and so is the d of their blocks.
        plain = apart or not _fits_half(piece.scale)
        d = _ONE if plain else int(np.float16(piece.scale).view(np.uint16))
        width = tq.row_bytes(kind, piece.shape[1])
        for first, blocks in tq.encode(kind, _ternary(source, piece), d):
            end = max(end, _put(file, np.ascontiguousarray(blocks), at + first * width))
        if apart:
            end = _put(
                file, np.array([piece.scale], np.float32), start + offsets[_scale_name(piece)]
            )
    # The last tensor is padded like every other.
    os.ftruncate(file, -(-end // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT)


def _put(file: int, array: Any, at: int) -> int:  # noqa: ANN401 - an array of any dtype
    view = memoryview(array).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], at + done)
    return at + done


def _plain(source: Checkpoint, piece: _Piece) -> Any:  # noqa: ANN401 - an array
    tensor = source.plain(piece.source)
    if piece.heads:
        tensor = interleaved(tensor, piece.heads)
    converted: Tensor = tensor.to(DTYPES[piece.dtype])
    if not torch.equal(converted.to(tensor.dtype), tensor):
        raise CheckpointError(
            f"Tensor {piece.source!r} of {tensor.dtype} does not survive {piece.dtype}, which GGUF "
            "readers expect; convert it in the source."
        )
    return converted.contiguous().flatten().view(torch.uint8).numpy()


def _ternary(source: Checkpoint, piece: _Piece) -> TernaryTensor:
    ternary = source.ternary(piece.source)
    if piece.part is not None:
        ternary = ternary.split()[piece.part]
    if piece.heads:
        ternary = with_rows(ternary, interleaving(ternary.rows, piece.heads))
    return ternary


def _notes(stored: Architecture, pieces: list[_Piece]) -> list[str]:
    found = [
        f"llama.cpp refuses the file (architecture {stored.name!r}) instead of computing something "
        f"else: {why}."
        for why in stored.why_own[:1]
    ]
    padded = [p for p in pieces if p.scale is not None and p.shape[1] % tq.BLOCK]
    if padded:
        found.append(
            f"Rows of {several(len(padded), 'tensor')} are padded to a multiple of 256 "
            f"({padded[0].name}: {padded[0].shape[1]}); gguf and this package read them, "
            "llama.cpp does not."
        )
    if stored.name == "bitnet-b1.58":
        found.append(
            "Architecture 'bitnet-b1.58' (squared ReLU) runs in Microsoft's fork of llama.cpp only."
        )
    return found


def _scale_notes(pieces: list[_Piece], options: WriteOptions) -> list[str]:
    """What our comparison cannot show, since this package reads both kinds of scales."""
    scales = [piece.scale for piece in pieces if piece.scale is not None]
    if options.gguf_scale == "tensor" and scales:
        return [
            "Blocks hold codes alone (d = 1), and tensors <name>.scale what multiplies them; this "
            "package and llama.cpp's bitnet graphs do, other readers take the weights for -1, 0, 1."
        ]
    halved = ((float(np.float16(scale)), scale) for scale in scales if _fits_half(scale))
    moved = max((abs(half / scale - 1) for half, scale in halved), default=0.0)
    if not moved:
        return []
    return [
        f"Blocks hold scales in fp16, which moves them by up to {moved:.2g}; the exact ones are "
        "recorded as forge.scales, which other readers do not use."
    ]
