"""Which checks a run is about: catalogues of the user's suites, inline checks, selections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge_harness.errors import ConfigError, UsageError, unknown_choice
from forge_harness.paths import suites_dir
from forge_harness.policy import CatalogueEntry, Policy, load_policy
from forge_harness.types import Profile

INLINE_SUITE_WEIGHT = 5
"""Between a light shipped suite (4) and a middling one (8): a user's suite counts, but cannot
outweigh the shipped ones unless a catalogue.toml of its own says so."""
INLINE_COMPONENT = "user"


@dataclass(frozen=True, slots=True, order=True)
class InlineCheck:
    """A check that its marker defines: `forge_check(id, title=..., severity=...)`."""

    check: str
    title: str
    severity: str
    component: str = INLINE_COMPONENT


def catalogues_beside(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Returns the catalogue.toml files of the user's suite directories, sorted, without ours."""
    shipped = suites_dir() / "catalogue.toml"
    found = {
        candidate.resolve()
        for path in paths
        if (candidate := _directory(path) / "catalogue.toml").is_file()
    }
    return tuple(sorted(found - {shipped.resolve()}))


def _directory(path: Path) -> Path:
    return path.parent if path.is_file() else path


def build_policy(
    policy_file: Path | None = None,
    catalogues: Sequence[Path] = (),
    inline: Iterable[InlineCheck] = (),
) -> Policy:
    """Returns the policy with the user's catalogues and inline checks in it.

    Raises:
        ConfigError: A file is missing or does not fit the schema, or two checks share an id.
    """
    policy = load_policy(policy_file, extra_catalogues=tuple(catalogues))
    added = sorted({check for check in inline if check.check not in policy.by_id})
    return policy if not added else _extended(policy, added)


def _extended(policy: Policy, added: Sequence[InlineCheck]) -> Policy:
    values = policy.to_json()
    for check in added:
        suite = check.check.partition(".")[0]
        values["suite_weights"].setdefault(suite, INLINE_SUITE_WEIGHT)
        values["catalogue"].append(
            {
                "id": check.check,
                "title": check.title,
                "suite": suite,
                "severity": check.severity,
                "component": check.component,
            }
        )
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "policy"
        raise ConfigError(f"Inline check: {key}: {first['msg']}.", key=key) from error


def select(
    policy: Policy,
    profile: Profile,
    suites: Sequence[str] = (),
    checks: Sequence[str] = (),
) -> tuple[CatalogueEntry, ...]:
    """Returns the entries of a profile that a selection keeps, in catalogue order.

    Raises:
        UsageError: A suite or check has no such name, with the nearest one; or a named check is
            outside the profile.
    """
    refuse_unknown(policy, suites, checks)
    entries = policy.in_scope(profile)
    if not suites and not checks:
        return entries
    for check in checks:
        if profile not in policy.by_id[check].profiles:
            wider = " or ".join(policy.by_id[check].profiles)
            raise UsageError(
                f"Check {check!r} is not in the {profile} profile; choose the profile {wider}."
            )
    return tuple(entry for entry in entries if entry.suite in suites or entry.id in checks)


def refuse_unknown(policy: Policy, suites: Sequence[str], checks: Sequence[str]) -> None:
    """Raises for a suite or check that the policy does not have.

    Raises:
        UsageError: With the nearest name.
    """
    known_suites = {entry.suite for entry in policy.catalogue}
    for suite in suites:
        if suite not in known_suites:
            raise UsageError(unknown_choice("suite", suite, known_suites))
    for check in checks:
        if check not in policy.by_id:
            close = unknown_choice("check", check, policy.by_id).partition(" Valid: ")[0]
            raise UsageError(f"{close} `forge-harness list checks` shows all {_size(policy)}.")


def _size(policy: Policy) -> str:
    return str(len(policy.catalogue))


def inline_from(rows: Iterable[dict[str, Any]]) -> list[InlineCheck]:
    """Reads inline checks back from what another process wrote about its collection."""
    return [
        InlineCheck(row["check"], row["title"], row["severity"], row["component"])
        for row in rows
        if row.get("title") and not row.get("problem")
    ]
