"""Ternary weights as float and packed files store them, read a few rows at a time.

Four ways: *packed* codes with a scale, *unpacked* float codes with a scale, *fake* (the dense
product codes * scale), and *master* (the full-precision weight, quantized here with the absmean
quantizer of `forge_harness.quant`). All but the first have the shape of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forge_harness.errors import DamagedCheckpointError, NonTernaryCodeError
from forge_harness.quant.ternary import EPS, absmean_of_rows, row_magnitudes, ternary_codes

from . import tensors
from .hf_files import TensorSource
from .tensors import RowBlockPacker, TernaryTensor, check_packed_fields

Storage = Literal["packed", "unpacked", "fake", "master"]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Where the codes and scales of one ternary weight (N, K) come from.

    Attributes:
        name: Stored tensor.
        storage: How it holds them; see the module.
        shape: (N, K), unpacked.
        scale: What multiplies the codes; None for a master, whose scale is derived.
        scale_nbytes: Stored bytes of the scale.
        parts: Row counts of a master's scale groups; one group of N rows otherwise.
    """

    name: str
    storage: Storage
    shape: tuple[int, int]
    scale: float | None = None
    scale_nbytes: int = 0
    parts: tuple[int, ...] = ()


def absmean_scales(source: TensorSource, weight: StoredWeight) -> Tensor:
    """Returns the scales of a weight, fp32 (P,): stored ones, or those its master quantizes to.

    Raises:
        DamagedCheckpointError: A value is NaN or infinite, or too large for its mean.
    """
    if weight.storage != "master":
        return torch.tensor([weight.scale])
    scales, first = [], 0
    for part in weight.parts or weight.shape[:1]:
        scales.append(_absmean(source, weight.name, first, part))
        first += part
    return torch.stack(scales)


def read_weight(
    source: TensorSource, weight: StoredWeight, scales: Tensor | None = None
) -> TernaryTensor:
    """Reads codes and scales.

    Args:
        source: Where it is.
        weight: How it is stored.
        scales: What `absmean_scales` returned, when it is known.

    Raises:
        DamagedCheckpointError: A value is none that this way of storing has.
    """
    if weight.storage == "packed":
        return _packed(source, weight)
    if weight.storage == "master":
        known = absmean_scales(source, weight) if scales is None else scales
        return _quantized(source, weight.name, weight.parts or weight.shape[:1], known)
    packer = RowBlockPacker(*weight.shape)
    for start, stop in tensors.row_chunks(*weight.shape):
        chunk = source.read_rows(weight.name, start, stop)
        codes = _unpacked(source, weight, chunk, start) if weight.storage == "unpacked" else chunk
        packer.add(codes.sign().to(torch.int8).add(1).to(torch.uint8))
    return packer.finish(torch.tensor([weight.scale]))


def _quantized(
    source: TensorSource, name: str, parts: tuple[int, ...], scales: Tensor
) -> TernaryTensor:
    """Quantizes a full-precision weight as `absmean_ternary_parts` does, to the bit."""
    rows, columns = source.tensors[name].shape
    packer, first = RowBlockPacker(rows, columns), 0
    for part, scale in zip(parts, scales, strict=True):
        for start, stop in tensors.row_chunks(part, columns):
            codes = ternary_codes(source.read_rows(name, first + start, first + stop), scale)
            packer.add((codes + 1).to(torch.uint8))
        first += part
    return packer.finish(scales, parts)


def _absmean(source: TensorSource, name: str, first: int, rows: int) -> Tensor:
    columns = source.tensors[name].shape[1]
    sums = []
    for start, stop in _runs(rows, columns):
        chunk = source.read_rows(name, first + start, first + stop)
        require_finite(source, name, chunk, (first + start) * columns)
        sums.append(row_magnitudes(chunk))
    scale = absmean_of_rows(torch.cat(sums), columns)
    if not scale.isfinite():
        raise _damaged(source, name, "has a mean magnitude that fp32 does not hold")
    return scale


def read_finite(source: TensorSource, name: str) -> Tensor:
    """Returns a tensor, whose values must be finite when it is floating.

    Raises:
        DamagedCheckpointError: One is NaN or infinite.
    """
    tensor = source.read(name)
    if tensor.is_floating_point() and tensor.numel():
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), tensors.CHUNK_CODES):
            require_finite(source, name, flat[start : start + tensors.CHUNK_CODES], start)
    return tensor


def require_finite(source: TensorSource, name: str, chunk: Tensor, first: int) -> None:
    """Refuses NaN and infinity in values first.. of a tensor, in the order they are stored.

    Raises:
        DamagedCheckpointError: With index and value.
    """
    finite = chunk.isfinite()
    if not finite.all():
        at = int(finite.flatten().logical_not().int().argmax())
        raise _damaged(
            source, name, f"has {float(chunk.flatten()[at])} as value {first + at}; expected finite"
        )


def fake_scale(source: TensorSource, name: str) -> float | None:
    """Returns b when the values of a weight are exactly -b, 0 and b; None when they are not.

    A weight that is 0 everywhere gets the smallest scale the quantizer makes, as any fits. Reading
    ends at the first value that does not fit, so that an ordinary weight costs one chunk.
    """
    rows, columns = source.tensors[name].shape
    largest = 0.0
    for start, stop in tensors.row_chunks(rows, columns):
        magnitudes = source.read_rows(name, start, stop).abs()
        largest = largest or float(magnitudes.max()) if magnitudes.numel() else largest
        if not bool(((magnitudes == 0) | (magnitudes == largest)).all()) or largest == torch.inf:
            return None
    return largest or EPS


def _packed(source: TensorSource, weight: StoredWeight) -> TernaryTensor:
    packed = source.read(weight.name)
    try:
        check_packed_fields(packed)
    except NonTernaryCodeError as error:
        raise _damaged(source, weight.name, f"has {error}") from error
    return TernaryTensor(packed, weight.shape[0], torch.tensor([weight.scale]), weight.shape[:1])


def _unpacked(source: TensorSource, weight: StoredWeight, chunk: Tensor, start: int) -> Tensor:
    legal = (chunk == 0) | (chunk.abs() == 1)
    if not legal.all():
        row, column = divmod(int(legal.flatten().logical_not().int().argmax()), chunk.shape[1])
        raise _damaged(
            source,
            weight.name,
            f"has {float(chunk[row, column])} at row {start + row}, column {column}; expected the "
            "codes -1, 0, 1, as a weight_scale stands beside it",
        )
    return chunk


def _runs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of runs of rows, none of them a single one of several.

    See `row_magnitudes`: a single row would be summed in another order.
    """
    step = max(2, tensors.CHUNK_CODES // max(1, columns))
    for start in range(0, max(1, rows - 1), step):
        stop = start + step
        yield start, rows if stop >= rows - 1 else stop


def _damaged(source: TensorSource, name: str, what: str) -> DamagedCheckpointError:
    file = source.file_of(name)
    return DamagedCheckpointError(
        f"{file}: tensor {name!r} {what}. Get the file again.", path=str(file), tensor=name
    )
