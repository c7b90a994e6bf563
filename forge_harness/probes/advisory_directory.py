"""OSV records in a directory, one a file: what a checkout of pypa/advisory-database is.

Only the records of the distributions asked for are parsed; the age of the snapshot is read from
every file, since the newest advisory is seldom one of theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

SUFFIXES = (".json", ".yaml", ".yml")
MAX_RECORD_BYTES = 8 << 20
# JSON may be one line, so a key also follows a brace or a comma.
_MODIFIED = re.compile(
    r"""(?:^|[{,])\s*"?modified"?:\s*["']?([0-9][0-9TtZz:.+ -]*[0-9Zz])""", re.MULTILINE
)
_NAME = re.compile(r"""(?:^|[{,])[-\s{,]*"?name"?:\s*["']?([A-Za-z0-9._-]+)""", re.MULTILINE)


def read(path: Path, names: Collection[str]) -> tuple[list[dict[str, Any]], datetime | None]:
    """Returns the records that name a distribution of `names`, and the newest `modified` of all.

    Args:
        path: Directory, searched through and through; links are not followed.
        names: Canonical names of distributions.

    Raises:
        OSError: A file cannot be read.
        ValueError: A record is no mapping, or YAML without PyYAML to read it.
    """
    wanted = set(names)
    records: list[dict[str, Any]] = []
    newest: datetime | None = None
    for file in _files(path):
        text = file.read_text(encoding="utf-8")
        times = [_moment(found) for found in _MODIFIED.findall(text)]
        newest = max([*times, *([newest] if newest else [])], default=None)
        if wanted & {canonicalize_name(found) for found in _NAME.findall(text)}:
            records.append(_parsed(file, text))
    return records, newest


def modified(record: Mapping[str, Any]) -> datetime:
    """Returns when a record was modified; OSV requires an RFC 3339 time in UTC."""
    return _moment(str(record.get("modified", "1970-01-01T00:00:00Z")))


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.strip())
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _files(path: Path) -> Iterator[Path]:
    for file in sorted(path.rglob("*")):
        if file.suffix in SUFFIXES and file.is_file() and not file.is_symlink():
            if file.stat().st_size > MAX_RECORD_BYTES:
                raise ValueError(f"{file.name} is over {MAX_RECORD_BYTES} bytes")
            yield file


def _parsed(file: Path, text: str) -> dict[str, Any]:
    record = json.loads(text) if file.suffix == ".json" else _yaml(file, text)
    if not isinstance(record, dict):
        raise ValueError(f"{file.name} holds {type(record).__name__}, expected one OSV record")
    return record


def _yaml(file: Path, text: str) -> Any:  # noqa: ANN401 - any YAML value
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{file.name} is YAML: pip install pyyaml, or use OSV's JSON") from None
    try:
        # nosec B506: a safe loader either way; the one in C is 20 times as fast.
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # nosec
    except yaml.YAMLError as error:
        raise ValueError(f"{file.name} is not YAML: {error}") from error
