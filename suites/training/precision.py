"""What a training pass computes in: fp32, or less where its session or its model says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise, starmap
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forge_harness import oracles
from forge_harness.evidence import smallest
from forge_harness.subject.protocols import TrainOptions

from .augmented import GivenInputs, recognised
from .dropout import WithoutDropout
from .support import (
    AsBuilt,
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
    """The autocast that is in force where a model or a part of it is called; None outside of any.

    accelerate puts its own inside the model's `forward`, where the parts alone see it. Those of a
    compiled model are not watched: hooks would be compiled into it.
    """

    def __init__(self, model: Any) -> None:
        self.device = next(model.parameters()).device.type
        self.dtype: torch.dtype | None = None
        parts = list(model.modules())
        if any(hasattr(part, "_orig_mod") for part in parts):
            parts = [model]
        self._handles = [part.register_forward_pre_hook(self._note) for part in parts]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, *_: Any) -> None:
        if torch.is_autocast_enabled(self.device):
            self.dtype = torch.get_autocast_dtype(self.device)


class _FullPrecision:
    """A subject whose models are those that its full-precision sessions train."""

    def __init__(self, subject: Any, options: TrainOptions) -> None:
        self._subject = subject
        self._options = replace(options, precision="full")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def build_model(self, task: str, *, seed: int) -> Any:
        options = replace(self._options, seed=seed)
        session = self._subject.session(task, options)
        return AsBuilt(self._subject, task, session).trained_model


class Passes:
    """The passes of a session's steps within the block, to be made again as it makes them.

    Trainers of mixed precision put an autocast around the loss, which does not ask for one itself:
    then the passes that they are held to are made under the same. Samples that are drawn anew when
    they are read again are those that the session's model was given.

    Attributes:
        inputs: Those of the last step, where its samples are drawn anew.
        recognised: The share of these that show which sample they are, and of another read's.
        others: Whether a step had inputs that `batch` gives at no read of its samples.
        coupled: Whether a step was held to its own micro-batches, see `wanted`.
        problem: Why the last step cannot be made again; mostly empty.
    """

    def __init__(self, subject: Any, task: str, session: Any) -> None:
        self.inputs: Tensor | None = None
        self.recognised = (1.0, 1.0)
        self.others = False
        self.coupled = False
        self.problem = ""
        self._subject, self._task, self._session = subject, task, session
        self._model = trained_model(session)
        self._seen: _Autocast | None = None
        self._given: GivenInputs | None = None

    def __enter__(self) -> Self:
        self._seen = _Autocast(self._model)
        self._given = GivenInputs(self._model)
        return self

    def __exit__(self, *_: object) -> None:
        for watched in (self._seen, self._given):
            if watched is not None:
                watched.close()

    def step(self) -> Any:
        """Makes a step of the session, the one that the passes to come make again."""
        if self._given is None:
            return self._session.step()
        self._given.forget()
        record = self._session.step()
        self.inputs = self._given.drawn(self._subject, self._task, record.sample_ids)
        self.problem = self._given.problem
        self.others |= self._given.others
        if self.inputs is not None:
            ids = record.sample_ids
            self.recognised = recognised(self._subject, self._task, ids, self.inputs)
        return record

    @contextmanager
    def in_full_precision(self, options: TrainOptions) -> Iterator[None]:
        """Has the passes within the block made by the model that a full-precision session has."""
        subject = self._subject
        self._subject = _FullPrecision(subject, options)
        try:
            yield
        finally:
            self._subject = subject

    def again(self) -> AbstractContextManager[Any]:
        """Returns the context that the session put around its loss."""
        seen = self._seen
        if seen is None or seen.dtype is None or seen.dtype == self._own:
            return nullcontext()
        return torch.autocast(seen.device, dtype=seen.dtype)

    def gradients(
        self, state: Mapping[str, Tensor], ids: Sequence[int]
    ) -> tuple[float, dict[str, Tensor]]:
        """Returns loss and gradients of the samples of the last step as one batch."""
        return self._gradients(state, ids, range(len(ids)))

    def wanted(
        self,
        state: Mapping[str, Tensor],
        ids: Sequence[int],
        whole: tuple[float, dict[str, Tensor]],
        limit: float,
    ) -> tuple[float, dict[str, Tensor]]:
        """Returns loss and gradients that the last step should have had.

        The `whole`, those of its samples as one batch; but those of its micro-batches where the
        loss couples the samples of a batch in training mode alone, as batch normalisation and the
        balance of experts do. What is no mean over targets in evaluation mode either is wrong, and
        no coupling.
        """
        sizes = self._given.sizes if self._given is not None else []
        known = sum(sizes) == len(ids)
        if known and len(sizes) < 2:
            return whole
        ends = list(accumulate(sizes)) if known else [len(ids) // 2, len(ids)]
        parts = list(starmap(range, pairwise([0, *ends])))
        apart = self._over(state, ids, parts)
        if gradient_difference(apart[1], whole[1]) <= limit:
            return whole
        evaluated = [self._over(state, ids, p, training=False) for p in (parts, [range(len(ids))])]
        if not abs(evaluated[0][0] / evaluated[1][0] - 1.0) <= limit:
            return whole
        if not known:
            self.problem = (
                f"the loss of {self._task} couples the samples of a batch in training mode, and "
                "which samples the session's model was called with together does not show"
            )
        self.coupled |= known
        return apart

    def _gradients(
        self,
        state: Mapping[str, Tensor],
        ids: Sequence[int],
        places: Sequence[int],
        *,
        training: bool = True,
    ) -> tuple[float, dict[str, Tensor]]:
        inputs = None if self.inputs is None else self.inputs[list(places)]
        chosen = [ids[place] for place in places]
        return independent_gradients(
            *(self._subject, self._task, state, chosen, self.again(), inputs), training=training
        )

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
        parts = [range(start, len(ids), PARTS) for start in range(PARTS)]
        return gradient_difference(self._over(state, ids, parts)[1], whole)

    def _over(
        self,
        state: Mapping[str, Tensor],
        ids: Sequence[int],
        parts: Sequence[Sequence[int]],
        *,
        training: bool = True,
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of parts of a batch, each pass by itself, over all their targets."""
        sums: dict[str, Any] = {}
        total, loss = 0, 0.0
        for places in filter(None, parts):
            part = [ids[place] for place in places]
            targets = self._subject.batch(self._task, "train", part).targets
            count = int(counted(self._subject, self._task, targets).sum())
            if not count:
                continue
            value, gradients = self._gradients(state, ids, places, training=training)
            for name, gradient in gradients.items():
                sums[name] = sums.get(name, 0.0) + gradient.double() * count
            loss += value * count
            total += count
        return loss / total, {name: g / total for name, g in sums.items()}
