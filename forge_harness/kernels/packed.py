"""Packed weights in the layout that every backend multiplies with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from forge_harness.errors import NonTernaryCodeError, ScaleError

from .backends import Backend, native, which
from .packing import check_matrix, check_rows, check_values, readable_bytes

LAYOUT = "i2-64x16"
"""Name and version of the layout; see `forge_kernels/layout.py`."""
MAX_COLUMNS = 131_072
"""Longest row whose int32 accumulators cannot overflow in any backend (csrc/cpu/layout.h)."""
_SMALLEST_SCALE = 2.0**-126
"""Smallest normal number of fp32: below it a number has fewer bits, or is 0."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedTernary:
    """A ternary weight in the form inference reads: two bits a code, and its scale.

    Attributes:
        data: uint8 (ceil(N / 64), ceil(K / 16), 256), contiguous.
        rows: Output features N.
        columns: Input features K.
        scale: fp32, 0-d or one a row (N,), contiguous; multiplies codes.
        layout: What `data` holds.
        is_cpu: Whether the tensors are on the CPU.
        is_rowwise: Whether there is a scale for each row.

    Raises:
        ValueError: `data` or `scale` is none of such a weight, or of another layout.
    """

    data: Tensor = field(repr=False)
    rows: int
    columns: int
    scale: Tensor = field(repr=False)
    layout: str = LAYOUT
    # Kept, since products of one token ask each time and a tensor takes 50 ns to answer.
    is_cpu: bool = field(init=False, repr=False)
    is_rowwise: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from forge_kernels.layout import blocks_shape

        check_layout(self.layout)
        check_size(self.rows, self.columns)
        expected = blocks_shape(self.rows, self.columns)
        if (
            self.data.dtype != torch.uint8
            or tuple(self.data.shape) != expected
            or not self.data.is_contiguous()
            or self.data.is_neg()
        ):
            raise ValueError(
                f"packed data are {_described(self.data)}; expected contiguous torch.uint8 "
                f"{expected} for a weight ({self.rows}, {self.columns})."
            )
        if (
            self.scale.dtype != torch.float32
            or self.scale.shape not in ((), (self.rows,))
            or not self.scale.is_contiguous()
            or self.scale.is_neg()
        ):
            raise ValueError(
                f"scale is {_described(self.scale)}; expected contiguous torch.float32 () or "
                f"({self.rows},)."
            )
        if self.scale.device != self.data.device:
            raise ValueError(
                f"codes are on {self.data.device}, the scale on {self.scale.device}; expected one "
                "device."
            )
        object.__setattr__(self, "is_cpu", self.data.is_cpu)
        object.__setattr__(self, "is_rowwise", self.scale.dim() == 1)

    def __reduce__(self) -> tuple[type[PackedTernary], tuple[object, ...]]:
        # Through the constructor: what was pickled elsewhere may be of another layout.
        return type(self), (self.data, self.rows, self.columns, self.scale, self.layout)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return self.rows, self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padding included.

        From 1 MiB on codes lie on huge pages of 2 MiB where Linux has them, and the last one counts
        whole in the memory of the process.
        """
        return int(self.data.nbytes + self.scale.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and padding included, over the number of weights."""
        return 8 * self.nbytes / (self.rows * self.columns)

    def to(self, device: object) -> PackedTernary:
        """Returns the weight on a torch device; itself if it is there."""
        moved = self.data.to(device)  # type: ignore[call-overload]
        if moved is self.data:
            return self
        scale = self.scale.to(device)  # type: ignore[call-overload]
        return PackedTernary(moved, self.rows, self.columns, scale)


