"""What a training pass computes in: fp32, or less where its session or its model says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forge_harness import oracles
from forge_harness.evidence import smallest

from .dropout import WithoutDropout
from .support import (
    counted,
    gradient_difference,
    independent_gradients,
    roundoff,
    trained_model,
)

PARTS = 4
"""Into which samples are cut to see what half precision makes of the same gradient."""
ROOM = 4
"""Times that. Sessions of tiny language models are off by 1.5 times at most: in autocast by 1e-3 of
the gradient, in bf16 weights by 4e-3; micro-batches weighted by samples for tokens by 3e-2."""
MOST = 16 * 2.0**-8
"""Sixteen roundings to bf16: what a loss that is no mean over samples differs by is no rounding."""


class _Coarsest(TorchDispatchMode):
    """Watches for results in less than fp32, within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.roundoff = oracles.UNIT_ROUNDOFF

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Does what is asked, and looks at what it is in."""
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.roundoff = max(self.roundoff, roundoff(value))
        return out


class _Autocast:
    """The autocast that is in force where a model is called; None outside of any."""

    def __init__(self, model: Any) -> None:
        self.device = next(model.parameters()).device.type
        self.dtype: torch.dtype | None = None
        self._handle = model.register_forward_pre_hook(self._note)

    def close(self) -> None:
        self._handle.remove()

    def _note(self, *_: Any) -> None:
        if torch.is_autocast_enabled(self.device):
            self.dtype = torch.get_autocast_dtype(self.device)


class Passes:
    """The passes of a session's steps within the block, to be made again as it makes them.

    Trainers of mixed precision put an autocast around the loss, which does not ask for one itself:
    then the passes that they are held to are made under the same.
    """

    def __init__(self, subject: Any, task: str, session: Any) -> None:
        self._subject, self._task = subject, task
        self._model = trained_model(session)
        self._seen: _Autocast | None = None

    def __enter__(self) -> Self:
        self._seen = _Autocast(self._model)
        return self

    def __exit__(self, *_: object) -> None:
        if self._seen is not None:
            self._seen.close()

    def again(self) -> AbstractContextManager[Any]:
        """Returns the context that the session put around its loss."""
        seen = self._seen
        if seen is None or seen.dtype is None or seen.dtype == self._own:
            return nullcontext()
        return torch.autocast(seen.device, dtype=seen.dtype)

    def gradients(
        self, state: Mapping[str, Tensor], ids: Sequence[int]
    ) -> tuple[float, dict[str, Tensor]]:
        """Returns loss and gradients of these samples as one batch."""
        return independent_gradients(self._subject, self._task, state, ids, self.again())

    def coarseness(
        self, state: Mapping[str, Tensor], ids: Sequence[int], whole: Mapping[str, Tensor]
    ) -> float:
        """Returns how far rounding may move the gradient of these samples, relative; 0 in fp32."""
        if self._roundoff <= oracles.UNIT_ROUNDOFF:
            return 0.0
        with WithoutDropout():
            return smallest((ROOM * self._by_parts(state, ids, whole), MOST))

    @cached_property
    def _own(self) -> torch.dtype | None:
        """The autocast under which the subject's own loss calls its model."""
        model = self._subject.build_model(self._task, seed=0).train()
        seen = _Autocast(model)
        self._one_loss(model)
        return seen.dtype

    @cached_property
    def _roundoff(self) -> float:
        model = self._subject.build_model(self._task, seed=0).train()
        with self.again(), _Coarsest() as coarsest:
            self._one_loss(model)
        return coarsest.roundoff

    @torch.no_grad()
    def _one_loss(self, model: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            batch = self._subject.example_batch(self._task, batch_size=2, seed=1)
            self._subject.loss(model, batch)

    def _by_parts(
        self, state: Mapping[str, Tensor], ids: Sequence[int], whole: Mapping[str, Tensor]
    ) -> float:
        """The difference of a gradient summed over parts of a batch to that of the whole."""
        sums: dict[str, Any] = {}
        total = 0
        for part in filter(None, (ids[start::PARTS] for start in range(PARTS))):
            targets = self._subject.batch(self._task, "train", list(part)).targets
            count = int(counted(self._subject, self._task, targets).sum())
            for name, gradient in self.gradients(state, part)[1].items() if count else ():
                sums[name] = sums.get(name, 0.0) + gradient.double() * count
            total += count
        return gradient_difference({name: g / total for name, g in sums.items()}, whole)
