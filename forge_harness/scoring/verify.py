"""Recomputes everything a run directory claims, from its items, evidence and policy alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from forge_harness.canonical import canonical_json, file_sha256, read_canonical
from forge_harness.durable import read_plain
from forge_harness.errors import RunDirectoryError, UsageError, several
from forge_harness.policy import Policy
from forge_harness.record import ItemRecord, RunRecord
from forge_harness.rundir import (
    ITEMS,
    MANIFEST,
    POLICY,
    RUN,
    all_files,
    check_manifest,
    left_files,
    read_items,
)
from forge_harness.scoring.assembly import (
    context_of,
    items_of,
    reassemble,
    reproduced_without_files,
)
from forge_harness.scoring.derived import without_derived
from forge_harness.scoring.merge import MergeSource, merge_records, shard_file
from forge_harness.scoring.rollup import settle, unique

_ARTIFACT = re.compile(r"^evidence/sha256/([0-9a-f]{64})$")
_CAUSE_FIRST = ("checks", "unscored_items", "suites", "coverage", "score", "verdict")
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """One thing a run directory claims and does not hold."""

    file: str
    """Path inside the run directory."""
    what: str
    """JSON path (`$.checks[3].outcome`), or what is wrong with the whole file."""
    expected: str
    found: str

    def sentence(self) -> str:
        """Returns the line `verify` prints."""
        return f"{self.file}: {self.what}: expected {self.expected}, found {self.found}"


def verify_run(path: Path) -> list[Discrepancy]:
    """Returns every difference between what a run directory claims and what it holds.

    In this order: an unfinished run, damaged files, policy, artifacts, study.json and logs, what
    the items and evidence of run.json give when assembled again, items.jsonl, and of a merged run
    its shards merged again. No stored outcome, score, coverage, verdict or digest is trusted.

    Raises:
        RunDirectoryError: `path` is not a directory.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is not a directory; expected the directory of a run.")
    found = list(_damage(path))
    record, problems = _read(path, RUN, RunRecord)
    policy, policy_problems = _read(path, POLICY, Policy)
    found += problems + policy_problems
    if record is not None and record.state == "running":
        found.insert(0, _unfinished(RUN, "state 'running'"))
    if record is not None:
        found += _artifacts(path, record)
        found += _left(path, record, RUN)
        if policy is not None:
            found += _recomputed(record, policy)
            found += _items(path, record, policy)
            if record.shards:
                found += _merged(path, record, policy)
    return found


def _unfinished(file: str, found: str) -> Discrepancy:
    return Discrepancy(file, "the run was not finished", "a finished, sealed run", found)


def _damage(path: Path) -> Iterator[Discrepancy]:
    if not (path / MANIFEST).is_file():
        yield _unfinished(MANIFEST, "no manifest")
        return
    for problem in check_manifest(path):
        yield Discrepancy(problem.path, problem.what, problem.expected, problem.found)


