"""Reference implementations: plain torch on any device, written to be read and compared with.

They raise `ValueError` like the native module, with the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIELD_SHIFTS = (0, 2, 4, 6)


def pack_i2(codes: Tensor) -> Tensor:
    """Packs int8 codes (N, K) into uint8 (ceil(N/4), K); see `forge_harness.kernels.pack_i2`."""
    refuse_first(
        (codes < -1) | (codes > 1),
        codes,
        "code {value} at row {row}, column {column} is not -1, 0 or +1",
    )
    rows, columns = codes.shape
    packed_rows = -(-rows // 4)
    fields = codes.new_ones((4 * packed_rows, columns), dtype=torch.uint8)
    fields[:rows] = (codes + 1).to(torch.uint8)
    packed = codes.new_zeros((packed_rows, columns), dtype=torch.uint8)
    for block, shift in zip(fields.chunk(4), _FIELD_SHIFTS, strict=True):
        packed |= block << shift
    return packed


def unpack_i2(packed: Tensor, rows: int) -> Tensor:
    """Unpacks uint8 (ceil(rows/4), K) into int8 (rows, K); fields past `rows` are not looked at."""
    fields = torch.cat([(packed >> shift) & 3 for shift in _FIELD_SHIFTS])[:rows]
    refuse_first(
        fields == 3, fields, "field {value} at row {row}, column {column} stands for no code"
    )
    return fields.to(torch.int8) - 1


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes tokens (..., K) to int8 (..., K) and fp32 scales (..., 1).

    The same formula as `forge_harness.quant.absmax_int8`, written out here because the kernels may
    not import it; a test holds the two equal bit for bit.
    """
    values = x.detach().float()
    absmax = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    codes = (values * (127.0 / absmax)).round().clamp(-128, 127).nan_to_num(nan=0.0)
    return codes.to(torch.int8), absmax / 127.0


def exact_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Returns q (M, K) @ codes (N, K).T exactly, int64 (M, N) on CPU, float64 elsewhere."""
    # int64 on CPU: no BLAS, any K; float64 elsewhere, exact up to K = 2**46.
    exact = torch.int64 if q.device.type == "cpu" else torch.float64
    return q.to(exact) @ codes.to(exact).t()


def ternary_linear(x: Tensor, codes: Tensor, row_scale: Tensor) -> Tensor:
    """Multiplies codes exactly and rescales.

    Args:
        x: Activations (..., K).
        codes: int8 (N, K).
        row_scale: fp32 (1,) or (N,).

    Returns:
        fp32 (..., N).
    """
    q, activation_scale = absmax_int8(x)
    sums = exact_matmul(q.reshape(-1, q.shape[-1]), codes)
    accumulators = sums.reshape(*q.shape[:-1], codes.shape[0])
    return accumulators.float() * (activation_scale * row_scale)


def refuse_first(bad: Tensor, values: Tensor, message: str) -> None:
    """Raises ValueError with value, row and column of the first bad entry of a matrix."""
    if not bool(bad.any()):
        return
    row, column = (int(index) for index in bad.nonzero()[0])
    raise ValueError(message.format(value=int(values[row, column]), row=row, column=column))
