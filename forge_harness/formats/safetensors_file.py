"""Safetensors files, read strictly and tensor by tensor, written as a stream.

The `safetensors` library maps a whole file and reports what is wrong without saying where. Here a
tensor is read when it is asked for, memory holds one at a time, and every refusal names the key
or the byte at fault. Format: https://github.com/huggingface/safetensors (8 bytes little-endian
header length, JSON header, data without gaps).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .pointers import refuse_pointer

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit: a longer header is an attack on memory, not a model."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNREAD = re.compile(r"U16|U32|U64|C64|F(4|6|8)(_E[0-9]M[0-9])?(FNUZ)?")
"""Further dtypes of the format."""
_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_COUNT = 2**63 - 1
"""What torch, like the C API below it, holds a size in."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is in its file.

    Attributes:
        name: Key in the header.
        dtype: Safetensors name, for example "BF16".
        shape: Sizes.
        start: First byte in the file.
        nbytes: Size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file whose header was checked whole.

    Attributes:
        path: The file.
        tensors: Name -> where it is, in the order of the header.
        metadata: The header's `__metadata__`.

    Raises:
        CheckpointError: A tensor has a dtype that is not read, or the file was never fetched.
        DamagedCheckpointError: Header or size of the file is not as the format demands.
    """

    def __init__(self, path: Path) -> None:
        refuse_pointer(path)
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            header, data_start, size = self._header()
            self.metadata = self._metadata(header)
            self.tensors = self._checked(header, data_start, size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, name: str) -> Tensor:
        """Returns a tensor, read now.

        Raises:
            KeyError: There is none of that name.
            DamagedCheckpointError: The file ended before the tensor did.
        """
        stored = self.tensors[name]
        return self._read(stored, stored.start, stored.nbytes).reshape(stored.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows start..stop of a tensor with at least one dimension."""
        stored = self.tensors[name]
        row = stored.nbytes // max(1, stored.shape[0])
        part = self._read(stored, stored.start + start * row, (stop - start) * row)
        return part.reshape(stop - start, *stored.shape[1:])

    def _read(self, stored: StoredTensor, start: int, nbytes: int) -> Tensor:
        buffer = bytearray(nbytes)
        view, done = memoryview(buffer), 0
        while done < nbytes:
            count = os.preadv(self._file, [view[done:]], start + done)
            if count == 0:
                self._refuse(f"ends inside tensor {stored.name!r}", stored.name)
            done += count
        dtype = DTYPES[stored.dtype]
        return torch.frombuffer(buffer, dtype=dtype) if nbytes else torch.empty(0, dtype=dtype)

    def _refuse(self, what: str, tensor: str = "") -> NoReturn:
        raise DamagedCheckpointError(
            f"{self.path} is not a sound safetensors file: {what}. Get the file again.",
            path=str(self.path),
            tensor=tensor,
        )

    def _header(self) -> tuple[dict[str, Any], int, int]:
        size = os.fstat(self._file).st_size
        prefix = os.pread(self._file, 8, 0)
        if len(prefix) < 8:
            self._refuse(f"it has {size} bytes, fewer than the 8 of the header length")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            self._refuse(
                f"bytes 0 to 7 give a header of {length} bytes, over the {MAX_HEADER_BYTES} allowed"
            )
        if length > size - 8:
            self._refuse(
                f"bytes 0 to 7 give a header of {length} bytes, and only {size - 8} bytes follow"
            )
        raw = os.pread(self._file, length, 8)
        if raw[:1] != b"{":
            self._refuse(f"the header starts with {raw[:1]!r} at byte 8 instead of '{{'")
        return self._parsed(raw), 8 + length, size

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique)
        except UnicodeDecodeError as error:
            self._refuse(f"the header is not UTF-8 at byte {8 + error.start}")
        except json.JSONDecodeError as error:
            before = len(error.doc[: error.pos].encode())
            self._refuse(f"the header is not JSON at byte {8 + before}: {error.msg}")
        except RecursionError:
            self._refuse("the header nests deeper than any header does")
        except ValueError:  # Of json, for an integer of thousands of digits.
            self._refuse("the header holds a number of more digits than any size has")
        assert isinstance(header, dict)
        if not encodable(header):
            self._refuse("the header escapes half of a surrogate pair, which is no character")
        return header

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                self._refuse(f"key {key!r} is twice in the header", key)
            seen[key] = value
        return seen

    def _metadata(self, header: dict[str, Any]) -> dict[str, str]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._refuse("'__metadata__' is not a map of strings")
        return dict(metadata)

    def _checked(
        self, header: dict[str, Any], data_start: int, size: int
    ) -> dict[str, StoredTensor]:
        tensors = {name: self._entry(name, entry) for name, entry in header.items()}
        position = 0
        for stored in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
            if stored.start != position:
                word = "overlaps the one before it" if stored.start < position else "leaves a gap"
                self._refuse(
                    f"tensor {stored.name!r} starts at data byte {stored.start}, expected "
                    f"{position}: it {word}",
                    stored.name,
                )
            position += stored.nbytes
            if data_start + position > size:
                self._refuse(
                    f"tensor {stored.name!r} ends at byte {data_start + position}, and the file "
                    f"has {size}: it is truncated",
                    stored.name,
                )
        if data_start + position != size:
            self._refuse(
                f"{size - data_start - position} bytes follow the last tensor at byte "
                f"{data_start + position}"
            )
        return {
            name: StoredTensor(name, t.dtype, t.shape, data_start + t.start, t.nbytes)
            for name, t in tensors.items()
        }

    def _entry(self, name: str, entry: object) -> StoredTensor:
        if not isinstance(entry, dict) or set(entry) != _KEYS:
            self._refuse(f"tensor {name!r} must have exactly dtype, shape and data_offsets", name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(dtype, str) and _UNREAD.fullmatch(dtype):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {dtype}, which is not read; expected "
                f"one of {', '.join(DTYPES)}: convert it to one of them first."
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._refuse(
                f"tensor {name!r} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}", name
            )
        if not _counts(shape) or prod(max(side, 1) for side in shape) > _MAX_COUNT:
            self._refuse(f"tensor {name!r} has shape {shape!r}; expected counts", name)
        if is_empty_matrix(name, shape):
            self._refuse(f"tensor {name!r} has shape {shape!r}; expected values", name)
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(f"tensor {name!r} has data_offsets {offsets!r}; expected [from, to]", name)
        nbytes = offsets[1] - offsets[0]
        expected = prod(shape) * DTYPES[dtype].itemsize
        if nbytes != expected:
            self._refuse(
                f"tensor {name!r} of {dtype} {shape} takes {expected} bytes, its data_offsets "
                f"{offsets} span {nbytes}",
                name,
            )
        return StoredTensor(name, dtype, tuple(shape), offsets[0], nbytes)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= _MAX_COUNT for v in value)


