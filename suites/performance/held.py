"""Bytes that a model holds, wherever it holds them, and the least that its codes take."""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import Mapping
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch


class Held(NamedTuple):
    """Bytes of what can be reached from a model: of decimals, and of all else."""

    decimals: int
    others: int

    @property
    def size(self) -> int:
        """All of them."""
        return self.decimals + self.others


def held_by(model: Any, subject: Any) -> Held:
    """Returns the bytes of what can be reached from a model, each memory once.

    Args:
        model: Where to begin.
        subject: What belongs to it is not the model's.
    """
    memory: dict[int, tuple[int, bool]] = {}
    seen, held = {id(subject)}, [model]
    while held:
        value = held.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        held += _referents(value)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes(), value.is_floating_point()
        elif isinstance(value, np.ndarray) and value.base is None:
            memory[value.ctypes.data] = value.nbytes, value.dtype.kind == "f"
        elif isinstance(value, bytes | bytearray):
            memory[id(value)] = len(value), False
    decimals = sum(size for size, is_decimal in memory.values() if is_decimal)
    return Held(decimals, sum(size for size, _ in memory.values()) - decimals)


def unseen(packed: Held, full: Held, trained: torch.nn.Module, subject: Any) -> str:
    """Returns why a packed model's bytes are not all of them; empty when they may be.

    Independent codes take their entropy, in whatever format: at most log2(3) bits each. They may be
    anything but decimals, or decimals beyond those that the twin has outside of ternary layers.

    Args:
        packed: Held by the packed model.
        full: Held by its full-precision twin.
        trained: The model that both are made of.
        subject: Whose models they are.
    """
    latent, effective = subject.latent_weights(trained), subject.effective_weights(trained)
    # Layers may share their weights.
    names = {weight.data_ptr(): name for name, weight in latent.items()}.values()
    spare = packed.decimals - (full.decimals - sum(latent[name].nbytes for name in names))
    found = packed.others + (spare if spare > 0 else 0)
    least = math.ceil(sum(_entropy(effective[name]) for name in names) / 8)
    if found >= least:
        return ""
    return (
        f"the packed model shows {found} bytes that may be codes, and those of its ternary layers "
        f"take {least} at least; keep them in tensors, where they are counted"
    )


def _entropy(weight: torch.Tensor) -> float:
    """Bits of the codes of a weight, as if each was drawn by itself."""
    counts = weight.sign().long().add(1).flatten().bincount(minlength=3).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum()) * weight.numel()


def _referents(value: Any) -> list[Any]:
    """Objects that one holds; of a function, what it was made with and the caches it names."""
    if isinstance(value, SHARED):
        return []
    if isinstance(value, FunctionType):
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        made_with = (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value))
        return [*made_with, *(each for each in named if isinstance(each, CACHES))]
    forward = [type(value).forward] if isinstance(value, torch.nn.Module) else []
    base = [value.base] if isinstance(value, np.ndarray) else []
    return [*gc.get_referents(value), *forward, *base]


SHARED = (type, ModuleType, CodeType, FrameType, logging.Logger)
"""What a model does not hold for itself."""
CACHES = (torch.Tensor, np.ndarray, Mapping, list, functools._lru_cache_wrapper)
