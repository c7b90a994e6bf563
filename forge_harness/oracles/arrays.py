"""Turns what a check holds (NumPy arrays, torch tensors, lists) into NumPy arrays."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

ArrayLike: TypeAlias = Any
"""A NumPy array, a torch tensor on any device, or nested numbers."""
Float64: TypeAlias = NDArray[np.float64]
Int64: TypeAlias = NDArray[np.int64]
Int8: TypeAlias = NDArray[np.int8]
UInt8: TypeAlias = NDArray[np.uint8]


def float64(values: ArrayLike) -> Float64:
    """Returns `values` as float64: exact, as float64 holds every fp32, bf16 and fp16 number."""
    return np.asarray(_on_host(values), dtype=np.float64)


def int64(values: ArrayLike) -> Int64:
    """Returns integers as int64.

    Raises:
        TypeError: `values` are not integers; an oracle never rounds in silence.
    """
    array = np.asarray(_on_host(values))
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"codes have dtype {array.dtype}; expected an integer dtype: pass the codes, not the "
            "dequantized values."
        )
    return array.astype(np.int64)


def _on_host(values: ArrayLike) -> ArrayLike:
    # Duck-typed, so that the oracles import no torch. NumPy has no bf16: widen first.
    if not hasattr(values, "detach"):
        return values
    tensor = whole(values.detach()).cpu()
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def whole(tensor: ArrayLike) -> ArrayLike:
    """Returns the values of a torch tensor in a plain one.

    Of a DTensor (FSDP, tensor parallelism) all shards; of a subclass what it wraps (torchao's
    weights in training), where that is one tensor of its own shape: the values of others are made
    of several. NumPy refuses both, and plain tensors mix with neither.
    """
    if hasattr(tensor, "full_tensor"):
        return whole(tensor.full_tensor())
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return whole(inner[0]) if [part.shape for part in inner] == [tensor.shape] else tensor
