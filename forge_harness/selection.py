"""Which checks a run is about: catalogues of the user's suites, inline checks, selections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from forge_harness.canonical import json_fault, read_canonical
from forge_harness.errors import ConfigError, UsageError, unknown_choice
from forge_harness.paths import resolved_path, suites_dir
from forge_harness.policy import (
    CatalogueEntry,
    Policy,
    described,
    load_policy,
    read_toml,
    refuse_tolerances,
    rows_of,
)
from forge_harness.protocols import CAPABILITIES
from forge_harness.types import Profile

USER_SUITE_WEIGHT = 5
"""Of a suite of the user's, unless its catalogue.toml has [suite_weights]. Between a light shipped
suite (4) and a middling one (8): it counts, but cannot outweigh the shipped ones by accident."""
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
        resolved_path(candidate)
        for path in paths
        if (candidate := _directory(path) / "catalogue.toml").is_file()
    }
    return tuple(sorted(found - {resolved_path(shipped)}))


def _directory(path: Path) -> Path:
    return path.parent if path.is_file() else path


def build_policy(
    policy_file: Path | None = None,
    catalogues: Sequence[Path] = (),
    inline: Iterable[InlineCheck] = (),
) -> Policy:
    """Returns the policy with the user's catalogues and inline checks in it.

    Args:
        policy_file: TOML laid over the shipped policy; or the policy.json of a run directory,
            which is whole and takes the shipped one's place.
        catalogues: catalogue.toml files; what the policy has already they may only repeat.
        inline: Checks that markers define.

    Raises:
        ConfigError: A file is missing or does not fit the schema, or two checks share an id.
    """
    if policy_file is not None and policy_file.suffix == ".json":
        policy = _read_whole(policy_file)
        refuse_tolerances(str(policy_file), policy)
    else:
        policy = load_policy(policy_file)
    return with_inline(with_catalogues(policy, catalogues), inline)


def with_catalogues(policy: Policy, files: Sequence[Path]) -> Policy:
    """Returns the policy with the entries of catalogue files it does not have yet.

    Raises:
        ConfigError: A file is missing or does not fit the schema, two checks share an id, a file
            says of a check or shipped suite something else than the policy does, or two files of
            a suite.
    """
    rows: list[dict[str, Any]] = []
    weights: dict[str, tuple[int, Path]] = {}
    for file in files:
        entries, stated = _read_catalogue(file)
        _refuse_contradictions(policy, file, entries, stated)
        rows += [row for row in entries if row["id"] not in policy.by_id]
        for suite, weight in stated.items():
            _refuse_another_weight(file, suite, weight, weights.get(suite))
            weights[suite] = (weight, file)
    own = {suite: weight for suite, (weight, _) in weights.items()}
    return _extended(policy, rows, own, "Catalogue") if rows or own else policy


def _refuse_another_weight(
    file: Path, suite: str, weight: int, earlier: tuple[int, Path] | None
) -> None:
    if earlier is not None and earlier[0] != weight:
        raise ConfigError(
            f"{file}: suite {suite!r} weighs {weight}, and {earlier[0]} in {earlier[1]}; state one "
            "weight.",
            key=f"suite_weights.{suite}",
        )


def _refuse_contradictions(
    policy: Policy, file: Path, rows: Sequence[Mapping[str, Any]], weights: Mapping[str, object]
) -> None:
    """What the policy has it keeps: that a file says otherwise must not be passed over."""
    for row in rows:
        known = policy.by_id.get(row["id"])
        if known is not None and CatalogueEntry.model_validate(row) != known:
            raise ConfigError(
                f"{file}: check {row['id']!r} is in the policy with other values; give yours an id "
                "of its own, or leave out the policy that has it.",
                key=row["id"],
            )
    # A whole policy of another release may lack a suite that ships now: then it is the file's.
    shipped = load_policy().suite_weights.keys() & policy.suite_weights.keys()
    for suite in sorted(weights.keys() & shipped):
        known_weight = policy.suite_weights[suite]
        if weights[suite] != known_weight:
            raise ConfigError(
                f"{file}: suite {suite!r} is a shipped one and weighs {known_weight} by the "
                f"policy, not {weights[suite]}; change it in a policy file (run.policy).",
                key=f"suite_weights.{suite}",
            )


def _read_catalogue(file: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the checks and the suite weights of a catalogue file, each check judged alone.

    Raises:
        ConfigError: The file has a key that nothing reads, or a check does not fit the schema.
    """
    tables = read_toml(file)
    known = ("check", "suite_weights")
    for key in tables:
        if key not in known:
            raise ConfigError(f"{file}: {unknown_choice('key', key, known)}", key=key)
    weights = tables.get("suite_weights", {})
    if not isinstance(weights, dict):
        raise ConfigError(
            f"{file}: suite_weights is {described(weights)}; expected a table [suite_weights].",
            key="suite_weights",
        )
    rows = rows_of(file, tables, "check")
    for index, row in enumerate(rows, 1):
        _refuse_bad_entry(f"{file}: check {index}", row)
    return rows, weights


