"""One typed entry to every kernel: checks arguments once, picks a backend, says which one ran.

Backends are `reference` (plain torch, any device) and `native` (the C++ extension, CPU). `auto`
takes the fastest one that is there and `which` tells which that is. An explicitly chosen backend
never falls back: it is an error with the remedy.

The byte layout of packed codes ("i2-rowblock") is that of the Hugging Face packed BitNet
checkpoints: with R = ceil(N / 4), bits 2i and 2i + 1 of byte (r, c) hold code (i * R + r, c) + 1.
So a byte holds one column of four rows that are R apart. Fields past row N are written as code 0
and are not looked at when unpacking. (transformers leaves them at -1, and cannot load such layers
again; with 0 a reader that ignores N gets rows of zeros instead of minus the sum of its inputs.)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from forge_harness.errors import BackendUnavailableError, NonTernaryCodeError, unknown_choice

if TYPE_CHECKING:  # the façade itself stays free of torch, so that `doctor` can ask it cheaply
    from torch import Tensor

Backend = Literal["auto", "reference", "native"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native")
OPS: dict[str, tuple[str, ...]] = {
    "pack_i2": ("native", "reference"),
    "unpack_i2": ("native", "reference"),
    "ternary_linear": ("reference",),
}
"""Op -> the backends that implement it, fastest first."""

_REBUILD = "reinstall the package with a C++17 compiler at hand (pip install -e .)"


@dataclass(frozen=True, slots=True)
class PackedTernary:
    """A ternary weight in the form inference reads: two bits a code, and its scale.

    Attributes:
        data: uint8 (ceil(rows / 4), K), layout "i2-rowblock".
        rows: Output features N.
        scale: fp32, 0-d or one a row (N,); multiplies codes.
    """

    data: Tensor = field(repr=False)
    rows: int
    scale: Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return self.rows, int(self.data.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.data.nbytes + self.scale.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and padding included, over the number of weights."""
        rows, columns = self.shape
        return 8 * self.nbytes / (rows * columns)


def native_problem() -> str:
    """Returns why the native extension cannot be used, or "" when it can."""
    try:
        importlib.import_module("forge_kernels._native")
    except ImportError as error:
        return str(error)
    return ""


def native_version() -> str | None:
    """Returns the version compiled into the native extension, or None without it."""
    if native_problem():
        return None
    return str(importlib.import_module("forge_kernels._native").__version__)


