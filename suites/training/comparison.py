"""Holds one run to another, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rerun import Outcome
from .support import differing, shown


def compare(
    evidence: Any, found: Outcome, expected: Outcome, prefix: str = "", note: str = ""
) -> None:
    """Holds steps, final state and metrics of one run to those of another.

    What else was between the two is a `note` in the reasons.
    """
    compare_run(evidence, found, expected, prefix, note)
    compare_metrics(evidence, f"{prefix}metrics", found.metrics, expected.metrics, "at the end")


def compare_run(
    evidence: Any, found: Outcome, expected: Outcome, prefix: str, note: str = ""
) -> None:
    """Holds steps and final state of one run to those of another."""
    samples = [[fact[-1] for fact in run.facts] for run in (found, expected)]
    evidence.equal(
        f"{prefix}sample_ids",
        samples[0] == samples[1],
        expected=True,
        reason="the same samples in the same order",
    )
    pairs = enumerate(zip(found.facts, expected.facts, strict=True))
    first = next((index for index, (one, two) in pairs if one != two), -1)
    evidence.equal(
        f"{prefix}first_different_step",
        first,
        expected=-1,
        unit="step",
        reason=f"losses, rates, norms and samples of every step, bit for bit; -1 is none{note}",
    )
    name = f"{prefix}different_tensors"
    compare_state(evidence, name, found.state, expected.state, "final", note)


def compare_state(
    evidence: Any,
    name: str,
    found: Mapping[str, str],
    expected: Mapping[str, str],
    when: str,
    note: str = "",
) -> None:
    """Holds one state to another, both as digests."""
    changed = differing(found, expected)
    evidence.equal(
        name,
        len(changed),
        expected=0,
        unit="tensors",
        reason=f"sha256 of the {when} state: {shown(changed)}{note}",
    )


def compare_metrics(
    evidence: Any, name: str, found: Mapping[str, float], expected: Mapping[str, float], when: str
) -> None:
    """Holds what one session says of itself to what another does."""
    evidence.equal(
        name,
        str(found),
        expected=str(expected),
        reason=f"what evaluate() says {when}, bit for bit: weights kept beside the state count too",
    )
