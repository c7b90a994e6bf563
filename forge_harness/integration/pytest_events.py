"""What the pytest process that runs the checks tells, line by line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_harness.record import ItemRecord
from forge_harness.types import Outcome


@dataclass(slots=True)
class Events:
    """Reads the events file while it grows, and knows what is missing at the end."""

    path: Path
    on_item: Callable[[ItemRecord], None]
    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Node id -> mark, of everything collected."""
    running: dict[str, float] = field(default_factory=dict)
    """Node id -> monotonic time it started, of what has not ended."""
    ended: set[str] = field(default_factory=set)
    finished: dict[str, Any] | None = None
    """The last event of a session that came to its end."""
    last_event: float = field(default_factory=time.monotonic)
    """Monotonic time of the last event, or of the start."""
    _offset: int = 0

    def read(self) -> None:
        """Takes the events written since the last call; half a line waits for its end."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self.last_event = time.monotonic()
            self._take(json.loads(line))

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "collected":
            self.marks = dict(event["marks"])
        elif kind == "started":
            self.running[event["nodeid"]] = time.monotonic()
        elif kind == "ended":
            self.running.pop(event["nodeid"], None)
        elif kind == "item":
            self._end(ItemRecord.model_validate(event["record"]))
        elif kind == "finished":
            self.finished = dict(event)

    def _end(self, item: ItemRecord) -> None:
        self.running.pop(item.nodeid, None)
        self.ended.add(item.nodeid)
        self.on_item(item)

    def total(self) -> int:
        """Returns how many items are expected to run."""
        return sum(not mark["dropped"] for mark in self.marks.values())

    def close(self, *, hung: Mapping[str, str], reason: str) -> int:
        """Accounts for what never ended; returns how many items that are.

        Args:
            hung: Node id -> why, of items that end as errors.
            reason: Why all others are not measured.
        """
        missing = sorted(self.marks.keys() - self.ended)
        for nodeid in missing:
            outcome = Outcome.ERROR if nodeid in hung else Outcome.NOT_MEASURED
            self._end(
                ItemRecord(
                    nodeid=nodeid,
                    check=self.marks[nodeid]["check"],
                    outcome=outcome,
                    reason=hung.get(nodeid, reason),
                    duration_s=0.0,
                )
            )
        return len(missing)
