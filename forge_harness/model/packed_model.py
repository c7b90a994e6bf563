"""Any model with its ternary layers packed, and what a model keeps in memory."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from forge_harness.kernels import Backend

from .bitlinear import BitLinear
from .packed_linear import PackedLinear

Model = TypeVar("Model", bound=nn.Module)


def pack_model(model: Model, *, backend: Backend = "auto") -> Model:
    """Returns a copy of a model for inference, every ternary `BitLinear` replaced.

    Layers keep their names and are not fused. Latent weights are never copied, so the peak is the
    model and its packed copy. Outputs have the bits of the model's own, where its layers compute
    "exact" or "int8"; with "fake" they differ by `bounds.FAKE_QUANT_RTOL_L1`.

    Args:
        model: Left as it is. A `BitLinear` itself gives a `PackedLinear`.
        backend: Which kernel multiplies; an explicit one never falls back.

    Returns:
        The copy, in evaluation mode and without gradients.

    Raises:
        BackendUnavailableError: The explicit backend cannot run here.
        NonTernaryCodeError: A layer's quantizer makes other codes than -1, 0, +1.
        ValueError: A layer cannot be packed; the message names it.
    """
    # deepcopy takes what the memo holds for an object instead of copying it.
    replaced: dict[int, object] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear) and layer.precision == "ternary":
            try:
                replaced[id(layer)] = PackedLinear.from_bitlinear(layer, backend=backend)
            except ValueError as error:
                error.args = (f"Layer {name!r}: {error}",)
                raise
    packed = copy.deepcopy(model, replaced)
    return packed.eval().requires_grad_(False)


def resident_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's parameters and buffers, shared memory counted once.

    A storage counts whole, whatever part of it a tensor shows. Codes that a quantizer of an
    unpacked layer holds are no buffers and not counted, nor is a `CachedDecoder`'s cache.
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
