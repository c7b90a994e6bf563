"""Averages of the weights that are trained: whether what is evaluated and exported is one."""

from __future__ import annotations

from typing import Any

import torch

from forge_harness import oracles
from forge_harness.subject.protocols import TrainOptions

from .states import copied_parameters
from .support import roundoff, running_statistics, shown, trained_model

STEPS = 20
"""Enough for a lookahead of ten and for an average of the last quarter to begin."""
SHOWS = 1e5
"""Roundings by which a weight has to be trained for its average to move: a slow one (0.99999)
takes over that part of it in as many steps. A gain of 1 may move by less."""


def hold_averages(evidence: Any, subject: Any, task: str) -> None:
    """Holds `model` to the range of all that `trained_model` ever was, where they are two.

    An average of any kind lies between the least and the largest of what it is made of, element by
    element, the weights of the start included; one that begins at zero and is not corrected for it
    does not, and one of another model neither. And it moves; so do the statistics of its batch
    norms, which are evaluated with it.
    """
    session = subject.session(task, TrainOptions(steps=STEPS))
    if trained_model(session) is session.model:
        return
    start = copied_parameters(session.model)
    first_own, first_theirs = map(_statistics, (session.model, trained_model(session)))
    low = high = copied_parameters(trained_model(session))
    for _ in range(STEPS):
        session.step()
        now = copied_parameters(trained_model(session))
        low = {name: torch.minimum(low[name], now[name]) for name in low}
        high = {name: torch.maximum(high[name], now[name]) for name in high}
    found = copied_parameters(session.model)
    trained = [name for name in low if not torch.equal(low[name], high[name])]
    outside = [n for n in low if n not in found or not _between(low[n], found[n], high[n])]
    evidence.equal(
        "averages_outside",
        len(outside),
        expected=0,
        unit="parameters",
        reason=f"of {len(low)}; an average of weights lies between the least and the largest of "
        f"{STEPS} steps and the start, in every element: {shown(outside)}",
    )
    shows = [name for name in trained if _shows(low[name], high[name])]
    still = [n for n in shows if n in found and torch.equal(start[n], found[n])]
    evidence.equal(
        "averages_that_stay",
        len(still),
        expected=0,
        unit="parameters",
        reason=f"of {len(shows)} that are trained; averages that are those of the start after "
        f"{STEPS} steps: {shown(still)}",
    )
    own, theirs = map(_statistics, (session.model, trained_model(session)))
    moved = [n for n in theirs if n in own and not torch.equal(theirs[n], first_theirs[n])]
    stale = [name for name in moved if torch.equal(own[name], first_own[name])]
    evidence.equal(
        "statistics_that_stay",
        len(stale),
        expected=0,
        unit="tensors",
        reason=f"of {len(moved)} running statistics that training moves; those of the averaged "
        f"model that are those of the start: {shown(stale)}",
    )


def _statistics(model: Any) -> dict[str, torch.Tensor]:
    """Running means and variances; the count of batches makes no difference to what comes out."""
    found = running_statistics(model)
    return {name: t.detach().clone() for name, t in found.items() if t.is_floating_point()}


def _shows(low: torch.Tensor, high: torch.Tensor) -> bool:
    """Whether any element moved by more than fp32 rounds away in a slow average.

    What averages in less than fp32 round away is lost to them, and shows.
    """
    size = torch.maximum(low.abs(), high.abs()).double()
    return bool((high.double() - low.double() > SHOWS * oracles.UNIT_ROUNDOFF * size).any())


def _between(low: torch.Tensor, found: torch.Tensor, high: torch.Tensor) -> bool:
    if found.shape != low.shape:
        return False
    # Each step of an average rounds once or twice.
    room = 2 * STEPS * roundoff(found) * torch.maximum(low.abs(), high.abs()).double() + 1e-30
    values = found.double()
    return bool(((values >= low.double() - room) & (values <= high.double() + room)).all())
