"""Language models for inference: `PackedLM` over packed weights, `DenseLM` its dense twin."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from forge_harness.kernels import Backend

from .bitlinear import BitLinear
from .decoder import CachedDecoder
from .decoder_source import LanguageModel, Projection, read_model
from .packed_linear import PackedLinear, copied_norm, stacked_bias

_DTYPES = (torch.bfloat16, torch.float32)


class PackedLM(CachedDecoder):
    """A language model whose ternary projections multiply by packed codes.

    Query, key and value are one product, and so are gate and up, so that their input is quantized
    once. Projections, embedding and head that are full precision in the model stay so.

    What equals the model it is made of (evaluation mode, `compute="exact"`, fp32):

    * every ternary projection, to the bit, on equal inputs; embedding, rotary turns, norms and
      gates are the same operations in the same order;
    * attention only to rounding, since torch sums softmax and mixture in another order for another
      number of queries or keys (a prefill of an empty cache makes the calls of the model itself);
    * so logits to rounding, *unless* an activation lies so near a rounding threshold that its last
      bits decide its int8 code: one code more or less moves an output by s * beta, that is up to
      1/127 of the largest activation times the weight scale, and the blocks above carry it on.

    With `dtype=torch.bfloat16` activations between the projections, and everything that is not
    ternary, round to bf16; weight codes and scales are still those of the fp32 model.

    Args:
        model: `ByteLM` or `CausalLM`; nothing is shared with it.
        context: Most tokens; None: what a `ByteLM` has. A `CausalLM` needs it.
        dtype: torch.float32 or torch.bfloat16, of all that is not ternary.
        backend: Which kernel multiplies; an explicit one never falls back.

    Raises:
        BackendUnavailableError: The explicit backend cannot run here.
        NonTernaryCodeError: A layer's quantizer makes other codes than -1, 0, +1.
        TypeError: `model` is another model, or `context` no integer.
        ValueError: A layer cannot be packed, no layer is ternary, the model or a part of it has
            hooks or a forward of its own, or `context` or `dtype` is wrong.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        context: int | None = None,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> None:
        _check_dtype(dtype)
        source = read_model(model, context)
        if not model.quantized_names():
            raise ValueError(
                "No layer of the model is ternary; expected at least one: use DenseLM for a "
                "full-precision model."
            )

        def make(projection: Projection) -> nn.Module:
            return _packed(projection, dtype, backend)

        def head(embedding: nn.Parameter) -> nn.Module:
            if isinstance(source.head, BitLinear) and source.head.precision == "ternary":
                return make(Projection((source.head,), source.head.norm))
            return _head(source.head, embedding if source.is_tied else None, dtype)

        super().__init__(source, make, head=head, dtype=dtype)


class DenseLM(CachedDecoder):
    """The full-precision twin of `PackedLM`: the same code with `nn.Linear` over latent weights.

    What a model computes with `precision="full"`, with a key-value cache. A comparison with
    `PackedLM` differs in the linear layers alone; stacked projections are one product in both.

    Args:
        model: `ByteLM` or `CausalLM`; nothing is shared with it.
        context: As in `PackedLM`.
        dtype: torch.float32 or torch.bfloat16, of everything.

    Raises:
        TypeError: `model` is another model, or `context` no integer.
        ValueError: The model or a part of it has hooks or a forward of its own, or `context` or
            `dtype` is wrong.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        context: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_dtype(dtype)
        source = read_model(model, context)

        def head(embedding: nn.Parameter) -> nn.Module:
            return _head(source.head, embedding if source.is_tied else None, dtype)

        super().__init__(source, lambda p: _dense(p, dtype), head=head, dtype=dtype)


class _Joined(nn.Module):
    """Layers of different kinds over one input, their outputs joined."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def _packed(projection: Projection, dtype: torch.dtype, backend: Backend) -> nn.Module:
    if projection.is_ternary:
        packed = PackedLinear.fused(projection.layers, backend=backend)
        packed.norm = None if projection.norm is None else copied_norm(projection.norm, dtype)
        return packed
    if len(projection.layers) == 1:
        return _dense(projection, dtype)
    pieces = [Projection((layer,), layer.norm) for layer in projection.layers]
    return _Joined([_packed(piece, dtype, backend) for piece in pieces])


def _dense(projection: Projection, dtype: torch.dtype) -> nn.Module:
    weight = torch.cat([layer.weight.detach() for layer in projection.layers])
    linear = _linear(weight.to(dtype), stacked_bias(projection.layers), dtype)
    if projection.norm is None:
        return linear
    return nn.Sequential(copied_norm(projection.norm, dtype), linear)


def _head(layer: BitLinear | nn.Linear, tied: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    if tied is not None:
        return _linear(tied, None, dtype)
    return _linear(layer.weight.detach().to(dtype, copy=True), layer.bias, dtype)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Returns an `nn.Linear` that has `weight` itself, and a copy of `bias`."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    is_parameter = isinstance(weight, nn.Parameter)
    linear.weight = (
        cast(nn.Parameter, weight) if is_parameter else nn.Parameter(weight, requires_grad=False)
    )
    if bias is not None:
        copied = bias.detach().to(dtype, copy=True)
        linear.bias = nn.Parameter(copied, requires_grad=False)
    return linear


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}; expected torch.bfloat16 or torch.float32.")
