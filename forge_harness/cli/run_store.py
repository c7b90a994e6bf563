"""Where `forge-harness run --state` keeps a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge_harness.cli.terminal import say, shown
from forge_harness.errors import ExitCode, ForgeError, SealedStateError, UsageError, WrongKeyError
from forge_harness.paths import resolved_path

if TYPE_CHECKING:
    from forge_harness.record import RunRecord
    from forge_harness.security.sealing import KeyringSealer


@dataclass(frozen=True, slots=True)
class RunStore:
    """A state store that gets a run once it is sealed."""

    root: Path
    sealer: KeyringSealer | None = None

    def refuse(self, directory: Path) -> None:
        """Refuses, without a change, a store that cannot take the run once it is finished.

        Raises:
            UsageError: Store and run directory lie within each other.
            StateError: Something else is there.
        """
        from forge_harness.state.opening import examine

        store, run = resolved_path(self.root), resolved_path(directory)
        if store.is_relative_to(run):
            raise UsageError(
                f"The state store {self.root} lies within the run directory {directory}, which "
                "would not verify with it; choose a place outside."
            )
        if run.is_relative_to(store):
            raise UsageError(
                f"The run directory {directory} lies within the state store {self.root}, which "
                "holds nothing but states; choose a place outside."
            )
        examine(self.root, create=True)

    def open_once(self) -> None:
        """Opens the store: what forbids it must be known before hours are spent on the run.

        Raises:
            UsageError: It cannot be opened, or not with these keys.
            StateError: It takes no commit.
        """
        from forge_harness.state import NewState, Store
        from forge_harness.state.trial import try_commit

        try:
            with Store.open(self.root, sealer=self.sealer) as store:
                try_commit(store, NewState(phase="phase5", kind="run", name="runs/new", files={}))
        except (SealedStateError, WrongKeyError) as error:
            raise UsageError(f"{error} Give its keyring with --keys.") from error
        except OSError as error:
            raise UsageError(
                f"The state store {self.root} cannot be opened ({error.strerror}); choose another "
                "place."
            ) from error

    def keep_or_say(self, record: RunRecord, directory: Path, code: ExitCode) -> ExitCode:
        """Keeps the run; returns the exit code, which is the run's own unless that was 0."""
        from forge_harness.probes.masking import Masker

        try:
            kept = self._keep(record, directory)
        except (ForgeError, OSError) as error:
            sentence = f"Error: The run is not kept in {shown(self.root)}: {error}"
            say(Masker().text(sentence))
            lost = error.exit_code if isinstance(error, ForgeError) else ExitCode.USAGE
            return code or lost
        click.echo(f"Kept as {kept} in {shown(self.root)}.")
        return code

    def _keep(self, record: RunRecord, directory: Path) -> str:
        """Saves the sealed run directory as a state; returns phase and name of it."""
        from forge_harness.integration.state_manager import StateManager

        with StateManager(self.root, sealer=self.sealer) as manager:
            kept = manager.save(
                phase=5,
                kind="run",
                name=f"runs/{record.run_id}",
                data=directory,
                metadata={
                    "verdict": str(record.verdict),
                    "score_low": record.score.low,
                    "score_high": record.score.high,
                    "policy_digest": record.policy_digest,
                    "subject": record.subject.name,
                    "started_at": record.started_at,
                },
            )
        return f"{kept.phase}/{kept.name}"
