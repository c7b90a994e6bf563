"""The canonical BitNet b1.58 quantizers: absmean ternary weights, absmax int8 activations.

Formulas of the reference code in "The Era of 1-bit LLMs: Training Tips, Code and FAQ", figure 3,
which the Hugging Face, torchao and bitnet.cpp readers share. In every function

* arithmetic and scales are fp32, whatever the input dtype (a bf16 reciprocal moves up to 0.23 % of
  the weight codes and 12 % of the activation codes);
* scales *multiply* codes: w ~ scale * codes. Files that store 1 / scale say so in their config;
* the floor `EPS` is applied once, where the scale is made, so that f(c x) = c f(x) down to it;
* rounding is half to even; the input is never changed and no gradient flows (see `ste`);
* a NaN or an infinity is never hidden: the scale of its group becomes NaN or infinite, and the
  codes that cannot be computed are 0, so every output of the group is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-5
"""Floor of absmean and absmax. Weights of mean magnitude below it are all coded 0 below EPS / 2."""


def absmean_ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight to -1, 0, +1 times one scale, its mean magnitude.

    codes = clamp(round(w / scale), -1, 1), scale = max(mean |w|, EPS).

    Args:
        w: Weight (N, K), any floating dtype; |w| must sum to less than the fp32 maximum.

    Returns:
        codes: int8 (N, K).
        scale: fp32, 0-d.

    Raises:
        ValueError: `w` is not 2-D.
        TypeError: `w` is not floating.
    """
    weight = _float32_matrix(w)
    scale = _absmean(weight)
    return ternary_codes(weight, scale), scale


def absmean_ternary_parts(w: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quantizes a weight that stacks several projections, each with a scale of its own.

    One shared scale would move about 10 % of the codes when the projections differ in magnitude.

    Args:
        w: Weight (N, K), any floating dtype.
        parts: Row counts of the projections in order; their sum is N.

    Returns:
        codes: int8 (N, K).
        scales: fp32 (len(parts),).

    Raises:
        ValueError: `w` is not 2-D, or `parts` are not positive counts that sum to N.
        TypeError: `w` is not floating.
    """
    weight = _float32_matrix(w)
    check_parts(parts, rows=weight.shape[0])
    pieces = torch.split(weight, list(parts))
    scales = [_absmean(piece) for piece in pieces]
    codes = [ternary_codes(piece, scale) for piece, scale in zip(pieces, scales, strict=True)]
    return torch.cat(codes), torch.stack(scales)


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes activations to int8, one scale a token (the last dimension).

    With g = max(max |x|, EPS): codes = clamp(round(x * (127 * (1 / g))), -128, 127), scale =
    g / 127. 127 * (1 / g), both rounded, is what torch makes of the reference readers' `127 / g`;
    dividing by the scale instead moves one code in about a million. -128 is never reached in fp32.

    Args:
        x: Activations (..., K), any floating dtype, K >= 1.

    Returns:
        codes: int8 (..., K).
        scale: fp32 (..., 1).

    Raises:
        ValueError: `x` has no last dimension or an empty one.
        TypeError: `x` is not floating.
    """
    _require_floating(x, "activations")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"activations have shape {tuple(x.shape)}; expected (..., K) with K >= 1: "
            "a token needs at least one feature."
        )
    values = x.detach().float()
    # amax of abs: aminmax and vector_norm(inf) measured 13 to 19 times slower on CPU.
    absmax = values.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    codes = (values * (127.0 / absmax)).round().clamp(-128, 127)
    return _to_int8(codes), absmax / 127.0


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns scale * codes in fp32; `scale` must broadcast against `codes`."""
    return codes.float() * scale


def check_parts(parts: Sequence[int], *, rows: int) -> None:
    """Raises ValueError unless `parts` are positive counts that sum to `rows`."""
    if not parts or min(parts) < 1 or sum(parts) != rows:
        raise ValueError(
            f"parts {tuple(parts)} sum to {sum(parts)}; expected positive row counts that sum to "
            f"the {rows} rows of the weight."
        )


def row_magnitudes(w: Tensor) -> Tensor:
    """Returns the sum of |w| of each row of a weight (N, K), fp32 (N,).

    With `absmean_of_rows` and `ternary_codes` the pieces of `absmean_ternary`, for weights that are
    read a few rows at a time: the same bits come out as long as no run of rows of a taller weight
    is a single row (torch sums a tensor with one result in another order).
    """
    # Row by row in memory: torch sums a weight that is stored by columns in another order.
    return w.detach().float().abs().contiguous().sum(dim=1)


def absmean_of_rows(magnitudes: Tensor, columns: int) -> Tensor:
    """Returns the absmean scale, 0-d fp32, from the `row_magnitudes` of all rows."""
    return (magnitudes.sum() / max(magnitudes.numel() * columns, 1)).clamp(min=EPS)


def ternary_codes(w: Tensor, scale: Tensor) -> Tensor:
    """Returns clamp(round(w / scale), -1, 1) as int8; `scale` is the fp32 scale of the weight."""
    return _to_int8((w.detach().float() * (1.0 / scale)).round().clamp(-1, 1))


def _absmean(weight: Tensor) -> Tensor:
    # Row sums first: a full reduction is split by thread count and its last bit follows it.
    return absmean_of_rows(row_magnitudes(weight), weight.shape[1])


def _to_int8(rounded: Tensor) -> Tensor:
    # Converting NaN to an integer is undefined in C++; its scale already carries the news.
    return rounded.nan_to_num(nan=0.0).to(torch.int8)


def _float32_matrix(w: Tensor) -> Tensor:
    _require_floating(w, "weight")
    if w.dim() != 2:
        raise ValueError(
            f"weight has shape {tuple(w.shape)}; expected 2-D (N, K): "
            "reshape it so that rows are output features."
        )
    return w.detach().float()


def _require_floating(tensor: Tensor, what: str) -> None:
    if not tensor.is_floating_point():
        raise TypeError(
            f"{what} have dtype {tensor.dtype}; expected a floating dtype: "
            "codes must not be quantized again."
        )
