"""The random state of a session: its own, and not moved by anything outside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_Snapshot = dict[str, Tensor]


class RandomState:
    """States of the torch, NumPy and Python generators that belong to one session.

    The session runs inside `active`, which swaps them in and out; two sessions in one process
    therefore do not disturb each other, and neither does a check that draws random numbers.
    """

    def __init__(self, seed: int) -> None:
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
        """Runs the block on this state; what it drew is forgotten when the block raises."""
        outside = _capture()
        _restore(self._states)
        try:
            yield
            self._states = _capture()
        finally:
            _restore(outside)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the states as tensors, by generator."""
        return {name: tensor.clone() for name, tensor in self._states.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over states written by `tensors`."""
        self._states = {name: tensors[name].clone() for name in self._states}


def _capture() -> _Snapshot:
    legacy = np.random.get_state(legacy=False)
    assert legacy["bit_generator"] == "MT19937"
    twister = legacy["state"]
    version, words, next_gauss = random.getstate()
    # Count and value: NaN for "none pending" would make equal states compare unequal.
    pending = [0.0, 0.0] if next_gauss is None else [1.0, next_gauss]
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(
            [*twister["key"].tolist(), twister["pos"], legacy["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor(legacy["gauss"], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor(pending, dtype=torch.float64),
    }


def _restore(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(keys, dtype=np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": float(states["numpy_gauss"]),
        }
    )
    version, *words = states["python"].tolist()
    has_pending, pending = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), pending if has_pending else None))
