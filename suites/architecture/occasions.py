"""Batches with which modules are called: some skip layers at random, or have no token for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .calls import Call, loss_of, recording
from .support import Built

MORE_BATCHES, MORE_SAMPLES = 8, 16
"""Looked at for modules that a smaller batch left out."""


def with_tokens(calls: Sequence[Call]) -> list[Call]:
    """Returns the calls that had any token: an expert may be called with none."""
    return [call for call in calls if call.output.numel()]


def other_batches(subject: Any, part: Built) -> Iterator[Built]:
    """Yields the part with further batches, larger ones."""
    for seed in range(2, 2 + MORE_BATCHES):
        batch = subject.example_batch(part.task, batch_size=MORE_SAMPLES, seed=seed)
        yield replace(part, batch=batch)


def occasions(
    subject: Any, part: Built, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[Built, int, dict[str, Call]]]:
    """Yields the part with a batch, a seed, and of each module the first call that it had with any.

    What the batch of the part leaves out is looked for with others, under other seeds.
    """
    left = dict(modules)
    for seed, now in enumerate((part, *other_batches(subject, part))):
        with recording(left) as calls:
            loss_of(subject, now.model, now.batch, seed)
        found = {name: used[0] for name in left if (used := with_tokens(calls[name]))}
        yield now, seed, found
        left = {name: module for name, module in left.items() if name not in found}
        if not left:
            break
