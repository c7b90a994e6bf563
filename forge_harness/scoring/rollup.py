"""Items -> check: the evidence rules, the roll-up by severity, and waivers.

Credits are a pair (low, high): what is proved, and what it could be at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from forge_harness.evidence import Evidence
from forge_harness.policy import CatalogueEntry
from forge_harness.record import EvidenceRecord, ItemRecord, Waiver
from forge_harness.types import Level, Outcome, Severity

SEVERE = frozenset({Severity.CRITICAL, Severity.HIGH})
"""Severities that block, and whose checks are as good as their worst item."""

_ZERO, _HALF, _ONE = Fraction(0), Fraction(1, 2), Fraction(1)

CREDITS: dict[Outcome, tuple[Fraction, Fraction]] = {
    Outcome.PASS: (_ONE, _ONE),
    Outcome.WARN: (_HALF, _HALF),
    Outcome.FLAKY: (_HALF, _HALF),
    Outcome.FAIL: (_ZERO, _ZERO),
    Outcome.ERROR: (_ZERO, _ZERO),
    Outcome.XFAIL: (_ZERO, _ZERO),
    Outcome.XPASS: (_ZERO, _ZERO),
    Outcome.NOT_MEASURED: (_ZERO, _ONE),
    Outcome.NOT_APPLICABLE: (_ZERO, _ZERO),
}
"""Outcome -> (low, high); a check that is not applicable leaves the denominator instead."""

_RANK = {
    Outcome.PASS: 0,
    Outcome.WARN: 1,
    Outcome.FLAKY: 2,
    Outcome.NOT_MEASURED: 3,
    Outcome.ERROR: 4,
    Outcome.FAIL: 5,
}
"""Which outcome a check shows when its items differ: the one with the highest rank."""

_ALSO = re.compile(r" \(also [a-z_]+\)$")
"""What is added to the node id of an item's other results; pytest's own end with no such words."""

NOT_RUN = "no test of this check ran"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledUp:
    """One check after roll-up and waivers."""

    outcome: Outcome
    reason: str
    low: Fraction
    high: Fraction
    items: tuple[ItemRecord, ...]
    """Settled items, by node id."""


def missed_limit(evidence: EvidenceRecord) -> str | None:
    """Returns the sentence of a missed limit, or None when the evidence satisfies it."""
    fields = evidence.model_dump(exclude={"item"})
    judged = Evidence(**fields)
    return None if judged.ok() else judged.sentence()


def settle(item: ItemRecord, severity: Severity, *, ruled_out: bool = False) -> ItemRecord:
    """Applies the evidence rules to one item; settling twice changes nothing.

    A recorded outcome is only ever made worse: a missed limit fails (or warns, where the
    evidence says so and the severity allows it), a pass without evidence is not measured, a
    pass after a retry is flaky, and only the catalogue's predicate rules a check out.

    Args:
        item: The item as pytest reported it.
        severity: Severity of its check.
        ruled_out: Whether the catalogue's predicate rules the check out.
    """
    outcome, reason = _reported(item, severity, ruled_out)
    for evidence in item.evidence:
        sentence = missed_limit(evidence)
        if sentence is None or outcome is Outcome.NOT_APPLICABLE:
            continue
        warns = evidence.level == Level.WARN.value and severity not in SEVERE
        judged = Outcome.WARN if warns else Outcome.FAIL
        if _RANK[judged] > _RANK[outcome]:
            outcome, reason = judged, sentence
    own = [
        e if e.item == item.nodeid else e.model_copy(update={"item": item.nodeid})
        for e in item.evidence
    ]
    return item.model_copy(update={"outcome": outcome, "reason": reason, "evidence": own})


def _reported(item: ItemRecord, severity: Severity, ruled_out: bool) -> tuple[Outcome, str]:
    outcome, reason = item.outcome, item.reason
    if outcome is Outcome.NOT_APPLICABLE and not ruled_out:
        return Outcome.NOT_MEASURED, reason or (
            "declared itself not applicable, which only a predicate in the catalogue can"
        )
    if outcome in (Outcome.XFAIL, Outcome.XPASS):
        return Outcome.FAIL, reason or "expected to fail by its own marker; only a waiver excuses"
    if outcome in (Outcome.PASS, Outcome.WARN, Outcome.FLAKY) and not item.evidence:
        return Outcome.NOT_MEASURED, "passed without recording evidence"
    if outcome is Outcome.WARN and severity in SEVERE:
        return Outcome.FAIL, reason or f"a warning fails a {severity} check"
    if outcome is Outcome.PASS and item.attempts > 1:
        return Outcome.FLAKY, reason or f"passed at attempt {item.attempts}"
    return outcome, reason


def roll_up(
    entry: CatalogueEntry,
    items: Sequence[ItemRecord],
    *,
    ruled_out: str | None,
    waivers: Sequence[Waiver] = (),
    today: str,
) -> RolledUp:
    """Rolls the items of one check up to its outcome and credits.

    Args:
        entry: The catalogue entry.
        items: The items of this check, in any order.
        ruled_out: Why the catalogue's predicate rules the check out, or None.
        waivers: Waivers of this check.
        today: ISO date that decides whether a waiver is live; its last day counts.
    """
    settled = tuple(
        unique(settle(item, entry.severity, ruled_out=ruled_out is not None) for item in items)
    )
    if ruled_out is not None:
        return _rolled(Outcome.NOT_APPLICABLE, ruled_out, settled)
    if not settled:
        return _waived(_rolled(Outcome.NOT_MEASURED, NOT_RUN, settled), waivers, today)
    worst = max(settled, key=lambda item: _RANK[item.outcome])
    lows, highs = zip(*_credits(settled), strict=True)
    low, high = (
        (min(lows), min(highs))
        if entry.severity in SEVERE
        else (sum(lows) / Fraction(len(lows)), sum(highs) / Fraction(len(highs)))
    )
    rolled = RolledUp(
        outcome=worst.outcome,
        reason=_reason(worst, settled),
        low=low,
        high=high,
        items=settled,
    )
    return _waived(rolled, waivers, today)


def _credits(items: Sequence[ItemRecord]) -> list[tuple[Fraction, Fraction]]:
    """Returns the credits of each item, of several results of one the smaller ends."""
    ends: dict[str, tuple[Fraction, Fraction]] = {}
    for item in items:
        nodeid = _ran(item)
        low, high = CREDITS[item.outcome]
        other = ends.get(nodeid, (low, high))
        ends[nodeid] = (min(low, other[0]), min(high, other[1]))
    return list(ends.values())


def _reason(worst: ItemRecord, items: Sequence[ItemRecord]) -> str:
    same = sum(item.outcome is worst.outcome for item in items)
    reason = worst.reason
    if worst.outcome is not Outcome.PASS and same > 1:
        reason += f" (and {same - 1} more like it of {len(items)} items)"
    for item in items:
        if item is not worst and _ran(item) == _ran(worst):
            reason += f" (also {item.outcome}: {item.reason})"
    return reason


def unique(items: Iterable[ItemRecord]) -> list[ItemRecord]:
    """Returns the items by node id; several results of one (shards that overlap) the worst first.

    A failure stands for all of them. One that was not measured does not: it says nothing of what
    another run saw, so that each other outcome but a pass is kept beside it, named "(also flaky)".
    Ties are broken by the records' text, so that the order of shards has no influence.
    """
    results: dict[str, dict[Outcome, ItemRecord]] = {}
    for item in items:
        kept = results.setdefault(_ran(item), {})
        plain = _named(item, _ran(item))
        other = kept.get(item.outcome)
        if other is None or plain.model_dump_json() > other.model_dump_json():
            kept[item.outcome] = plain
    return [item for nodeid in sorted(results) for item in _worst_first(results[nodeid])]


def _worst_first(results: Mapping[Outcome, ItemRecord]) -> list[ItemRecord]:
    worst, *others = sorted(results.values(), key=_badness, reverse=True)
    if not CREDITS[worst.outcome][1]:
        return [worst]
    return [worst] + [
        _named(item, f"{item.nodeid} (also {item.outcome})")
        for item in others
        if item.outcome is not Outcome.PASS
    ]


def _badness(item: ItemRecord) -> tuple[int, str]:
    return _RANK.get(item.outcome, 3), item.outcome


def _ran(item: ItemRecord) -> str:
    """Returns the node id pytest knows an item by."""
    return _ALSO.sub("", item.nodeid)


def _named(item: ItemRecord, nodeid: str) -> ItemRecord:
    if item.nodeid == nodeid:
        return item
    own = [evidence.model_copy(update={"item": nodeid}) for evidence in item.evidence]
    return item.model_copy(update={"nodeid": nodeid, "evidence": own})


def _rolled(outcome: Outcome, reason: str, items: tuple[ItemRecord, ...]) -> RolledUp:
    low, high = CREDITS[outcome]
    return RolledUp(outcome=outcome, reason=reason, low=low, high=high, items=items)


def _waived(rolled: RolledUp, waivers: Sequence[Waiver], today: str) -> RolledUp:
    if not waivers:
        return rolled
    waiver = max(waivers, key=lambda w: (w.expires, w.owner, w.issue, w.reason))
    if rolled.outcome is Outcome.NOT_MEASURED:
        # A waived check earns nothing when measured; not measuring it must not earn more.
        return RolledUp(
            outcome=rolled.outcome,
            reason=rolled.reason,
            low=_ZERO,
            high=rolled.high,
            items=rolled.items,
        )
    outcome, reason = _under_waiver(rolled, waiver, live=waiver.expires >= today)
    return _rolled(outcome, reason, rolled.items)


def _under_waiver(rolled: RolledUp, waiver: Waiver, *, live: bool) -> tuple[Outcome, str]:
    ledger = f"{waiver.owner}, {waiver.issue}"
    if rolled.outcome is Outcome.PASS:
        return Outcome.XPASS, f"passes although a waiver ({ledger}) excuses it; remove the waiver"
    why = f": {rolled.reason}" if rolled.reason else ""
    if live:
        return Outcome.XFAIL, f"waived until {waiver.expires} ({ledger}: {waiver.reason}){why}"
    return Outcome.FAIL, f"its waiver expired on {waiver.expires} ({ledger}){why}"
