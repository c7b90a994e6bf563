"""In what a policy differs from the one that ships: a digest alone says only that it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_harness.policy import Policy, load_policy

_LISTED = 4


def policy_changes(policy: Policy) -> list[str]:
    """Returns a phrase for each difference from the shipped policy; none for the shipped one.

    Values come first ("threshold gates.accuracy.at_least is 0.5, shipped 0.92"), then checks that
    are missing, weigh or apply otherwise, then how many are the user's own: what is only added
    judges nothing more mildly.
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
    return found + _checks(policy, shipped)


def policy_line(policy: Policy) -> str:
    """Returns the line on the policy that stands wherever a score does."""
    changes = policy_changes(policy)
    if not changes:
        return f"Policy: {policy.digest}"
    return f"Policy: {policy.digest}, not the one that ships: {_listed(changes)}"


def _listed(changes: list[str]) -> str:
    more = len(changes) - _LISTED
    return "; ".join(changes[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _values(noun: str, ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> list[str]:
    found = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours:
            found.append(f"{noun} {name} is left out, shipped {_text(theirs[name])}")
        elif name in theirs and ours[name] != theirs[name]:
            found.append(f"{noun} {name} is {_text(ours[name])}, shipped {_text(theirs[name])}")
    return found


def _checks(policy: Policy, shipped: Policy) -> list[str]:
    found = []
    missing = [name for name in shipped.by_id if name not in policy.by_id]
    if missing:
        found.append(f"{_count(len(missing), 'shipped check')} left out ({missing[0]} first)")
    for name, entry in shipped.by_id.items():
        if name not in policy.by_id:
            continue
        ours, theirs = policy.by_id[name].model_dump(mode="json"), entry.model_dump(mode="json")
        changed = [key for key in theirs if ours[key] != theirs[key]]
        found += [
            f"{key} of {name} is {_text(ours[key])}, shipped {_text(theirs[key])}"
            for key in changed
        ]
    own = sum(name not in shipped.by_id for name in policy.by_id)
    if own:
        found.append(f"{_count(own, 'check')} of your own")
    return found


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
