"""The training forward and backward of a ternary linear layer, with injectable quantizers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from forge_harness.errors import unknown_choice
from forge_harness.kernels import training as native

from .integer import fp32_matmul, int8_matmul
from .ste import (
    Quantizer,
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    token_scales,
    weight_scales,
)
from .ternary import absmax_int8, absmean_of_rows, absmean_ternary, row_magnitudes

Compute = Literal["exact", "int8", "fake"]
COMPUTES: tuple[Compute, ...] = ("exact", "int8", "fake")


@dataclass(frozen=True, slots=True)
class TernaryLinearOp:
    """y = (q . C) * (s * beta) + bias, differentiable through the plain straight-through estimator.

    All three modes use the same codes and backward formulas; `exact` and `int8` also give the same
    output bits, whatever the batch size or thread count.

    * `exact`: codes multiplied in fp32, where every sum is an exact integer; fp32 backward.
    * `int8`: integer forward, bf16 backward with fp32 master gradients. The fastest: the codes are
      exact in bf16, only upstream gradients and results round (2**-9 relative each). Eager on a CPU
      the canonical quantizers and the product are the native kernels', elsewhere torch's
      (`torch._int_mm`); the bits are the same.
    * `fake`: dequantised values through `F.linear`, as most training code has it; differs from the
      integer path by up to `bounds.FAKE_QUANT_RTOL_L1` of L1.

    Backward, with G the upstream gradient: dX = G . (C * beta), dW = G^T . (q * s), db = sum G.
    Nothing is masked and no gradient goes through a scale. `exact` and `int8` keep only int8 codes
    and scales between forward and backward, and refuse a second derivative. Autocast changes none
    of it (for `fake`, as long as backward runs outside autocast, as torch asks).

    Attributes:
        quantize_weight: Latent weight (N, K) -> int8 codes (N, K), scale (one entry or one a row).
        quantize_activation: Activations (..., K) -> int8 codes (..., K), scale (..., 1).
        compute: How the product is computed.
    """

    quantize_weight: Quantizer = absmean_ternary
    quantize_activation: Quantizer = absmax_int8
    compute: Compute = "exact"

    def __post_init__(self) -> None:
        if self.compute not in COMPUTES:
            raise ValueError(unknown_choice("compute mode", self.compute, COMPUTES))

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the layer.

        Args:
            x: Activations (..., K), floating.
            w: Latent weight (N, K), floating.
            bias: (N,) or None; added after rescaling, not quantized.

        Returns:
            (..., N) in x's dtype.

        Raises:
            TypeError: `x` or `w` is not floating, `bias` is complex, or the codes for `int8` are
                not int8.
            ValueError: The shapes do not fit, a quantizer returns codes or scales of other shapes
                than its values ask for, or K exceeds the limit of the compute mode.
        """
        _check_shapes(x, w, bias)
        for name, tensor in (("x", x), ("the weight", w)):
            if not tensor.is_floating_point():
                raise TypeError(
                    f"{name} has dtype {tensor.dtype}; expected floating: codes are made here."
                )
        if bias is not None and bias.is_complex():
            raise TypeError(f"bias has dtype {bias.dtype}; expected real numbers.")
        with _no_autocast(x.device.type):
            if self.compute == "fake":
                return self._fake(x, w, bias)
            codes, weight_scale = self._weight(w.detach())
            q, activation_scale = self._activation(x.detach())
            _check_codes(q, x, codes, w)
            if self.compute == "int8":
                _check_int8(q, codes)
            scale = token_scales(activation_scale, q)
            beta = weight_scales(weight_scale, codes.shape[0])
            return _ternary_linear(x, w, bias, q, scale, codes, beta, self.compute)

    def _weight(self, w: Tensor) -> tuple[Tensor, Tensor]:
        canonical = self.compute == "int8" and self.quantize_weight is absmean_ternary
        if not (canonical and native.fits(w)):
            return self.quantize_weight(w)
        scale = absmean_of_rows(row_magnitudes(w), w.shape[1])
        return native.weight_codes(w, scale), scale

    def _activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        canonical = self.compute == "int8" and self.quantize_activation is absmax_int8
        if not (canonical and x.shape[-1] and native.fits(x)):
            return self.quantize_activation(x)
        return native.activation_codes(x)

    def effective_weight(self, w: Tensor) -> Tensor:
        """Returns the values (N, K) fp32 the forward multiplies with, without gradient."""
        codes, scale = self.quantize_weight(w.detach())
        return dequantize_weight(codes, scale)

    def _fake(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        values = fake_quantize_activation(x.float(), self.quantize_activation)
        weight = fake_quantize_weight(w.float(), self.quantize_weight)
        _check_codes(values, x, weight, w)
        return F.linear(values, weight, None if bias is None else bias.float()).to(x.dtype)


class _TernaryLinear(torch.autograd.Function):
    """Takes codes ready made, so that a foreign quantizer changes forward and backward alike."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context has no type
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        q: Tensor,
        activation_scale: Tensor,
        codes: Tensor,
        beta: Tensor,
        compute: Compute,
    ) -> Tensor:
        ctx.save_for_backward(q, activation_scale, codes, beta)
        ctx.matmul_dtype = torch.bfloat16 if compute == "int8" else torch.float32
        ctx.dtypes = (x.dtype, w.dtype, None if bias is None else bias.dtype)
        if compute == "int8" and native.fits(q, activation_scale, codes, beta, bias):
            y = native.linear_of_codes(q, activation_scale, codes, beta, bias, x.dtype)
            if y is not None:
                return y
        product = int8_matmul if compute == "int8" else fp32_matmul
        accumulators = product(q.reshape(-1, q.shape[-1]), codes)
        y = accumulators.reshape(*q.shape[:-1], codes.shape[0]) * (activation_scale * beta)
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        # The gradients depend on x and w through codes and scales; torch looks at the upstream one
        # alone, and takes them for constants where that is one (of y.sum()).
        if torch.is_grad_enabled() and not grad.requires_grad:
            grad = grad.detach().requires_grad_()
        return _gradients(ctx, grad)


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
    q, activation_scale, codes, beta = ctx.saved_tensors
    x_dtype, w_dtype, bias_dtype = ctx.dtypes
    grad_x = grad_w = grad_bias = None
    with _no_autocast(grad.device.type):
        grad = grad.float()
        rows = _rows(grad)
        by_row = activation_scale.reshape(-1, 1) if ctx.needs_input_grad[1] else None
        by_column = beta if ctx.needs_input_grad[0] else None
        scaled_w, scaled_x = _scaled_bf16(rows, by_row, by_column, ctx.matmul_dtype)
        # The codes stay exact in either dtype: DX = G . (C * beta) is (G * beta) . C, and
        # DW = G^T . (q * s) is (G * s)^T . q.
        if by_column is not None:
            if scaled_x is None:
                scaled_x = (rows * by_column).to(ctx.matmul_dtype)
            grad_x = (scaled_x @ codes.to(scaled_x.dtype)).float()
            grad_x = grad_x.reshape(*grad.shape[:-1], codes.shape[1]).to(x_dtype)
            del scaled_x
        if by_row is not None:
            if scaled_w is None:
                scaled_w = (rows * by_row).to(ctx.matmul_dtype).t()
            grad_w = (scaled_w @ _rows(q).to(scaled_w.dtype)).float().to(w_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = _rows(grad).sum(dim=0).to(bias_dtype)
    return grad_x, grad_w, grad_bias, None, None, None, None, None


# Function.apply has no type of its own.
_ternary_linear: Callable[..., Tensor] = _TernaryLinear.apply


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # Entering autocast's own context takes as long as a small operation, and is seldom needed.
    # meta has none, and raises when it is asked whether it is enabled.
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _scaled_bf16(
    grad: Tensor, by_row: Tensor | None, by_column: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (grad * by_row).T and grad * by_column by the kernels; None where they have none."""
    if dtype is not torch.bfloat16 or not native.fits(grad, by_row, by_column):
        return None, None
    return native.scaled_bf16(grad, by_row, by_column) or (None, None)


def _check_shapes(x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    if w.dim() != 2 or x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the weight {tuple(w.shape)}; expected x (..., K) "
            "and weight (N, K): the last dimension of both is the input features."
        )
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected ({w.shape[0]},): one entry an output."
        )


def _check_codes(q: Tensor, x: Tensor, codes: Tensor, w: Tensor) -> None:
    for name, found, given in (("quantize_activation", q, x), ("quantize_weight", codes, w)):
        if found.shape != given.shape:
            raise ValueError(
                f"{name} returned codes of shape {tuple(found.shape)}; expected "
                f"{tuple(given.shape)}: one code a value."
            )


def _check_int8(q: Tensor, codes: Tensor) -> None:
    for name, found in (("quantize_activation", q), ("quantize_weight", codes)):
        if found.dtype != torch.int8:
            raise TypeError(
                f"{name} returned codes of {found.dtype}; expected torch.int8: the product of "
                'compute="int8" takes no others.'
            )


def _rows(tensor: Tensor) -> Tensor:
    # Not -1: a weight without rows gives outputs without entries, of which -1 could be any number.
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