def _read(path: Path, name: str, model: type[_Model]) -> tuple[_Model | None, list[Discrepancy]]:
    try:
        raw = read_plain(path / name)
    except OSError as error:
        return None, [Discrepancy(name, "cannot be read", "a file", str(error.strerror))]
    try:
        values = read_canonical(raw)
        parsed = model.model_validate(values)
        canonical = canonical_json(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        return None, [Discrepancy(name, f"${where}", first["msg"], _short(first["input"]))]
    except (ValueError, RecursionError) as error:
        return None, [Discrepancy(name, "is not JSON", "canonical JSON", str(error))]
    if canonical != raw:
        return parsed, [
            Discrepancy(name, "is not canonical JSON", "the bytes of RFC 8785", "other bytes")
        ]
    return parsed, []


def _artifacts(path: Path, record: RunRecord) -> Iterator[Discrepancy]:
    for i, check in enumerate(record.checks):
        for j, evidence in enumerate(check.evidence):
            if evidence.artifact is None:
                continue
            where = f"$.checks[{i}].evidence[{j}].artifact"
            match = _ARTIFACT.match(evidence.artifact)
            if match is None:
                yield Discrepancy(RUN, where, "evidence/sha256/<hex>", evidence.artifact)
                continue
            named = f"sha256:{match[1]}"
            if evidence.value != named:
                yield Discrepancy(RUN, f"{where[:-9]}.value", named, _short(evidence.value))
            stored = path / evidence.artifact
            if not stored.is_file():
                yield Discrepancy(evidence.artifact, f"artifact of {check.id}", named, "no file")
            elif file_sha256(stored) != match[1]:
                found = f"sha256:{file_sha256(stored)}"
                yield Discrepancy(evidence.artifact, f"artifact of {check.id}", named, found)


def _left(path: Path, record: RunRecord, file: str) -> Iterator[Discrepancy]:
    """Holds study.json and the logs beside a record against what it says of them."""
    if record.files is None:
        return
    beside = file.removesuffix(RUN)
    present = left_files(path / beside)
    for name in sorted({*present, *record.files}):
        expected, found = record.files.get(name, "no file"), present.get(name, "no file")
        if expected != found:
            yield Discrepancy(f"{beside}{name}", f"is not what {file} says", expected, found)


def only_in_manifest(path: Path, record: RunRecord) -> list[str]:
    """Returns the files of a verified run that nothing but its manifest speaks for.

    Whoever changes one of them can write the manifest anew. Reports and what rendered them are
    among them: see `forge_harness.report.provenance`.
    """
    bound = {RUN, POLICY, ITEMS, MANIFEST, *(record.files or ())}
    bound |= {e.artifact for check in record.checks for e in check.evidence if e.artifact}
    for place in range(len(record.shards)):
        file = shard_file(place)
        shard, _ = _read(path, file, RunRecord)
        left = () if shard is None else shard.files or ()
        bound |= {file, *(f"{file.removesuffix(RUN)}{name}" for name in left)}
    return [name for name in all_files(path) if name not in bound]


def _items(path: Path, record: RunRecord, policy: Policy) -> Iterator[Discrepancy]:
    """Compares run.json with what was written down as each item finished.

    A line holds what pytest reported, run.json what the evidence rules make of it: a line is held
    against run.json after the same rules.
    """
    try:
        reported = read_items(path)
    except (OSError, ValueError, RecursionError) as error:
        yield Discrepancy(ITEMS, "cannot be read", "one item a line", str(error).splitlines()[0])
        return
    settled = unique(_settled(item, record, policy) for item in reported)
    lines = {item.nodeid: item for item in settled}
    told = {item.nodeid: item for item in without_derived(items_of(record))}
    for nodeid in sorted({*lines, *told}):
        line, item = lines.get(nodeid), told.get(nodeid)
        if line is None and record.state != "finished":
            continue  # what a full disk did not take
        if line != item:
            yield Discrepancy(ITEMS, nodeid, _item(item), _item(line))


def _settled(item: ItemRecord, record: RunRecord, policy: Policy) -> ItemRecord:
    entry = policy.by_id.get(item.check)
    if entry is None or all(check.id != item.check for check in record.checks):
        return item  # run.json lists it as it was reported
    capabilities = frozenset(record.subject.capabilities)
    ruled_out = entry.rules_out(capabilities, record.declared)
    return settle(item, entry.severity, ruled_out=ruled_out is not None)


def _item(item: ItemRecord | None) -> str:
    return _short(None if item is None else item.model_dump(mode="json", exclude={"log"}))


def _recomputed(record: RunRecord, policy: Policy) -> list[Discrepancy]:
    again = reassemble(record, policy).model_dump(mode="json")
    _keep_earlier_commands(record, again)
    return _against(record, policy, again, RUN)


def _against(
    record: RunRecord, policy: Policy, again: dict[str, Any], file: str
) -> list[Discrepancy]:
    """Returns where a record differs from what it was computed to be again."""
    claimed = record.model_dump(mode="json")
    order = {key: place for place, key in enumerate(_CAUSE_FIRST)}
    keys = sorted({**again, **claimed}, key=lambda key: order.get(key, len(order)))
    if record.policy_digest != policy.digest:
        keys = ["policy_digest", *(key for key in keys if key != "policy_digest")]
    found = [
        difference
        for key in keys
        for difference in _differences(
            f"$.{key}", again.get(key, _ABSENT), claimed.get(key, _ABSENT)
        )
    ]
    return [replace(discrepancy, file=file) for discrepancy in found]


def _merged(path: Path, record: RunRecord, policy: Policy) -> Iterator[Discrepancy]:
    """Merges the runs again that a merged run was put together from, each recomputed itself."""
    sources: list[MergeSource] = []
    for place, shard in enumerate(record.shards):
        # Where merging puts it: a forged record must not make this read elsewhere.
        file = shard_file(place)
        source, problems = _read(path, file, RunRecord)
        if source is None:
            yield from problems
            return
        digest = f"sha256:{file_sha256(path / file)}"
        if digest != shard.digest:
            yield Discrepancy(RUN, f"$.shards[{place}].digest", digest, shard.digest)
        again = reassemble(source, policy).model_dump(mode="json")
        _keep_earlier_commands(source, again)
        yield from problems
        yield from _left(path, source, file)
        yield from _against(source, policy, again, file)
        sources.append(MergeSource(file, source, digest))
    try:
        merged = merge_records(policy, sources)
    except UsageError as error:
        yield Discrepancy(RUN, "$.shards", "parts of one run", str(error))
        return
    for problem in _against(record, policy, merged.model_dump(mode="json"), RUN):
        yield replace(problem, what=f"{problem.what} (merged again)")


def _keep_earlier_commands(record: RunRecord, again: dict[str, Any]) -> None:
    context = context_of(record)
    for check, expected in zip(record.checks, again["checks"], strict=False):
        if check.command == reproduced_without_files(check.id, record.scope, context):
            expected["command"] = check.command


def _differences(where: str, expected: Any, found: Any) -> Iterator[Discrepancy]:  # noqa: ANN401
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inside = (expected.get(key, _ABSENT), found.get(key, _ABSENT))
            yield from _differences(f"{where}.{key}", *inside)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from _differences(f"{where}[{index}]", *pair)
    elif isinstance(expected, list) and isinstance(found, list):
        lengths = (several(len(values), "entry", "entries") for values in (expected, found))
        yield Discrepancy(RUN, where, *lengths)
    elif expected != found or isinstance(expected, bool) is not isinstance(found, bool):
        yield Discrepancy(RUN, where, _short(expected), _short(found))


_ABSENT = "nothing"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"