def which(
    op: str, backend: Backend = "auto", *, device: str = "cpu"
) -> Literal["reference", "native"]:
    """Returns the backend that runs `op` on tensors of device type `device`.

    Args:
        op: A key of `OPS`.
        backend: "auto", or an explicit choice, which is then checked.
        device: torch device type of the arguments.

    Raises:
        BackendUnavailableError: The explicit choice cannot run there.
        ValueError: `op` or `backend` is unknown.
    """
    if op not in OPS:
        raise ValueError(unknown_choice("kernel", op, OPS))
    if backend not in BACKENDS:
        raise ValueError(unknown_choice("kernel backend", backend, BACKENDS))
    if backend == "reference":
        return "reference"
    problem = _native_refusal(op, device)
    if not problem:
        return "native"
    if backend == "native":
        raise BackendUnavailableError(problem)
    return "reference"


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
    import torch

    _check_matrix(codes, torch.int8, "codes")
    chosen = which("pack_i2", backend, device=codes.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import reference

            return reference.pack_i2(codes)
        from forge_kernels import _native

        packed = torch.empty((-(-codes.shape[0] // 4), codes.shape[1]), dtype=torch.uint8)
        _native.pack_i2(codes.contiguous().numpy(), packed.numpy())
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
    import torch

    _check_matrix(packed, torch.uint8, "packed codes")
    _check_rows(packed, rows)
    chosen = which("unpack_i2", backend, device=packed.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import reference

            return reference.unpack_i2(packed, rows)
        from forge_kernels import _native

        codes = torch.empty((rows, packed.shape[1]), dtype=torch.int8)
        _native.unpack_i2(packed.contiguous().numpy(), codes.numpy())
        return codes
    except ValueError as error:
        raise NonTernaryCodeError(
            f"{error}: the bytes are damaged or in another layout than i2-rowblock."
        ) from None


def pack(codes: Tensor, *, scale: Tensor | float, backend: Backend = "auto") -> PackedTernary:
    """Packs codes together with their scale.

    Args:
        codes: int8 (N, K) of -1, 0, +1.
        scale: Multiplies codes: a number, or a tensor with one entry, or one a row.
        backend: Which implementation packs.

    Raises:
        NonTernaryCodeError: As `pack_i2`.
        TypeError: As `pack_i2`.
        ValueError: As `pack_i2`, or the scale has another number of entries.
        BackendUnavailableError: The explicit backend is not there.
    """
    import torch

    data = pack_i2(codes, backend=backend)
    scales = torch.as_tensor(scale, dtype=torch.float32, device=codes.device).detach()
    if scales.numel() not in (1, codes.shape[0]):
        raise ValueError(
            f"scale has shape {tuple(scales.shape)}; expected one entry, or one for each of the "
            f"{codes.shape[0]} rows: repeat the scale of a part over its rows."
        )
    shape = () if scales.numel() == 1 else (-1,)
    return PackedTernary(data=data, rows=int(codes.shape[0]), scale=scales.reshape(shape))


def unpack(packed: PackedTernary, *, backend: Backend = "auto") -> Tensor:
    """Returns the int8 codes (N, K) of a packed weight; raises as `unpack_i2`."""
    return unpack_i2(packed.data, packed.rows, backend=backend)


def ternary_linear(
    x: Tensor, packed: PackedTernary, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """The inference forward from packed weights: absmax int8, exact sums, rescale.

    Args:
        x: Activations (..., K), floating, on the device of `packed`.
        packed: The weight (N, K).
        bias: (N,) or None; added after rescaling.
        backend: Which implementation. Only `reference` exists so far.

    Returns:
        (..., N) in x's dtype.

    Raises:
        BackendUnavailableError: The explicit backend does not implement it.
        NonTernaryCodeError: As `unpack_i2`.
        ValueError: K of `x` and `packed` differ.
    """
    from forge_kernels import reference

    which("ternary_linear", backend, device=x.device.type)
    if x.dim() == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the packed weight {packed.shape}; "
            f"expected x (..., {packed.shape[1]}): the last dimension is the input features."
        )
    try:
        y = reference.ternary_linear(x, packed.data, packed.rows, packed.scale.reshape(-1))
    except ValueError as error:
        raise NonTernaryCodeError(f"{error}: the packed weight is damaged.") from None
    return (y if bias is None else y + bias).to(x.dtype)


def _native_refusal(op: str, device: str) -> str:
    """Returns the sentence that says why `native` cannot run `op` on `device`, or ""."""
    if "native" not in OPS[op]:
        return f"{op} has no native implementation; choose backend='reference' or 'auto'."
    if device != "cpu":
        return f"native {op} runs on CPU, not on {device}; move the tensor or choose 'reference'."
    problem = native_problem()
    if problem:
        return f"The native kernels cannot be loaded ({problem}); {_REBUILD} or choose 'reference'."
    return ""


def _check_matrix(tensor: Tensor, dtype: object, what: str) -> None:
    if tensor.dtype != dtype:
        raise TypeError(
            f"{what} have dtype {tensor.dtype}; expected {dtype}: convert them explicitly."
        )
    if tensor.dim() != 2:
        raise ValueError(
            f"{what} have shape {tuple(tensor.shape)}; expected 2-D, output rows first."
        )


def _check_rows(packed: Tensor, rows: int) -> None:
    if rows < 0 or -(-rows // 4) != packed.shape[0]:
        most = 4 * packed.shape[0]
        raise ValueError(
            f"{rows} rows do not fit packed codes of shape {tuple(packed.shape)}; "
            f"expected {max(most - 3, 0)} to {most}: pass the weight's own row count."
        )
