"""GGUF containers, read strictly: every count is checked before memory is asked for.

The `gguf` package maps the file and trusts its counts; here each refusal names the key or the byte
at fault, and a tensor is read when it is asked for. Format: ggml's `docs/gguf.md`, version 3,
little-endian; the stricter rules are those of llama.cpp's loader (`ggml/src/gguf.cpp`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .gguf_types import TL1, TL2, TYPES, TensorType
from .pointers import refuse_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000
"""The largest vocabularies take a tenth; a longer header is an attack on memory, not a model."""
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 64
MAX_KEY_BYTES = 65535
MAX_ARRAY = 1 << 24
DEFAULT_ALIGNMENT = 32

Value: TypeAlias = "int | float | bool | str | list[str] | NDArray[np.generic]"
"""Of a key: a number, text, or an array of either. Arrays of numbers are numpy's."""

_WINDOW = 1 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_SMALLEST_PAIR = 8 + 1 + 4 + 1
_SMALLEST_INFO = 8 + 1 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is in its file.

    Attributes:
        name: Name in the file.
        type: How it is stored.
        shape: Sizes, slowest first, as torch has them; the file stores them the other way round.
        start: First byte in the file.
        nbytes: Size in bytes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFile:
    """An open GGUF file whose header was checked whole.

    Attributes:
        path: The file.
        version: Version of the container.
        metadata: Key -> value, in the order of the file.
        tensors: Name -> where it is, in the order of the file.

    Raises:
        CheckpointError: A version, byte order or tensor type that is not read, or the file was
            never fetched.
        DamagedCheckpointError: Header or size of the file is not as the format demands.
    """

    def __init__(self, path: Path) -> None:
        refuse_pointer(path)
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._size = os.fstat(self._file).st_size
            header = _Header(path, self._file, self._size)
            self.version, counts = header.opening()
            self.metadata: Mapping[str, Value] = header.pairs(counts[1])
            self.tensors: Mapping[str, GgufTensor] = header.tensors(counts[0], self.metadata)
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

    def read(self, tensor: GgufTensor, start: int = 0, nbytes: int | None = None) -> bytearray:
        """Returns bytes of a tensor, read now; all of them unless a part is named.

        Raises:
            DamagedCheckpointError: The file ended before the tensor did.
        """
        buffer = bytearray(tensor.nbytes - start if nbytes is None else nbytes)
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            count = os.preadv(self._file, [view[done:]], tensor.start + start + done)
            if count == 0:
                raise damaged(self.path, f"ends inside tensor {tensor.name!r}", tensor.name)
            done += count
        return buffer


def damaged(path: Path, what: str, tensor: str = "") -> DamagedCheckpointError:
    """Returns the error for a file that breaks the format."""
    return DamagedCheckpointError(
        f"{path} is not a sound GGUF file: {what}. Get the file again.",
        path=str(path),
        tensor=tensor,
    )


