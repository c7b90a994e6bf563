"""The policy: catalogue, thresholds and weights, with the one digest printed beside a score."""

from __future__ import annotations

import codecs
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from forge_harness.canonical import digest_of
from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.paths import suites_dir
from forge_harness.types import Profile, Severity

SCORING_RULE = "forge-score/1"

_STRICT = ConfigDict(extra="forbid", frozen=True)
_MAX_TIMEOUT_S = 604_800.0
"""A week, as for a whole run: timers overflow where a float does not."""
_MAX_WEIGHT = 1_000_000
"""Sums of it stay exact in the floats of a score and in JSON."""
_MAX_VERSION = 2**53 - 1
"""JSON has no larger integers, and the digest of the policy is over its JSON."""
# Strict: `true` is no threshold and "5" no weight, though both could be read as one.
_Weight = Annotated[int, Field(strict=True, le=_MAX_WEIGHT)]
_Threshold = Annotated[float, Field(strict=True, allow_inf_nan=False)]


_TOLERANCES = {
    "baseline.score_drop.at_most": (100.0, "points from 0 to 100"),
    "baseline.gate_worsening.at_most": (1.0, "a share from 0 to 1, such as 0.02 for 2 %"),
}
"""Threshold -> its largest value, and what it is. What is under 0 fails a run that is as good as
its baseline; beyond the rest nothing is ever worse, which a 2 meant for 2 % would be too."""
_TABLES = ("suite_weights", "severity_weights", "thresholds", "units")


class CatalogueEntry(BaseModel):
    """One check id: the unit that is scored, gated and reported."""

    model_config = _STRICT

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")
    title: str
    """What the check proves, in one clause."""
    suite: str
    severity: Severity
    component: str
    """The integration component that owns the property."""
    version: int = Field(default=1, strict=True, ge=1, le=_MAX_VERSION)
    """Raised when the meaning of the check changes; results of other versions do not compare."""
    profiles: tuple[Profile, ...] = (Profile.QUICK, Profile.FULL, Profile.NIGHTLY)
    """Profiles whose scope the check is in."""
    requires: tuple[str, ...] = ()
    """Capabilities of the subject the check speaks to."""
    not_applicable: str | None = Field(
        default=None, pattern=r"^(capability|declared):[A-Za-z_][A-Za-z0-9_.=]*$"
    )
    """`capability:NAME`: not applicable to a subject without that capability.
    `declared:KEY=VALUE`: not applicable when the configuration declares KEY=VALUE."""
    timeout_s: float = Field(default=120.0, gt=0, le=_MAX_TIMEOUT_S, allow_inf_nan=False)
    measures_suite: str | None = None
    """Suite whose passing share of severity weight this check is; computed, not a test."""

    def rules_out(self, capabilities: frozenset[str], declared: dict[str, str]) -> str | None:
        """Returns why the check does not apply, or None when it does."""
        if self.not_applicable is None:
            return None
        kind, _, argument = self.not_applicable.partition(":")
        if kind == "capability":
            return None if argument in capabilities else f"the subject does not offer {argument}"
        key, _, value = argument.partition("=")
        return f"{key} is declared {value!r}" if declared.get(key) == value else None


