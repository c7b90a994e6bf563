"""Quantizers, packing and products of ternary weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Quantizes(Protocol):
    """The quantizers and the linear layer made of them (W1.58A8).

    A tensor in bf16 stands for the same numbers in fp32: it has their codes, and an fp32 scale is
    that of fp32. A quantizer that computes in the dtype of its input says so by a scale of that
    dtype, and one that takes fp32 alone raises; neither is held to fp32.
    """

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ternary codes of a weight: (codes int8 (N, K), scale fp32 scalar), w ~ scale * codes."""
        ...

    def quantize_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Int8 codes a token: (codes int8 (..., K), scale fp32 (..., 1)), x ~ scale * codes."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The training forward, x (..., K) -> (..., N); differentiable through the STE."""
        ...

    def integer_linear(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integer path: (int32 accumulators (..., N), fp32 factor (..., 1)), no gradient.

        accumulators * factor is the output without bias.
        """
        ...


@runtime_checkable
class QuantizesParts(Protocol):
    """Quantization of a weight that fuses several projections, one scale a part."""

    def quantize_weight_parts(self, weight: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes int8 (N, K) and scales fp32 (len(parts),); `parts` are row counts, sum N."""
        ...


@runtime_checkable
class Packs(Protocol):
    """Lossless packing of ternary codes, four a byte (Hugging Face row-block order)."""

    def pack(self, codes: Tensor) -> Tensor:
        """Int8 codes (N, K) -> uint8 (ceil(N / 4), K)."""
        ...

    def unpack(self, packed: Tensor, rows: int) -> Tensor:
        """uint8 (ceil(rows / 4), K) -> int8 codes (rows, K)."""
        ...


@runtime_checkable
class MultipliesTernary(Protocol):
    """Has kernels that multiply int8 activations by ternary codes."""

    def products(self) -> Sequence[str]:
        """Names of the kernels that run on this machine, the one that inference uses first."""
        ...

    def prepare_product(self, name: str, codes: Tensor) -> Callable[[Tensor], Tensor]:
        """Packs codes int8 (N, K) for a kernel.

        Returns:
            A function from activations int8 (M, K) to their exact sums int32 (M, N).
        """
        ...