class _Header:
    """Reads a header front to back through a window, never beyond what the file has."""

    def __init__(self, path: Path, file: int, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._limit = min(size, MAX_HEADER_BYTES)
        self._window, self._window_start = b"", 0
        self.position = 0

    def opening(self) -> tuple[int, tuple[int, int]]:
        """Returns the version and the counts of tensors and keys."""
        if self._take(4, "the magic") != MAGIC:
            self._refuse(f"bytes 0 to 3 are not {MAGIC!r}")
        version = self._unsigned(4, "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is big-endian" if swapped else f"has version {version} (bytes 4 to 7)"
            raise CheckpointError(
                f"{self._path} {what}; expected a little-endian GGUF file of version 2 or 3: "
                "convert it with llama.cpp's tools first."
            )
        tensors = self._count(8, _SMALLEST_INFO, "tensors")
        return version, (tensors, self._count(16, _SMALLEST_PAIR, "keys"))

    def pairs(self, count: int) -> dict[str, Value]:
        """Returns keys and values."""
        found: dict[str, Value] = {}
        for index in range(count):
            start = self.position
            key = self._string(MAX_KEY_BYTES, f"key {index}")
            if key in found:
                self._refuse(f"key {key!r} is twice in the header, again at byte {start}")
            found[key] = self._value(key)
        return found

    def tensors(self, count: int, metadata: Mapping[str, Value]) -> dict[str, GgufTensor]:
        """Returns the tensors with their places in the file, every byte accounted for."""
        alignment = self._alignment(metadata)
        bitnet = str(metadata.get("general.architecture", "")).startswith("bitnet")
        found: dict[str, GgufTensor] = {}
        for index in range(count):
            start = self.position
            tensor = self._info(index, bitnet)
            if tensor.name in found:
                self._refuse(
                    f"tensor {tensor.name!r} is twice in the header, again at byte {start}",
                    tensor.name,
                )
            found[tensor.name] = tensor
        data = -(-self.position // alignment) * alignment
        self._check_places(list(found.values()), data, alignment)
        return {
            name: GgufTensor(name, t.type, t.shape, data + t.start, t.nbytes)
            for name, t in found.items()
        }

    def _check_places(self, tensors: list[GgufTensor], data: int, alignment: int) -> None:
        expected = 0
        for t in sorted(tensors, key=lambda t: t.start):
            if t.start != expected:
                word = "overlaps the one before it" if t.start < expected else "leaves a gap"
                self._refuse(
                    f"tensor {t.name!r} starts at data byte {t.start}, expected {expected} with "
                    f"alignment {alignment}: it {word} or is not aligned",
                    t.name,
                )
            if data + t.start + t.nbytes > self._size:
                self._refuse(
                    f"tensor {t.name!r} ends at byte {data + t.start + t.nbytes}, and the file has "
                    f"{self._size}: it is truncated",
                    t.name,
                )
            expected = -(-(t.start + t.nbytes) // alignment) * alignment
        if self._size > data + expected:
            self._refuse(
                f"{self._size - data - expected} bytes follow the last tensor at byte "
                f"{data + expected}"
            )

    def _info(self, index: int, bitnet: bool) -> GgufTensor:
        name = self._string(MAX_NAME_BYTES, f"the name of tensor {index}")
        what = f"tensor {name!r}"
        at = self.position
        dimensions = self._unsigned(4, f"the dimensions of {what}")
        if dimensions > MAX_DIMENSIONS:
            self._refuse(f"{what} has {dimensions} dimensions at byte {at}; at most 4", name)
        sizes = [self._unsigned(8, f"the shape of {what}") for _ in range(dimensions)]
        if 0 in sizes:
            self._refuse(f"{what} has shape {sizes} at byte {at + 4}; expected counts", name)
        at = self.position
        kind = self._type(self._unsigned(4, f"the type of {what}"), name, at, bitnet)
        offset = self._unsigned(8, f"the offset of {what}")
        row = sizes[0] if sizes else 1
        if (row if kind.name != "I2_S" else prod(sizes)) % kind.block:
            self._refuse(
                f"{what} of {kind.name} has rows of {row} values; expected a multiple of "
                f"{kind.block}",
                name,
            )
        nbytes = kind.size(prod(sizes))
        if nbytes > self._size:
            self._refuse(
                f"{what} of {kind.name} {sizes[::-1]} takes {nbytes} bytes, and the file has "
                f"{self._size}",
                name,
            )
        return GgufTensor(name, kind, tuple(sizes[::-1]), offset, nbytes)

    def _type(self, number: int, name: str, at: int, bitnet: bool) -> TensorType:
        if number == TL1 or (number == TL2 and bitnet):
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has type {'TL1' if number == TL1 else 'TL2'} "
                f"({number}, byte {at}), whose byte order follows a kernel_config.ini that is not "
                "in the file, so it cannot be decoded from the file alone: convert the original "
                "checkpoint to TQ2_0 or I2_S."
            )
        if number not in TYPES:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} has type {number} (byte {at}), which is not read; "
                f"expected one of {', '.join(t.name for t in TYPES.values())}."
            )
        return TYPES[number]

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment < 1 << 32 or alignment.bit_count() != 1:
            self._refuse(f"key 'general.alignment' is {alignment!r}; expected a power of two")
        return alignment

    def _value(self, key: str) -> Value:
        at = self.position
        kind = self._unsigned(4, f"the type of key {key!r}")
        if kind == _STRING:
            return self._string(self._size, f"the value of key {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            self._refuse(f"key {key!r} has value type {kind} at byte {at}; expected 0 to 12")
        value: int | float = self._numbers(kind, 1, f"the value of key {key!r}")[0].item()
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Value:
        at = self.position
        kind = self._unsigned(4, f"the element type of key {key!r}")
        count = self._unsigned(8, f"the length of key {key!r}")
        if kind not in _NUMBERS and kind != _STRING:
            self._refuse(
                f"key {key!r} is an array of type {kind} at byte {at}; expected numbers or strings"
            )
        smallest = 8 if kind == _STRING else _NUMBERS[kind].itemsize
        if count > MAX_ARRAY or count * smallest > self._limit - self.position:
            self._refuse(
                f"key {key!r} claims {count} elements at byte {at + 4}, and only "
                f"{self._limit - self.position} bytes follow"
            )
        if kind == _STRING:
            what = f"key {key!r}"
            return [self._string(self._size, what) for _ in range(count)]
        values = self._numbers(kind, count, f"key {key!r}")
        return values.astype(bool) if kind == _BOOL else values

    def _numbers(self, kind: int, count: int, what: str) -> NDArray[np.generic]:
        at = self.position
        dtype: np.dtype[np.generic] = _NUMBERS[kind]
        raw = self._take(count * dtype.itemsize, what)
        values: NDArray[np.generic] = np.frombuffer(raw, dtype)
        if kind == _BOOL and count and values.max() > 1:
            self._refuse(f"{what} holds a bool that is neither 0 nor 1 near byte {at}")
        return values

    def _string(self, limit: int, what: str) -> str:
        at = self.position
        (length,) = struct.unpack("<Q", self._take(8, what))
        if length > limit:
            self._refuse(f"{what} claims {length} bytes at byte {at}; at most {limit}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(f"{what} is not UTF-8 at byte {at + 8 + error.start}")

    def _count(self, at: int, smallest: int, what: str) -> int:
        count = self._unsigned(8, f"the count of {what}")
        if count * smallest > self._limit - self.position:
            self._refuse(
                f"bytes {at} to {at + 7} claim {count} {what}, and only "
                f"{self._limit - self.position} bytes follow"
            )
        return count

    def _unsigned(self, nbytes: int, what: str) -> int:
        return int.from_bytes(self._take(nbytes, what), "little")

    def _take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self._limit - self.position:
            over = self._limit < self._size
            bound = f"over the {MAX_HEADER_BYTES} a header may have" if over else "truncated"
            self._refuse(
                f"the header ends at byte {self._limit} inside {what}, which needs {nbytes} bytes "
                f"from byte {self.position}: it is {bound}"
            )
        first = self.position - self._window_start
        if first + nbytes > len(self._window):
            self._window = os.pread(self._file, max(nbytes, _WINDOW), self.position)
            self._window_start, first = self.position, 0
            if len(self._window) < nbytes:
                self._refuse(f"the file ended at byte {self.position + len(self._window)}")
        self.position += nbytes
        return self._window[first : first + nbytes]

    def _refuse(self, what: str, tensor: str = "") -> NoReturn:
        raise damaged(self._path, what, tensor)