class Policy(BaseModel):
    """Everything a score depends on besides the evidence."""

    model_config = _STRICT

    schema_version: Literal["1.0"] = "1.0"
    rule: Literal["forge-score/1"] = "forge-score/1"
    suite_weights: dict[str, _Weight]
    severity_weights: dict[Severity, _Weight]
    thresholds: dict[str, _Threshold]
    units: dict[str, str] = Field(default_factory=dict)
    """Dotted threshold name without its direction (`gates.latency`) -> unit ("1" for shares)."""
    catalogue: tuple[CatalogueEntry, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        seen: set[str] = set()
        for entry in self.catalogue:
            if entry.id in seen:
                raise ValueError(f"check id {entry.id!r} is in the catalogue twice")
            seen.add(entry.id)
            for suite in (entry.suite, entry.measures_suite or entry.suite):
                if suite not in self.suite_weights:
                    choices = unknown_choice("suite", suite, self.suite_weights)
                    raise ValueError(f"check {entry.id!r}: {choices}")
        missing = set(Severity) - set(self.severity_weights)
        if missing:
            raise ValueError(f"severity_weights lacks {', '.join(sorted(missing))}")
        for table in ("suite_weights", "severity_weights"):
            for name, weight in getattr(self, table).items():
                if weight <= 0:
                    raise ValueError(f"{table}.{name} is {weight}; expected a positive integer")
        return self

    def __copy__(self) -> Policy:
        # `model_copy` goes through here; a cached digest must not outlive a changed threshold.
        copied = super().__copy__()
        for name in ("by_id", "digest"):
            copied.__dict__.pop(name, None)
        return copied

    @cached_property
    def by_id(self) -> dict[str, CatalogueEntry]:
        """Check id -> entry."""
        return {entry.id: entry for entry in self.catalogue}

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` over the canonical JSON of the whole policy."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Returns the policy as JSON values; `Policy.model_validate` reads them back."""
        values = self.model_dump(mode="json")
        for entry in values["catalogue"]:
            # Not there in the policies of earlier releases, whose digests must not move.
            if entry["measures_suite"] is None:
                del entry["measures_suite"]
        return values

    def threshold(self, name: str) -> float:
        """Returns a threshold by its dotted name.

        Raises:
            ConfigError: No threshold has that name.
        """
        try:
            return self.thresholds[name]
        except KeyError:
            raise ConfigError(
                unknown_choice("threshold", name, self.thresholds), key=name
            ) from None

    def in_scope(self, profile: Profile) -> tuple[CatalogueEntry, ...]:
        """Returns the entries of one profile, in catalogue order."""
        return tuple(entry for entry in self.catalogue if profile in entry.profiles)


def load_policy(
    policy_file: Path | None = None,
    catalogue_file: Path | None = None,
) -> Policy:
    """Reads the policy: catalogue, thresholds and weights.

    A threshold in a section that ships ([thresholds.gates]) must be one that ships. Sections and
    suites of other names may belong to checks of the user's, which are not known here:
    `forge_harness.selection.refuse_unread_names` judges them where they are.

    Args:
        policy_file: TOML file with `suite_weights`, `severity_weights`, `thresholds` and `units`;
            the one that ships with the suites when None. Its tables are laid over the shipped
            ones, so a file with one threshold is a whole policy.
        catalogue_file: TOML file with `[[check]]` tables; the shipped catalogue when None.

    Raises:
        ConfigError: A file is missing, is not TOML, does not fit the schema, or has a threshold
            or unit that does not exist.
    """
    shipped = suites_dir()
    values = dict(_read_shipped(shipped / "policy.toml"))
    what = "Policy"
    if policy_file is not None:
        own = read_toml(policy_file)
        _refuse_misfits(policy_file, own, _flatten(values["thresholds"]))
        values = _overlay(values, own)
        what = str(policy_file)
    catalogue = (
        _read_shipped(shipped / "catalogue.toml")
        if catalogue_file is None
        else read_toml(catalogue_file)
    )
    checks = list(catalogue.get("check", []))
    tables = {name: _flatten(values.pop(name, {})) for name in ("thresholds", "units")}
    try:
        policy = Policy.model_validate({**values, **tables, "catalogue": checks})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        # What a validator of the whole policy says names its key itself.
        said = f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{what}: {said}.", key=key or "policy") from error
    refuse_tolerances(what, policy)
    return policy


def refuse_tolerances(where: str, policy: Policy) -> None:
    """Raises for what a comparison with a baseline cannot allow.

    Here and not in the schema: what was recorded under such a policy must still verify.

    Raises:
        ConfigError: With the value and its range.
    """
    for name, (most, what) in _TOLERANCES.items():
        value = policy.thresholds.get(name, 0.0)
        if not 0 <= value <= most:
            raise ConfigError(
                f"{where}: thresholds.{name} is {value:g}; expected {what}.", key=name
            )


def _read_shipped(path: Path) -> dict[str, Any]:
    """Returns `read_toml` of a file that ships; its tables are not to be changed.

    Sessions within one process each read the policy, and parsing takes most of that.
    """
    try:
        told = path.stat()
    except OSError:
        return read_toml(path)
    return _read_unchanged(path, (told.st_ino, told.st_size, told.st_mtime_ns))


@lru_cache(maxsize=4)
def _read_unchanged(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    """Returns the tables of a file as it was with that stamp."""
    return read_toml(path)


def _refuse_misfits(file: Path, own: dict[str, Any], shipped: Iterable[str]) -> None:
    """Raises for what a policy file has and nothing would ever read."""
    known = set(Policy.model_fields) - {"catalogue"}
    for key, value in own.items():
        if key not in known:
            raise ConfigError(f"{file}: {unknown_choice('key', key, known)}", key=key)
        if key in _TABLES and not isinstance(value, dict):
            raise ConfigError(
                f"{file}: {key} is {described(value)}; expected a table [{key}].", key=key
            )
    for table in ("thresholds", "units"):
        _refuse_a_name_twice(file, table, own.get(table, {}))
    thresholds = set(shipped)
    sections = {name.partition(".")[0] for name in thresholds}
    added = _flatten(own.get("thresholds", {}))
    for name in added:
        if name.partition(".")[0] in sections and name not in thresholds:
            raise ConfigError(f"{file}: {unknown_choice('threshold', name, thresholds)}", key=name)
    stems = {name.rpartition(".")[0] for name in {*thresholds, *added}}
    for name in _flatten(own.get("units", {})):
        if name not in stems:
            raise ConfigError(f"{file}: {unknown_choice('unit', name, stems)}", key=name)


def _refuse_a_name_twice(file: Path, table: str, values: dict[str, Any]) -> None:
    counted = Counter(name for name, _ in _named(values))
    for name, times in counted.items():
        if times > 1:
            raise ConfigError(
                f"{file}: {table}.{name} is stated {times} times, in quotes and in a table; keep "
                "one of them.",
                key=name,
            )


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = _overlay(below, value)
        else:
            merged[key] = value
    return merged


def _flatten(table: dict[str, Any]) -> dict[str, Any]:
    return dict(_named(table))


def _named(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value); a name in quotes may have dots, and come a second time."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def described(value: object) -> str:
    """Returns a value of the wrong shape as a sentence names it: tables and lists by kind."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file.

    Raises:
        ConfigError: It cannot be read, or is not TOML.
    """
    try:
        return toml_values(path)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", key=str(path)) from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be read.", key=str(path)) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", key=str(path)) from error


def toml_values(path: Path) -> dict[str, Any]:
    """Returns the tables of a TOML file, which may start with the byte-order mark of UTF-8.

    Some editors write the mark, and `tomllib` takes it for a statement.

    Raises:
        OSError: It cannot be read.
        RecursionError: It is nested too deeply.
        ValueError: It is not TOML in UTF-8; says where, and what a mark says of the encoding.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(
                "it starts with the byte-order mark of UTF-16; save it in UTF-8"
            ) from None
        raise


def rows_of(file: Path, tables: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the `[[name]]` tables of a file; none when it has none.

    Raises:
        ConfigError: What goes by the name is no list of tables.
    """
    value = tables.get(name, [])
    if not isinstance(value, list):
        raise ConfigError(
            f"{file}: {name} is {described(value)}; expected a list of tables [[{name}]].",
            key=name,
        )
    for index, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise ConfigError(
                f"{file}: {name} {index} is {described(row)}; expected a table [[{name}]].",
                key=name,
            )
    return value
