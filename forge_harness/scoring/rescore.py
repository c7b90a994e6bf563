"""Scores a stored run under another policy, as far as its evidence answers.

Evidence carries the limit it was judged by. Of the thresholds only those of the gates are known to
be read by one value each (`gates.NAME.DIRECTION` by the evidence NAME of check `gates.NAME`): such
a value is judged again. Everything else that was judged stays judged by the limits of the run, and
the notes say so. Where the record does not answer, the worse outcome stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forge_harness.errors import ConfigError
from forge_harness.policy import CatalogueEntry, Policy
from forge_harness.record import EvidenceRecord, ItemRecord, RunRecord
from forge_harness.scoring.assembly import assemble, context_of, entries_in_scope, items_of
from forge_harness.scoring.limits import Limit, changed_limits, notes_on_limits
from forge_harness.scoring.rollup import SEVERE, missed_limit, unique
from forge_harness.types import Outcome

_GREEN = (Outcome.PASS, Outcome.WARN, Outcome.FLAKY)
_CUT = "…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """A run under another policy."""

    record: RunRecord
    notes: tuple[str, ...]
    """A sentence for each thing the new policy asks and the record does not answer, and for each
    value that was judged again."""


def rescore(
    record: RunRecord,
    old_policy: Policy,
    new_policy: Policy,
    reported: Iterable[ItemRecord] = (),
) -> Rescored:
    """Returns what the items and evidence of a run give under another policy.

    Weights, severities, predicates, scope and verdict follow the new policy. A check it does not
    have is left out, one it has in another version or alone is not measured. Under its own policy
    a run is rescored to itself.

    Args:
        record: A run that verifies.
        old_policy: The one it was scored with.
        new_policy: The other one.
        reported: The items as pytest reported them (items.jsonl). They tell an item that a missed
            limit failed from one that also failed otherwise; without them both stay failed.

    Raises:
        ConfigError: The run was not scored with `old_policy`.
    """
    if record.policy_digest != old_policy.digest:
        raise ConfigError(
            f"Run {record.run_id} was scored under policy {record.policy_digest}, not under "
            f"{old_policy.digest}; give the policy.json beside its run.json."
        )
    entries = {entry.id: entry for entry in entries_in_scope(new_policy, record.scope)}
    limits = changed_limits(old_policy, new_policy)
    placed = {check.id for check in record.checks}
    told = {item.nodeid: item for item in unique(reported)}
    # An item that had no place under the run's own policy goes on blocking.
    kept = (item for item in items_of(record) if item.check in entries or item.check not in placed)
    items = [
        _carried(
            item,
            told.get(item.nodeid),
            old=old_policy.by_id.get(item.check),
            new=entries.get(item.check),
            limits=limits,
        )
        for item in kept
    ]
    again = assemble(
        new_policy,
        items,
        waivers=record.waivers,
        scope=record.scope,
        context=context_of(record),
        state=record.state,
        state_reason=record.state_reason,
    )
    again = _with_commands_of(record, again)
    notes = (
        *_notes_on_checks(record, old_policy, entries),
        *notes_on_limits(record, again, old_policy, new_policy, limits),
    )
    return Rescored(record=again, notes=notes)


def _with_commands_of(record: RunRecord, again: RunRecord) -> RunRecord:
    """Keeps the commands that made the run; releases differ in how they write them."""
    kept = {check.id: check.command for check in record.checks}
    checks = [
        check.model_copy(update={"command": kept.get(check.id, check.command)})
        for check in again.checks
    ]
    return again.model_copy(update={"checks": checks})


def _carried(
    item: ItemRecord,
    told: ItemRecord | None,
    *,
    old: CatalogueEntry | None,
    new: CatalogueEntry | None,
    limits: Sequence[Limit],
) -> ItemRecord:
    """Returns an item as the new policy may take it; `told` is what pytest said of it."""
    if new is None or new.measures_suite:  # in no check's place; or computed again by `assemble`
        return item
    if old is None:
        why = "the policy of the run did not have this check"
        return _not_measured(item, why) if item.outcome in _GREEN else item
    if old.version != new.version:
        why = f"measured as version {old.version} of the check, the policy has {new.version}"
        return _not_measured(item, why)
    own = [limit for limit in limits if limit.check == item.check]
    if refusal := next(filter(None, (_unjudgeable(item, limit) for limit in own)), None):
        return _not_measured(item, refusal) if item.outcome in _GREEN else item
    judged = item
    for limit in own:
        judged = _judged_again(judged, limit)
    milder = old.severity in SEVERE and new.severity not in SEVERE
    if told is None or (judged.evidence == item.evidence and not milder):
        return judged
    # What it was before its limits were held against it: `assemble` holds those it has now.
    before = (Outcome.PASS, "") if _is_explained(told) else (told.outcome, told.reason)
    return judged.model_copy(update={"outcome": before[0], "reason": before[1]})


def _not_measured(item: ItemRecord, why: str) -> ItemRecord:
    gone = {"outcome": Outcome.NOT_MEASURED, "reason": why, "evidence": []}
    return item.model_copy(update=gone)


def _is_explained(told: ItemRecord) -> bool:
    """Whether a missed limit, and nothing else that was reported, decided an item."""
    if told.outcome not in (Outcome.FAIL, Outcome.WARN):
        return False
    sentences = map(missed_limit, told.evidence)
    return any(_says(told.reason, sentence) for sentence in sentences if sentence)


def _says(reason: str, sentence: str) -> bool:
    """Whether a reason is this sentence, or its first line as it was cut to be shown."""
    line = sentence.strip().partition("\n")[0]
    if reason.endswith(_CUT):
        return line.startswith(reason.removesuffix(_CUT))
    return reason in (sentence, line)


def _unjudgeable(item: ItemRecord, limit: Limit) -> str:
    """Returns why an item says nothing about a new limit, or nothing."""
    units = {evidence.unit for evidence in item.evidence if evidence.name == limit.gate}
    if not units and limit.is_stricter:
        return f"it has no value of {limit.gate} for the stricter limit; run again"
    other = sorted(units - {limit.new_unit})
    if limit.new is None or not limit.unit_changed or not other:
        return ""
    return f"{limit.gate} is in {other[0]!r}, its new limit in {limit.new_unit!r}; run again"


def _judged_again(item: ItemRecord, limit: Limit) -> ItemRecord:
    if limit.new is None:  # the check would not know what to hold its value against
        return item
    held = [_held(e, limit) if e.name == limit.gate else e for e in item.evidence]
    return item.model_copy(update={"evidence": held})


def _held(evidence: EvidenceRecord, limit: Limit) -> EvidenceRecord:
    """Returns the value of a gate with the limit it is to be held against."""
    judged = evidence.model_copy(update={"direction": limit.direction, "limit": limit.new})
    if evidence.direction == limit.direction and evidence.limit == limit.old:
        return judged
    # Its check held it against something else, and goes on to; the policy's limit comes on top,
    # unless the value missed the old one too, and the check did not mind.
    before = evidence.model_copy(update={"direction": limit.direction, "limit": limit.old})
    minded = limit.old is None or missed_limit(before) is None
    return judged if minded and missed_limit(judged) else evidence


def _notes_on_checks(
    record: RunRecord, old_policy: Policy, entries: dict[str, CatalogueEntry]
) -> list[str]:
    had = {check.id: old_policy.by_id[check.id] for check in record.checks}
    gone = [name for name in had if name not in entries]
    new = [name for name in entries if name not in had]
    other = [
        f"{name} (version {had[name].version} -> {entry.version})"
        for name, entry in entries.items()
        if name in had and not entry.measures_suite and had[name].version != entry.version
    ]
    said = (
        ("Left out, the new policy does not have them in scope", gone),
        ("Not measured, the run did not have them in scope", new),
        ("Not measured, their evidence has another meaning now", other),
    )
    return [f"{what}: {', '.join(names)}." for what, names in said if names]