def pack(codes: Tensor, *, scale: Tensor | float, backend: Backend = "auto") -> PackedTernary:
    """Packs codes together with their scale.

    Args:
        codes: int8 (N, K) of -1, 0, +1, N and K at least 1.
        scale: Multiplies codes: a number, or a tensor with one entry, or one a row.
        backend: Which implementation packs.

    Raises:
        NonTernaryCodeError: A code is outside -1, 0, +1; the message names its row and column.
        TypeError: `codes` is not int8.
        ScaleError: A scale is no number, not finite in fp32, or so small that products would lose
            bits of it, or all; 0 is kept as it is. A ValueError too.
        ValueError: `codes` is not 2-D, is empty or too wide, or the scale has another number of
            entries.
        BackendUnavailableError: The explicit backend is not there.
    """
    check_matrix(codes, torch.int8, "codes")
    rows, columns = codes.shape
    check_size(rows, columns)
    scales = _scales(scale, rows, codes)
    chosen = which("pack_blocks", backend, device=codes.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import layout

            data = layout.pack_blocks(codes)
        else:
            data = _native_blocks(rows, columns)
            native().pack_blocks(readable_bytes(codes), data.numpy(), _threads())
    except ValueError as error:
        raise NonTernaryCodeError(
            f"{error}: quantize first, for example with forge_harness.quant.absmean_ternary."
        ) from None
    return PackedTernary(data, rows, columns, scales)


def pack_stored(
    stored: Tensor, rows: int, *, scale: Tensor | float, backend: Backend = "auto"
) -> PackedTernary:
    """Packs a weight from the bytes files hold (`pack_i2`), without unpacking it whole.

    Args:
        stored: uint8 (ceil(rows / 4), K).
        rows: N.
        scale: As `pack`.
        backend: As `pack`.

    Raises:
        NonTernaryCodeError: A field holds 3.
        TypeError: `stored` is not uint8.
        ValueError: As `pack`, or `stored` does not hold `rows` rows.
        BackendUnavailableError: The explicit backend is not there.
    """
    check_matrix(stored, torch.uint8, "packed codes")
    check_rows(stored, rows)
    columns = stored.shape[1]
    check_size(rows, columns)
    scales = _scales(scale, rows, stored)
    chosen = which("pack_blocks", backend, device=stored.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import layout, reference

            data = layout.pack_blocks(reference.unpack_i2(stored, rows))
        else:
            data = _native_blocks(rows, columns)
            native().pack_blocks_from_i2(readable_bytes(stored), rows, data.numpy(), _threads())
    except ValueError as error:
        raise NonTernaryCodeError(
            f"{error}: the bytes are damaged or in another layout than i2-rowblock."
        ) from None
    return PackedTernary(data, rows, columns, scales)


def unpack(packed: PackedTernary, *, backend: Backend = "auto") -> Tensor:
    """Returns the int8 codes (N, K) of a packed weight.

    Raises:
        NonTernaryCodeError: A field holds 3: the bytes were damaged since they were packed.
        BackendUnavailableError: The explicit backend is not there.
        ValueError: The weight is on the meta device, without values.
    """
    check_values(packed.data, "packed codes")
    chosen = which("unpack_blocks", backend, device=packed.data.device.type)
    try:
        if chosen == "reference":
            from forge_kernels import layout

            return layout.unpack_blocks(packed.data, packed.rows, packed.columns)
        codes = packed.data.new_empty(packed.shape, dtype=torch.int8)
        native().unpack_blocks(packed.data.numpy(), codes.numpy(), _threads())
        return codes
    except ValueError as error:
        raise NonTernaryCodeError(f"{error}: the packed weight is damaged.") from None


def check_layout(layout: str) -> None:
    """Raises ValueError for a layout that this version does not multiply with."""
    if layout != LAYOUT:
        raise ValueError(
            f"packed weight of layout {layout!r}; this version reads {LAYOUT!r}: pack the codes "
            "again."
        )


def check_size(rows: int, columns: int) -> None:
    """Raises ValueError for a weight without entries, or with rows too long for int32 sums."""
    if rows < 1 or not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(
            f"weight of shape ({rows}, {columns}); expected at least one row and 1 to "
            f"{MAX_COLUMNS:,} columns: int32 sums hold no longer ones."
        )


def _scales(scale: Tensor | float, rows: int, like: Tensor) -> Tensor:
    try:
        if isinstance(scale, Tensor) and scale.is_complex():
            raise TypeError
        given = torch.as_tensor(scale, dtype=torch.float64, device=like.device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ScaleError(
            f"the scale is {_kind(scale)} that fp32 cannot hold; expected a number or a "
            "tensor of numbers."
        ) from None
    if given.numel() not in (1, rows):
        raise ValueError(
            f"scale has shape {tuple(given.shape)}; expected one entry, or one for each of the "
            f"{rows} rows: repeat the scale of a part over its rows."
        )
    scales = checked_scales(given)
    return scales.reshape(-1).clone() if scales.numel() > 1 else scales.clone().reshape(())


def checked_scales(given: Tensor) -> Tensor:
    """Returns scales in fp32.

    Raises:
        ScaleError: One is not finite in fp32, or neither 0 nor normal.
    """
    scales = given.to(torch.float32)
    wrong = ~scales.isfinite() | ((scales.abs() < _SMALLEST_SCALE) & (given != 0))
    if bool(wrong.any()):
        index = int(wrong.reshape(-1).int().argmax())
        raise ScaleError(
            f"scale {float(given.reshape(-1)[index]):.9g} of row {index}; expected 0 or normal "
            f"numbers of fp32, {_SMALLEST_SCALE:.3g} to {torch.finfo(torch.float32).max:.3g}: "
            "check the weight it was made from."
        )
    return scales


def _described(tensor: Tensor) -> str:
    """Returns dtype, shape, and what else keeps a kernel from reading a tensor by its address."""
    strides = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    negated = ", a negated view" if tensor.is_neg() else ""
    return f"{tensor.dtype} {tuple(tensor.shape)}{strides}{negated}"


def _kind(scale: object) -> str:
    return f"a {scale.dtype}" if isinstance(scale, Tensor) else f"a {type(scale).__name__}"


def _native_blocks(rows: int, columns: int) -> Tensor:
    return torch.from_numpy(native().allocate_blocks(rows, columns))


def _threads() -> int:
    return torch.get_num_threads()
