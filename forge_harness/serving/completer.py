"""Continuous batching: sequences decode together, and join and leave between two steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from forge_harness.model.generate import Picker

from .engine import CanaryError, Step
from .inputs import Completion
from .jobs import Delivery, Job
from .package import Completer, canary_logits
from .problems import CANCELLED, DEADLINE, INTERNAL, Problem

if TYPE_CHECKING:
    from forge_harness.model import PackedLM

_JOIN_BUSY = 2
"""Sequences that may join while others decode: each prefill makes them wait."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished completion.

    Attributes:
        tokens: Added token ids.
        finish_reason: Why it ended: "length".
    """

    tokens: tuple[int, ...]
    finish_reason: str


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence being decoded."""

    job: Job
    decoder: PackedLM
    pick: Picker
    tokens: list[int]

    @property
    def left(self) -> int:
        wanted: Completion = self.job.work
        return wanted.max_tokens - len(self.tokens)


class CompletionScheduler:
    """Decodes up to `max_batch` sequences a step; each gets the tokens `generate` gives it alone.

    Args:
        served: The model.
        max_batch: Sequences that decode together; as many caches are kept.
    """

    by_cost = False

    def __init__(self, served: Completer, *, max_batch: int) -> None:
        self._served, self._max_batch = served, max_batch
        self._free = [served.model.fork() for _ in range(max_batch)]
        self._active: list[_Sequence] = []

    @property
    def busy(self) -> int:
        """Tokens still to come of the sequences that decode."""
        return sum(sequence.left for sequence in self._active)

    @property
    def room(self) -> int:
        """Sequences that may join the next step."""
        return min(len(self._free), _JOIN_BUSY) if self._active else len(self._free)

    def step(self, jobs: Sequence[Job]) -> Step:
        """One token for every sequence; the first one of those that join."""
        deliveries = self._withdraw()
        decoding = list(self._active)
        together = len(decoding) + len(jobs)
        # Before the step, which is the last one of some.
        for job in (*(sequence.job for sequence in decoding), *jobs):
            job.mates = max(job.mates, together)
        if decoding:
            deliveries += self._decode(decoding)
        for job in jobs:
            deliveries.append(self._begin(job))
        tokens = sum(len(delivery.tokens) for delivery in deliveries)
        told = [d for d in deliveries if d.is_last or d.job.on_token]
        return Step(told, together, together, tokens)

    @torch.inference_mode()
    def canary(self) -> None:
        """Infers the canary and compares every bit."""
        logits = canary_logits(self._served.model, self._served.canary)
        if logits.tobytes() != self._served.expected.tobytes():
            raise CanaryError("The logits of the canary are not those of when it was loaded.")

    def _withdraw(self) -> list[Delivery]:
        """Ends the sequences nobody waits for any more."""
        now, deliveries = time.monotonic(), []
        for sequence in list(self._active):
            job = sequence.job
            if job.is_over:
                deliveries.append(Delivery(job, problem=Problem(CANCELLED, "Nobody waits.")))
            elif job.deadline <= now:
                late = Problem(DEADLINE, "The deadline passed; ask for fewer tokens or more time.")
                deliveries.append(Delivery(job, problem=late))
            else:
                continue
            self._end(sequence)
        return deliveries

    def _decode(self, sequences: Sequence[_Sequence]) -> list[Delivery]:
        try:
            tokens = torch.tensor([sequence.tokens[-1] for sequence in sequences])
            decoders = [sequence.decoder for sequence in sequences]
            logits = self._served.model.decode_together(decoders, tokens)
        except Exception as error:
            # Whatever it was, none of the caches can be trusted.
            for sequence in sequences:
                self._end(sequence)
            return [Delivery(s.job, problem=_internal(error)) for s in sequences]
        return [self._advance(s, row) for s, row in zip(sequences, logits, strict=True)]

    def _begin(self, job: Job) -> Delivery:
        wanted: Completion = job.work
        decoder = self._free.pop()
        decoder.reset()
        pick = Picker(wanted.temperature, None, wanted.seed)
        sequence = _Sequence(job, decoder, pick, [])
        self._active.append(sequence)
        try:
            logits = decoder.prefill(torch.tensor([wanted.prompt]))[0, -1]
        except Exception as error:
            self._end(sequence)
            return Delivery(job, problem=_internal(error))
        return self._advance(sequence, logits)

    def _advance(self, sequence: _Sequence, logits: torch.Tensor) -> Delivery:
        try:
            token = sequence.pick(logits)
        except ValueError as error:
            self._end(sequence)
            return Delivery(sequence.job, problem=_internal(error))
        sequence.tokens.append(token)
        if sequence.left:
            return Delivery(sequence.job, tokens=(token,), is_last=False)
        self._end(sequence)
        result = Completed(tuple(sequence.tokens), "length")
        return Delivery(sequence.job, tokens=(token,), result=result)

    def _end(self, sequence: _Sequence) -> None:
        self._active.remove(sequence)
        self._free.append(sequence.decoder)


def _internal(error: Exception) -> Problem:
    return Problem(INTERNAL, f"The model failed on the prompt ({type(error).__name__}).")