def is_empty_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor claims to be a weight matrix and has no values, however many rows."""
    return name.endswith(".weight") and len(shape) == 2 and 0 in shape


def encodable(value: object) -> bool:
    """Whether all strings of a JSON value can be written: escapes may make half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor; its header is fixed before the first.

    Tensors lie in the library's order, widest dtype first and then by name, so that every one is
    aligned. `order` is the order in which `write` must be called.

    Args:
        path: New file.
        specs: Every tensor, in any order.
        metadata: The header's `__metadata__`; "format": "pt" is added, which transformers demands.
        digest: Whether `sha256` is wanted; it takes longer than writing.

    Attributes:
        order: Names in the order they must be written.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        *,
        digest: bool = False,
    ) -> None:
        self._specs = sorted(specs, key=lambda s: (-DTYPES[s.dtype].itemsize, s.name))
        self.path = path
        self.order: Sequence[str] = [spec.name for spec in self._specs]
        self._stream = path.open("wb")
        self._digest = hashlib.sha256() if digest else None
        self._hasher = ThreadPoolExecutor(1)
        self._hashed: Future[None] = Future()
        self._hashed.set_result(None)
        self._index = 0
        self._put(_header_bytes(self._specs, {"format": "pt", **(metadata or {})}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hasher.shutdown()
        self._stream.close()
        if kind is None and self._index != len(self._specs):
            raise ValueError(f"{self._index} of {len(self._specs)} tensors were written.")

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of what was written so far.

        Raises:
            ValueError: It was not asked for.
        """
        if self._digest is None:
            raise ValueError("no digest was asked for.")
        self._hashed.result()
        return self._digest.hexdigest()

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor whole.

        Raises:
            ValueError: It is not the next one, or not of the promised dtype and shape.
        """
        spec = self._specs[self._index] if self._index < len(self._specs) else None
        given = (name, NAMES.get(tensor.dtype), tuple(tensor.shape))
        if spec is None or given != (spec.name, spec.dtype, spec.shape):
            raise ValueError(f"tensor {given} was written where {spec} was promised.")
        self._index += 1
        if tensor.numel():
            self._put(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def _put(self, data: bytes | memoryview) -> None:
        if self._digest is None:
            self._stream.write(data)
            return
        # Hashing takes as long as reading and writing (128 MiB: 65 ms) and releases the
        # interpreter, so the next tensor is read meanwhile; one at most waits in memory.
        self._hashed.result()
        self._hashed = self._hasher.submit(self._digest.update, data)
        self._stream.write(data)


def _header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    if len(header) != len(specs) + 1:
        raise ValueError("two tensors have the same name.")
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
