"""In what a policy differs from the one that ships: a digest alone says only that it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forge_harness.errors import several
from forge_harness.policy import Policy, load_policy

LISTED_CHANGES = 4
"""How many stand in a sentence."""
_TEXT_LENGTH = 80


def policy_changes(policy: Policy) -> list[str]:
    """Returns a phrase for each difference from the shipped policy; none for the shipped one only.

    Values come first ("threshold gates.accuracy.at_least is 0.5, shipped 0.92"), then checks that
    are missing, weigh or apply otherwise, then what is the user's own: weights of suites by name,
    as they take from the others' share, of the rest how many there are.
    """
    shipped = load_policy()
    if policy.digest == shipped.digest:
        return []
    found: list[str] = []
    for noun, ours, theirs in (
        ("threshold", policy.thresholds, shipped.thresholds),
        ("weight of suite", policy.suite_weights, shipped.suite_weights),
        ("weight of severity", policy.severity_weights, shipped.severity_weights),
        ("unit of", policy.units, shipped.units),
    ):
        found += _values(noun, ours, theirs)
    found += [*_checks(policy, shipped), *_own(policy, shipped)]
    # The digest is over the sorted keys of all of it, so nothing else is left.
    return found or ["the checks come in another order"]


def policy_line(policy: Policy) -> str:
    """Returns the line on the policy that stands wherever a score does."""
    changes = policy_changes(policy)
    if not changes:
        return f"Policy: {policy.digest}"
    return f"Policy: {policy.digest}, not the one that ships: {listed_changes(changes)}"


def listed_changes(changes: Sequence[str]) -> str:
    """Returns the first changes, and how many more there are."""
    more = len(changes) - LISTED_CHANGES
    return "; ".join(changes[:LISTED_CHANGES]) + (f"; and {more} more" if more > 0 else "")


def _values(noun: str, ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> list[str]:
    found = []
    for name in theirs:
        if name not in ours:
            found.append(f"{noun} {name} is left out, shipped {_text(theirs[name])}")
        elif ours[name] != theirs[name]:
            found.append(f"{noun} {name} is {_text(ours[name])}, shipped {_text(theirs[name])}")
    return found


def _checks(policy: Policy, shipped: Policy) -> list[str]:
    found = []
    missing = [name for name in shipped.by_id if name not in policy.by_id]
    if missing:
        found.append(f"{several(len(missing), 'shipped check')} left out ({missing[0]} first)")
    for name, entry in shipped.by_id.items():
        if name not in policy.by_id:
            continue
        ours, theirs = policy.by_id[name].model_dump(mode="json"), entry.model_dump(mode="json")
        changed = [key for key in theirs if ours[key] != theirs[key]]
        found += [
            f"{key} of {name} is {_text(ours[key])}, shipped {_text(theirs[key])}"
            for key in changed
        ]
    return found


def _own(policy: Policy, shipped: Policy) -> list[str]:
    found = [
        f"weight of suite {_short(name)} is {weight}, not in the shipped policy"
        for name, weight in policy.suite_weights.items()
        if name not in shipped.suite_weights
    ]
    for noun, ours, theirs in (
        ("threshold", policy.thresholds, shipped.thresholds),
        ("unit", policy.units, shipped.units),
        ("check", policy.by_id, shipped.by_id),
    ):
        if own := len(ours.keys() - theirs.keys()):
            found.append(f"{several(own, noun)} of your own")
    return found


def _text(value: object) -> str:
    if isinstance(value, float):
        # Two values that differ must not read the same.
        return shown if float(shown := f"{value:g}") == value else repr(value)
    return _short(repr(value) if isinstance(value, str) else str(value))


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "\u2026"
