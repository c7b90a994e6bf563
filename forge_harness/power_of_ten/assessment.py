"""From counts to scores: a rule is 1 - broken over opportunities, a category the mean of rules."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from fractions import Fraction
from pathlib import Path

from forge_harness.canonical import digest_of
from forge_harness.errors import ConfigError, unknown_choice
from forge_harness.paths import resolved_path
from forge_harness.policy import toml_values
from forge_harness.security.scan_files import relative
from forge_harness.security.scan_tools import find_tool, run_tool, tool_version

from . import c_source, python_source
from .measures import Count, Measure, Place, merged
from .rules import CATEGORIES, RULES
from .trees import files_of

_MISSING = "not counted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """A place that may break a rule for a while; it costs half as long as it lives.

    Attributes:
        rule: 1 to 10.
        file: Of the tree, forward slashes.
        owner: Who answers for it.
        expires: Last day it counts.
        reason: Why.
    """

    rule: int
    file: str
    owner: str
    expires: date
    reason: str


@dataclass(frozen=True, slots=True)
class RuleScore:
    """One rule over a tree.

    Attributes:
        rule: 1 to 10.
        measures: What was counted.
        score: 0 to 1; None without an opportunity: not applicable, never 1.
        waived: Places under a live waiver.
    """

    rule: int
    measures: tuple[Measure, ...]
    score: Fraction | None
    waived: int

    @property
    def opportunities(self) -> int:
        """How often the rule could have been broken."""
        return sum(measure.opportunities for measure in self.measures)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it was."""
        return tuple(sorted(place for measure in self.measures for place in measure.places))


@dataclass(frozen=True, slots=True)
class CategoryScore:
    """A category of the compliance table: the mean of its rules, and the lowest of them."""

    name: str
    score: Fraction | None
    lowest: Fraction | None


@dataclass(frozen=True, slots=True)
class Assessment:
    """A tree held against the ten rules, as adapted.

    Attributes:
        roots: The trees, counted as one.
        files: Source files read.
        unreadable: Files that could not be parsed; each counts against every rule.
        rules: One a rule.
        categories: One a category.
        waivers: Live ones that covered a place.
        idle: Those that covered none, or have expired.
    """

    roots: tuple[Path, ...]
    files: int
    unreadable: tuple[Place, ...]
    rules: tuple[RuleScore, ...]
    categories: tuple[CategoryScore, ...]
    waivers: tuple[Waiver, ...]
    idle: tuple[Waiver, ...] = ()

    @property
    def mean(self) -> Fraction | None:
        """Mean of the categories."""
        return _mean(category.score for category in self.categories)

    @property
    def lowest(self) -> Fraction | None:
        """The lowest category."""
        scores = [c.score for c in self.categories if c.score is not None]
        return min(scores, default=None)

    def digest(self) -> str:
        """Returns `sha256:<hex>` over every place found."""
        return digest_of([[r.rule, [p.sentence() for p in r.places]] for r in self.rules])


def assess(
    roots: Sequence[Path], *, waivers: Sequence[Waiver] = (), today: date | None = None
) -> Assessment:
    """Counts all rules over trees of Python, C, C++ and CUDA, taken as one.

    Args:
        roots: Directories or files; a file of several counts once.
        waivers: Known places.
        today: None: today.

    Raises:
        UsageError: There is no such tree.
    """
    counts: list[Count] = []
    unreadable: list[Place] = []
    warnings: list[Measure] = []
    without_lizard: list[Place] = []
    read = 0
    for root, files in files_of(roots, (".py", *c_source.SUFFIXES)):
        read += len(files)
        warnings.append(_warnings(root, files))
        for path in files:
            try:
                counts += _counts(path, relative(path, root))
            except ImportError:
                why = "lizard is not installed"
                without_lizard.append(Place(relative(path, root), 0, f"{_MISSING}: {why}"))
            except python_source.UNREADABLE as error:
                why = python_source.why_unreadable(error)
                unreadable.append(Place(relative(path, root), 0, f"{_MISSING}: {why}"))
    measures = [*merged(counts), *warnings, *_lost(unreadable), *_lost_c(without_lizard)]
    live = [w for w in waivers if w.expires >= (today or date.today())]
    rules = tuple(_score(rule, measures, live) for rule in RULES)
    used = tuple(w for w in live if any(_covers(w, r.rule, p) for r in rules for p in r.places))
    idle = tuple(w for w in waivers if w not in used)
    categories = tuple(_category(name, rules) for name in CATEGORIES)
    return Assessment(tuple(roots), read, tuple(unreadable), rules, categories, used, idle)


def load_waivers(path: Path) -> list[Waiver]:
    """Reads `[[waiver]]` tables: rule, file, owner, expires (a date), reason.

    Raises:
        ConfigError: The file cannot be read or a waiver lacks something.
    """
    try:
        document = toml_values(path)
        found = [Waiver(**entry) for entry in document.get("waiver", [])]
    except (OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"Waivers {str(path)!r} cannot be read ({error}); expected [[waiver]] with rule, file, "
            "owner, expires and reason."
        ) from error
    for name in document:
        if name != "waiver":
            raise ConfigError(f"Waivers {str(path)!r}: {unknown_choice('table', name, ['waiver'])}")
    for waiver in found:
        if not _is_sound(waiver):
            raise ConfigError(
                f"The waiver of rule {waiver.rule!r} in {waiver.file!r} needs a rule from 1 to 10, "
                "a file, an owner and a reason in words, and a date it expires on."
            )
    return found


