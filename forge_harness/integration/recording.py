"""One run being recorded: items go to the run directory as they end, the record at the end."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from forge_harness.environment import collect_environment
from forge_harness.evidence import printable
from forge_harness.policy import Policy
from forge_harness.probes.masking import Masker
from forge_harness.record import ItemRecord, RunRecord, SubjectRecord, Waiver
from forge_harness.rundir import DiskFullError, RunDirectory, left_files
from forge_harness.scoring import RunContext, Scope, assemble

FinalState = Literal["finished", "interrupted", "aborted"]
NOT_REACHED = "the run ended before this check"


def utc_now() -> str:
    """Returns the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_context(
    *,
    subject: SubjectRecord,
    declared: Mapping[str, str],
    seed: int,
    command: Sequence[str],
    started_at: str | None = None,
    environment: Mapping[str, Any] | None = None,
) -> RunContext:
    """Returns the context of a run that starts now, with an id of its own."""
    started = started_at or utc_now()
    stamp = started.translate(str.maketrans("", "", "-:"))
    return RunContext(
        run_id=f"{stamp}-{uuid.uuid4().hex[:8]}",
        subject=subject,
        environment=collect_environment() if environment is None else environment,
        declared={key: Masker().text(value) for key, value in declared.items()},
        seed=seed,
        # A path among them is bytes.
        command=[Masker().text(printable(argument)) for argument in command],
        started_at=started,
    )


@dataclass(slots=True)
class Recording:
    """Items and context of one run, and its directory if it is kept.

    `policy`, `scope` and `context` may be replaced until `finish`: the plugin learns some of
    them only while the run goes on.
    """

    policy: Policy
    scope: Scope
    context: RunContext
    waivers: Sequence[Waiver] = ()
    items: list[ItemRecord] = field(default_factory=list)
    directory: RunDirectory | None = None
    disk_full: str | None = None
    """The sentence, once the run directory has taken no more."""

    def start(self, path: Path) -> None:
        """Makes the run directory with a stub that says nothing was measured yet.

        Raises:
            RunDirectoryError: See `RunDirectory.create`.
        """
        stub = assemble(
            self.policy,
            [],
            waivers=self.waivers,
            scope=self.scope,
            context=self.context,
            state="running",
            state_reason="the run has not ended, or was killed",
        )
        self.directory = RunDirectory.create(path, record=stub, policy=self.policy)

    def add(self, item: ItemRecord) -> None:
        """Keeps a finished item; a full disk is remembered, not raised."""
        self.items.append(item)
        if self.directory is None or self.disk_full is not None:
            return
        try:
            self.directory.append_item(item)
        except DiskFullError as error:
            self.disk_full = str(error)

    def finish(self, state: FinalState, reason: str = "") -> RunRecord:
        """Returns the record, and writes it where the run is kept.

        Raises:
            RunDirectoryError: The record cannot be written, not even into the reserve.
        """
        if self.disk_full is not None:
            state, reason = "aborted", self.disk_full
        files = {} if self.directory is None else left_files(self.directory.path)
        # A clock that was set back meanwhile must not make the record one that none believes.
        finished_at = max(self.context.started_at, utc_now())
        self.context = replace(self.context, finished_at=finished_at, files=files)
        record = assemble(
            self.policy,
            self.items,
            waivers=self.waivers,
            scope=self.scope,
            context=self.context,
            state=state,
            state_reason=reason,
        )
        if self.directory is not None:
            self.directory.write_final(record, self.policy)
        return record
