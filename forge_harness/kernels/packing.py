"""Packing for files: the layout "i2-rowblock" (see the package's text)."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from forge_harness.errors import NonTernaryCodeError

from .backends import Backend, which


def pack_i2(codes: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Packs ternary codes four a byte, by row blocks (see the module's text).

    Args:
        codes: int8 (N, K) of -1, 0, +1; not changed.
        backend: Which implementation.

    Returns:
        uint8 (ceil(N / 4), K) on the device of `codes`.

    Raises:
        NonTernaryCodeError: A code is outside -1, 0, +1; the message names its row and column.
        TypeError: `codes` is not int8.
        ValueError: `codes` is not 2-D.
        BackendUnavailableError: The explicit backend is not there.
    """
    check_matrix(codes, torch.int8, "codes")
    chosen = which("pack_i2", backend, device=codes.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import reference

            return reference.pack_i2(codes)
        from forge_kernels import _native

        packed = codes.new_empty((-(-codes.shape[0] // 4), codes.shape[1]), dtype=torch.uint8)
        _native.pack_i2(readable_bytes(codes), packed.numpy())
        return packed
    except ValueError as error:
        raise NonTernaryCodeError(
            f"{error}: quantize first, for example with forge_harness.quant.absmean_ternary."
        ) from None


def unpack_i2(packed: Tensor, rows: int, *, backend: Backend = "auto") -> Tensor:
    """Restores the codes of `pack_i2`.

    Args:
        packed: uint8 (ceil(rows / 4), K); not changed.
        rows: N, which the bytes do not tell.
        backend: Which implementation.

    Returns:
        int8 (rows, K) on the device of `packed`.

    Raises:
        NonTernaryCodeError: A field holds 3, which stands for no code; the message names its row
            and column in the unpacked weight.
        TypeError: `packed` is not uint8.
        ValueError: `packed` is not 2-D or does not hold `rows` rows.
        BackendUnavailableError: The explicit backend is not there.
    """
    check_matrix(packed, torch.uint8, "packed codes")
    check_rows(packed, rows)
    chosen = which("unpack_i2", backend, device=packed.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import reference

            return reference.unpack_i2(packed, rows)
        from forge_kernels import _native

        codes = packed.new_empty((rows, packed.shape[1]), dtype=torch.int8)
        _native.unpack_i2(readable_bytes(packed), codes.numpy())
        return codes
    except ValueError as error:
        raise NonTernaryCodeError(
            f"{error}: the bytes are damaged or in another layout than i2-rowblock."
        ) from None


def check_matrix(tensor: Tensor, dtype: object, what: str) -> None:
    """Raises TypeError for another dtype, ValueError for anything but a matrix with values."""
    if tensor.dtype != dtype:
        raise TypeError(
            f"{what} have dtype {tensor.dtype}; expected {dtype}: convert them explicitly."
        )
    if tensor.dim() != 2:
        raise ValueError(
            f"{what} have shape {tuple(tensor.shape)}; expected 2-D, output rows first."
        )
    check_values(tensor, what)


def check_values(tensor: Tensor, what: str) -> None:
    """Raises ValueError for a tensor of the meta device."""
    if tensor.is_meta:
        raise ValueError(
            f"{what} are on meta, where tensors have no values; expected them on a device that "
            "holds them."
        )


def readable_bytes(tensor: Tensor) -> NDArray[Any]:
    """Returns codes as the native functions read them: contiguous, their sign in their values."""
    return tensor.resolve_neg().contiguous().numpy()


def check_rows(packed: Tensor, rows: int) -> None:
    """Raises ValueError unless `packed` holds `rows` rows, four a byte."""
    if rows < 0 or -(-rows // 4) != packed.shape[0]:
        most = 4 * packed.shape[0]
        raise ValueError(
            f"{rows} rows do not fit packed codes of shape {tuple(packed.shape)}; "
            f"expected {max(most - 3, 0)} to {most}: pass the weight's own row count."
        )