def _is_sound(waiver: Waiver) -> bool:
    words = (waiver.file, waiver.owner, waiver.reason)
    return (
        type(waiver.rule) is int
        and waiver.rule in RULES
        and type(waiver.expires) is date
        and all(isinstance(word, str) and word.strip() for word in words)
    )


def _counts(path: Path, name: str) -> list[Count]:
    if path.suffix == ".py":
        return python_source.count_python(name, python_source.read_python(path))
    # Nothing says in what encoding C is; what is counted of it is ASCII.
    return c_source.count_c(name, path.read_text(encoding="utf-8-sig", errors="replace"))


def _warnings(root: Path, files: Sequence[Path]) -> Measure:
    """Rule 10 by ruff with the tree's own configuration: files without a finding."""
    sources = [path for path in files if path.suffix == ".py"]
    found = Measure(
        rule=10, name="files without a warning", tool="ruff", opportunities=len(sources), places=()
    )
    command = find_tool("ruff")
    if command is None:
        return _uncounted(found, root, sources, "not installed")
    # A configuration may say `fix`: nobody who asks for counts wants sources changed.
    arguments = [*command, "check", "--no-fix", "--no-fix-only", "--no-cache", "--quiet"]
    for path in _not_plain(root):
        arguments += ["--extend-exclude", glob.escape(str(path))]
    # From within the tree: without a configuration of its own ruff would take that of the directory
    # the harness happens to run in.
    folder = resolved_path(root if root.is_dir() else root.parent)
    whole = str(resolved_path(root))
    run = run_tool([*arguments, "--output-format", "concise", whole], cwd=folder)
    found = replace(
        found,
        version=tool_version(command),
        command=(*arguments, "--output-format", "concise", str(root)),
        exit_code=run.exit_code,
    )
    # 1 says that there are findings; a program that could not start ends so too, and lists none.
    if run.exit_code not in (0, 1) or (run.exit_code == 1 and not run.stdout):
        return _uncounted(found, root, sources, run.last_words())
    shown = run_tool([*arguments, "--show-files", whole], cwd=folder).stdout.splitlines()
    looked_at = {resolved_path(Path(line)) for line in shown}
    seen = [path for path in sources if resolved_path(path) in looked_at]
    if sources and not seen:
        return _uncounted(found, root, sources, "its configuration leaves out every file")
    places = tuple(_first_findings(run.stdout, root, folder, seen))
    return replace(found, opportunities=len(seen), places=places)


def _not_plain(root: Path) -> Iterator[Path]:
    """What ruff would wait for and never get: pipes and devices, links to them included."""
    for directory, _, files in os.walk(root):
        paths = (resolved_path(Path(directory)) / name for name in files)
        yield from (path for path in paths if path.exists() and not path.is_file())


def _uncounted(measure: Measure, root: Path, sources: Sequence[Path], why: str) -> Measure:
    lost = tuple(Place(relative(path, root), 0, f"{_MISSING}: {why}") for path in sources)
    return replace(measure, missing=why, places=lost)


def _first_findings(
    output: str, root: Path, folder: Path, sources: Sequence[Path]
) -> Iterator[Place]:
    """The first finding of each file, from ruff's concise lines `file:line:column: what`."""
    left = {str(resolved_path(path)): path for path in sources}
    for line in output.splitlines():
        file, _, rest = line.partition(":")
        number, _, what = rest.partition(":")
        path = left.pop(str(resolved_path(folder / file)), None) if number.isdecimal() else None
        if path is not None:
            yield Place(relative(path, root), int(number), what.partition(":")[2].strip())


def _lost(unreadable: Iterable[Place]) -> list[Measure]:
    places = tuple(unreadable)
    if not places:
        return []
    return [
        Measure(
            rule=rule, name="files that could be read", opportunities=len(places), places=places
        )
        for rule in RULES
    ]


def _lost_c(files: Sequence[Place]) -> list[Measure]:
    return [
        Measure(
            rule=rule,
            name="files of C that could be counted",
            tool="lizard",
            opportunities=len(files),
            places=tuple(files),
            missing="not installed",
        )
        for rule in (c_source.RULES if files else ())
    ]


def _score(rule: int, measures: Sequence[Measure], waivers: Sequence[Waiver]) -> RuleScore:
    own = tuple(measure for measure in measures if measure.rule == rule)
    opportunities = sum(measure.opportunities for measure in own)
    places = [place for measure in own for place in measure.places]
    waived = sum(any(_covers(w, rule, place) for w in waivers) for place in places)
    if not opportunities:
        return RuleScore(rule, own, None, waived)
    cost = len(places) - Fraction(waived, 2)
    return RuleScore(rule, own, max(Fraction(0), 1 - cost / opportunities), waived)


def _covers(waiver: Waiver, rule: int, place: Place) -> bool:
    return waiver.rule == rule and waiver.file == place.file


def _category(name: str, rules: Sequence[RuleScore]) -> CategoryScore:
    by_rule: Mapping[int, RuleScore] = {score.rule: score for score in rules}
    scores = [by_rule[rule].score for rule in CATEGORIES[name]]
    known = [score for score in scores if score is not None]
    return CategoryScore(name, _mean(scores), min(known, default=None))


def _mean(scores: Iterable[Fraction | None]) -> Fraction | None:
    known = [score for score in scores if score is not None]
    return sum(known, Fraction(0)) / len(known) if known else None