def _refuse_bad_entry(where: str, row: dict[str, Any]) -> None:
    for key in row:
        if key not in CatalogueEntry.model_fields:
            choices = unknown_choice("key", key, CatalogueEntry.model_fields)
            raise ConfigError(f"{where}: {choices}", key=key)
    try:
        entry = CatalogueEntry.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key}: {first['msg']}.", key=key) from error
    _refuse_unknown_capabilities(where, entry)


def _refuse_unknown_capabilities(where: str, entry: CatalogueEntry) -> None:
    """Of a capability that there is none of, every subject would be told not to offer it.

    The check would then never apply, to anything, without a word.
    """
    kind, _, named = (entry.not_applicable or "").partition(":")
    stated = [("requires", name) for name in entry.requires]
    stated += [("not_applicable", named)] if kind == "capability" else []
    for key, name in stated:
        if name not in CAPABILITIES:
            choices = unknown_choice("capability", name, CAPABILITIES)
            raise ConfigError(f"{where}: {key}: {choices}", key=key)


def with_inline(policy: Policy, inline: Iterable[InlineCheck]) -> Policy:
    """Returns the policy with checks that markers define.

    Raises:
        ConfigError: An id or a severity does not fit the schema.
    """
    added = sorted({check for check in inline if check.check not in policy.by_id})
    rows = [
        {
            "id": check.check,
            "title": check.title,
            "suite": check.check.partition(".")[0],
            "severity": check.severity,
            "component": check.component,
        }
        for check in added
    ]
    return _extended(policy, rows, {}, "Inline check") if rows else policy


def inline_of(measured: Policy, other: Policy) -> list[InlineCheck]:
    """Returns the checks of a run's policy that markers defined and another policy does not have.

    A marker states title, severity and component, and nothing else; of the shipped suites' own
    checks, which a later release may have dropped, none has the component of the user's.
    """
    shipped = load_policy().suite_weights
    return [
        InlineCheck(entry.id, entry.title, entry.severity.value, entry.component)
        for entry in measured.catalogue
        if entry.id not in other.by_id
        and _states_no_more_than_a_marker(entry)
        and (entry.component == INLINE_COMPONENT or entry.suite not in shipped)
    ]


def _states_no_more_than_a_marker(entry: CatalogueEntry) -> bool:
    stated = entry.model_dump(exclude_defaults=True).keys()
    own_suite = entry.id.partition(".")[0]
    return stated == {"id", "title", "suite", "severity", "component"} and entry.suite == own_suite


def _extended(
    policy: Policy,
    rows: Sequence[dict[str, Any]],
    weights: dict[str, int],
    what: str,
) -> Policy:
    values = policy.to_json()
    default = {str(row.get("suite", "?")): USER_SUITE_WEIGHT for row in rows}
    values["suite_weights"] = {**default, **weights, **values["suite_weights"]}
    values["catalogue"] += rows
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "policy"
        raise ConfigError(f"{what}: {key}: {first['msg']}.", key=key) from error


