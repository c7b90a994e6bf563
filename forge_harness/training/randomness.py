"""The random state of a session: its own, and not moved by anything outside it."""

from __future__ import annotations

import math
import os
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_generators = threading.RLock()
"""Who holds it has the generators of the process to itself."""


def _renew_lock() -> None:
    global _generators
    _generators = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows has none.
    # A child of fork has no thread that would let go of what another thread held.
    os.register_at_fork(after_in_child=_renew_lock)


class RandomState:
    """States of the torch, NumPy and Python generators that belong to one session.

    The session runs inside `active`, which swaps them in and out, one thread at a time; two
    sessions in one process therefore do not disturb each other, and neither does a check that
    draws random numbers between two of their steps.
    """

    def __init__(self, seed: int) -> None:
        with _generators:
            outside = _capture()
            try:
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                self._states = _capture()
            finally:
                _restore(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Runs the block on this state; what it drew is forgotten when the block raises.

        A block must not wait for another thread that runs one: there is one set of generators.
        """
        with _generators:
            outside = _capture()
            _restore(self._states)
            try:
                yield
                self._states = _capture()
            finally:
                _restore(outside)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the states as tensors, by generator."""
        legacy = self._states.numpy
        twister = legacy["state"]
        version, words, gauss = self._states.python
        return {
            "torch": self._states.torch.clone(),
            "numpy": torch.tensor(
                [*twister["key"].tolist(), twister["pos"], legacy["has_gauss"]], dtype=torch.int64
            ),
            "numpy_gauss": torch.tensor(legacy["gauss"], dtype=torch.float64),
            "python": torch.tensor([version, *words], dtype=torch.int64),
            # NaN stands for "none pending"; the generator itself never gives NaN.
            "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over states written by `tensors`."""
        *keys, position, has_gauss = tensors["numpy"].tolist()
        version, *words = tensors["python"].tolist()
        pending = float(tensors["python_gauss"])
        self._states = _States(
            torch=tensors["torch"].clone(),
            numpy={
                "bit_generator": "MT19937",
                "state": {"key": np.array(keys, dtype=np.uint32), "pos": position},
                "has_gauss": has_gauss,
                "gauss": float(tensors["numpy_gauss"]),
            },
            python=(version, tuple(words), None if math.isnan(pending) else pending),
        )


@dataclass(frozen=True, slots=True)
class _States:
    """As the generators give them: converting to tensors at every step would cost 0.3 ms."""

    torch: Tensor
    numpy: dict[str, Any]
    python: tuple[Any, ...]


def _capture() -> _States:
    return _States(torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())


def _restore(states: _States) -> None:
    torch.set_rng_state(states.torch)
    np.random.set_state(states.numpy)
    random.setstate(states.python)
