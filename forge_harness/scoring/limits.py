"""Which limits differ between two policies, and what is known of who reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forge_harness.policy import Policy
from forge_harness.record import EvidenceRecord, RunRecord
from forge_harness.scoring.derived import PREFIX
from forge_harness.types import Direction

_GATES = "gates"
_SIDES = (Direction.AT_LEAST.value, Direction.AT_MOST.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A gate's threshold that is not the same in both policies."""

    gate: str
    """Name of the gate, and of the evidence that is held against it."""
    direction: str
    old: float | None
    new: float | None
    """None where the policy has no such threshold."""
    old_unit: str | None
    new_unit: str | None

    @property
    def check(self) -> str:
        """Id of the check that reads it."""
        return f"{_GATES}.{self.gate}"

    @property
    def unit_changed(self) -> bool:
        """Whether values of the old unit cannot be held against the new limit."""
        return self.old_unit != self.new_unit

    @property
    def is_stricter(self) -> bool:
        """Whether a value that satisfied the old limit may miss the new one."""
        if self.new is None or self.old is None:
            return self.old is None
        at_least = self.direction == Direction.AT_LEAST
        return self.new > self.old if at_least else self.new < self.old

    def sentence(self) -> str:
        """Returns "gates.accuracy.at_least 0.85 -> 0.9"."""
        units = f" ({self.old_unit} -> {self.new_unit})" if self.unit_changed else ""
        return _change(f"{self.check}.{self.direction}", self.old, self.new) + units


def changed_limits(old: Policy, new: Policy) -> tuple[Limit, ...]:
    """Returns the thresholds of gates that differ in limit or unit, by name.

    Without those of computed checks, which are computed again.
    """
    found = []
    for name in sorted({*old.thresholds, *new.thresholds}):
        check, _, direction = name.rpartition(".")
        suite, _, gate = check.partition(".")
        if suite != _GATES or direction not in _SIDES or _is_computed(check, new):
            continue
        limit = Limit(
            gate=gate,
            direction=direction,
            old=old.thresholds.get(name),
            new=new.thresholds.get(name),
            old_unit=old.units.get(check),
            new_unit=new.units.get(check),
        )
        if limit.old != limit.new or limit.unit_changed:
            found.append(limit)
    return tuple(found)


def _is_computed(check: str, policy: Policy) -> bool:
    entry = policy.by_id.get(check)
    return entry is not None and entry.measures_suite is not None


def notes_on_limits(
    record: RunRecord, again: RunRecord, old: Policy, new: Policy, limits: Sequence[Limit]
) -> list[str]:
    """Returns what became of each limit that changed, one sentence each.

    Args:
        record: The run as it was.
        again: The run under the new policy.
        old: Policy of the run.
        new: The other policy.
        limits: What `changed_limits` gives for the two.
    """
    notes = [_on_gate(record, again, limit) for limit in limits]
    notes += [note for limit in limits for note in _on_other_readers(record, limit)]
    kept: list[str] = []
    computed: list[str] = []
    gates = {f"{limit.check}.{limit.direction}" for limit in limits}
    for name, change in _changes(old, new):
        check = name.rpartition(".")[0]
        if _is_computed(check, new):
            computed += [change] if any(c.id == check for c in again.checks) else []
        elif name not in gates:
            kept.append(change)
    if computed:
        notes.append(f"Computed again from the checks of the run: {'; '.join(computed)}.")
    if kept:
        notes.append(
            f"Judged by the limits of the run: {'; '.join(kept)}; run again to judge by the new "
            "ones."
        )
    unread = sorted(_unread_suites(new) - _unread_suites(old))
    if unread:
        notes.append(f"No check of the new policy is in suite {', '.join(unread)}.")
    return notes


def _on_gate(record: RunRecord, again: RunRecord, limit: Limit) -> str:
    before = next((c.outcome for c in record.checks if c.id == limit.check), None)
    after = next((c.outcome for c in again.checks if c.id == limit.check), None)
    what = limit.sentence()
    if before is None or after is None:
        return f"{what}: {limit.check} is not part of the run."
    if limit.new is None:
        return f"{what}: judged by the limit of the run."
    moved = f"{before} -> {after}" if before is not after else f"still {after}"
    if not any(_is_value(check, evidence, limit) for check, evidence in _evidence(record)):
        return f"{what}: the run has no value of {limit.gate}, {moved}."
    return f"{what}: judged again, {moved}."


def _on_other_readers(record: RunRecord, limit: Limit) -> Iterator[str]:
    """Yields a sentence where other evidence has the old limit, and may have read it too."""
    if limit.old is None:
        return
    same = [
        f"{check} {evidence.name}"
        for check, evidence in _evidence(record)
        if evidence.direction == limit.direction
        and evidence.limit == limit.old
        and not _is_value(check, evidence, limit)
    ]
    if same:
        yield (
            f"Judged by the limit of the run, which may be that of {limit.check}: "
            f"{', '.join(dict.fromkeys(same))}; run again to judge by the new one."
        )


def _evidence(record: RunRecord) -> Iterator[tuple[str, EvidenceRecord]]:
    """Yields (check, evidence) of what tests measured; what is computed is computed again."""
    for check in record.checks:
        for evidence in check.evidence:
            if not evidence.item.startswith(PREFIX):
                yield check.id, evidence


def _is_value(check: str, evidence: EvidenceRecord, limit: Limit) -> bool:
    return check == limit.check and evidence.name == limit.gate


def _changes(old: Policy, new: Policy) -> Iterator[tuple[str, str]]:
    """Yields (name, "name 1 -> 2") of all thresholds and units that differ."""
    for name in sorted({*old.thresholds, *new.thresholds}):
        before, after = old.thresholds.get(name), new.thresholds.get(name)
        if before != after:
            yield name, _change(name, before, after)
    for stem in sorted({*old.units, *new.units}):
        units = old.units.get(stem), new.units.get(stem)
        is_gate = any(f"{stem}.{side}" in new.thresholds for side in _SIDES)
        if units[0] != units[1] and not (stem.startswith(f"{_GATES}.") and is_gate):
            yield stem, f"unit of {stem} {units[0] or 'none'} -> {units[1] or 'none'}"


def _change(name: str, before: float | None, after: float | None) -> str:
    words = ("none" if limit is None else f"{limit:.9g}" for limit in (before, after))
    return f"{name} {' -> '.join(words)}"


def _unread_suites(policy: Policy) -> set[str]:
    return set(policy.suite_weights) - {entry.suite for entry in policy.catalogue}