def _read_whole(file: Path) -> Policy:
    try:
        return Policy.model_validate(read_canonical(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"Cannot read {file}: {error.strerror}.", key=str(file)) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{file} is not a policy: {first['msg']}.", key=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not a policy: {json_fault(error)}.", key=str(file)) from error


def refuse_unread_names(policy: Policy) -> None:
    """Raises for a suite weight or a threshold that no check can read: it is misspelt.

    For a policy that is complete, with the user's catalogues and inline checks in it. Of the
    user's own are: the suites of all checks, and the sections of thresholds that are named like
    the suite of one of the user's checks.

    Raises:
        ConfigError: With the nearest name.
    """
    shipped = load_policy()
    suites = {*shipped.suite_weights, *(entry.suite for entry in policy.catalogue)}
    for suite in policy.suite_weights:
        if suite not in suites:
            raise ConfigError(
                f"Policy: suite_weights: {unknown_choice('suite', suite, suites)}", key=suite
            )
    own = {entry.suite for entry in policy.catalogue if entry.id not in shipped.by_id}
    for name in policy.thresholds:
        if name not in shipped.thresholds and name.partition(".")[0] not in own:
            raise ConfigError(
                f"Policy: thresholds: {unknown_choice('threshold', name, shipped.thresholds)}",
                key=name,
            )


def refuse_suites_without_checks(paths: Iterable[Path], nodeids: Iterable[str]) -> None:
    """Raises for a path of the user's suites that adds nothing to the run.

    Args:
        paths: As given; a directory, or a Python file.
        nodeids: Of all checks that were collected there, and of all modules that could not be
            imported: those show in the run itself.

    Raises:
        UsageError: With the path.
    """
    paths = tuple(paths)
    files = {nodeid.partition("::")[0] for nodeid in nodeids}
    places = _places(files, [resolved_path(path) for path in paths])
    for path in paths:
        whole = resolved_path(path)
        if whole.is_file() and whole.suffix != ".py":
            raise UsageError(
                f"Suite path {path} is no Python file; expected a directory of checks, or a "
                "test_*.py file."
            )
        is_used = any(place.is_relative_to(whole) for place in places)
        if not is_used and not catalogues_beside([path]):
            raise UsageError(
                f"Suite path {path} holds no check; expected test_*.py files with "
                "@pytest.mark.forge_check(...), or a catalogue.toml."
            )


def _places(files: Iterable[str], paths: Sequence[Path]) -> set[Path]:
    """Returns where the files of node ids may lie.

    pytest names a file relative to its root directory (the shipped suites) where it lies there,
    else to one of the paths it was given, which may lie within each other; "" is a path itself.
    """
    found: set[Path] = set()
    for file in files:
        for path in (resolved_path(suites_dir()), *paths):
            if path.is_file():
                found |= {path} if not file or Path(file).name == path.name else set()
            elif file and (path / file).is_file():
                found.add(resolved_path(path / file))
    return found


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


def inline_from(marks: Iterable[Mapping[str, Any]]) -> list[InlineCheck]:
    """Returns the inline checks among marks that another process collected."""
    return [
        InlineCheck(mark["check"], mark["title"], mark["severity"], mark["component"])
        for mark in marks
        if mark["title"] and mark["severity"] and not mark["problem"]
    ]


def shipped_files(checks: Iterable[str]) -> list[Path]:
    """Returns the files of the shipped suites that name one of the checks.

    A selection then imports what it needs. Where a check is named nowhere, the directory of all
    suites stands for it; the user's own checks are not looked for.
    """
    tests = {path: path.read_text(encoding="utf-8") for path in suites_dir().rglob("test_*.py")}
    catalogue = (suites_dir() / "catalogue.toml").read_text(encoding="utf-8")
    found: set[Path] = set()
    for literal in (f'"{check}"' for check in checks):
        files = {path for path, text in tests.items() if literal in text}
        if not files and literal in catalogue:
            return [suites_dir()]
        found |= files
    return sorted(found)
