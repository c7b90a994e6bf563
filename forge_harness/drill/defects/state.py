"""State stores with one seeded bug, and checkpoints that lose something on their way.

The stores are those of `forge_harness.drill.store_mutants`, which the drill of the store measures
its campaigns with; here each is the store of a subject, and a check of the state suite is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Stage
from forge_harness.drill.defects.stores import (
    collected,
    commits,
    commits_on_a_bad_disk,
    commits_over_leftovers,
    damaged,
    old_stores,
    shared,
)
from forge_harness.protocols import StoreSpec, TrainingSession
from forge_harness.subject.reference import ReferenceSubject


class KeepsIn(ReferenceSubject):
    """The reference subject with another store.

    Args:
        opener: `module:attribute`, importable in a fresh process.
        plaintext: Files of it that are declared not to be sealed.
    """

    def __init__(self, opener: str, plaintext: frozenset[str] = frozenset()) -> None:
        self.opener = opener
        self.plaintext = plaintext

    def state_store(self) -> StoreSpec:
        """See `KeepsState.state_store`."""
        old = super().state_store().old_stores
        return StoreSpec(opener=self.opener, old_stores=old, plaintext=self.plaintext)


class ForgetsTheStep(ReferenceSubject):
    """Saves a checkpoint under the number of the step that comes next."""

    def save_session(self, session: TrainingSession, path: Path) -> None:
        """See `Checkpoints.save_session`."""
        counted: Any = session
        counted.step_index += 1
        super().save_session(session, path)
        counted.step_index -= 1


def mutant(name: str) -> Callable[[], object]:
    """Makes a subject that keeps its states in one of `drill.store_mutants`."""
    return partial(KeepsIn, f"forge_harness.drill.store_mutants:{name}")


_SEEDED = partial(Defect, stage=Stage.STATE)


_WRITES = "state.commit_atomic"

DEFECTS: tuple[Defect, ...] = (
    _SEEDED(
        id="C11_contents_not_synced",
        title="Contents are renamed into place and never synced",
        check=_WRITES,
        shows="replay_",
        alive=commits,
        subtlety=4,
        source="NVIDIA/nvidia-resiliency-ext#365",
        subject=mutant("no_file_sync"),
    ),
    _SEEDED(
        id="C11_names_not_synced",
        title="Directories are not synced after a rename",
        check=_WRITES,
        shows="replay_",
        alive=commits,
        subtlety=4,
        subject=mutant("no_name_sync"),
    ),
    _SEEDED(
        id="C11_index_not_synced",
        title="The index answers before it is on disk (SQLite, synchronous=NORMAL)",
        check=_WRITES,
        shows="replay_lost is",
        alive=commits,
        subtlety=4,
        subject=mutant("unsynced_index"),
    ),
    _SEEDED(
        id="C11_leftovers_not_synced",
        title="A file that a killed writer left is taken over without a sync",
        check=_WRITES,
        shows="replay_unrecoverable is",
        alive=commits_over_leftovers,
        subtlety=5,
        subject=mutant("no_adopt_sync"),
    ),
    _SEEDED(
        id="C12_trusts_leftovers",
        title="A file that a killed writer left is taken over unread",
        check=_WRITES,
        shows="replay_unrecoverable is",
        alive=commits_over_leftovers,
        subtlety=4,
        source="RLinf/RLinf#1469",
        subject=mutant("trusts_orphans"),
    ),
    _SEEDED(
        id="C12_index_before_contents",
        title="The index refers to contents before they are there",
        check=_WRITES,
        shows="_unrecoverable is",
        alive=commits_on_a_bad_disk,
        subtlety=3,
        source="AI-Hypercomputer/maxtext#5260",
        subject=mutant("index_first"),
    ),
    _SEEDED(
        id="C11_written_in_place",
        title="Contents are written over in place",
        check=_WRITES,
        shows="replay_unrecoverable is",
        alive=commits,
        subtlety=2,
        source="Lightning-AI/pytorch-lightning#688",
        subject=mutant("in_place"),
    ),
    _SEEDED(
        id="C20_answers_before_it_commits",
        title="A commit returns before it is made",
        check=_WRITES,
        shows="kill_lost is",
        alive=commits,
        subtlety=3,
        subject=mutant("early_answer"),
    ),
    _SEEDED(
        id="C20_states_committed_one_by_one",
        title="States of one commit become visible one by one",
        check=_WRITES,
        shows="kill_torn is",
        alive=commits,
        subtlety=3,
        source="pytorch/torchtitan#602",
        subject=mutant("two_commits"),
    ),
    _SEEDED(
        id="store_retries_a_failed_sync",
        title="A sync that failed is tried again, and the second try is believed (fsyncgate)",
        check="state.io_errors",
        shows="errors_",
        alive=commits_on_a_bad_disk,
        subtlety=5,
        subject=mutant("retried_sync"),
    ),
    _SEEDED(
        id="store_ignores_a_failed_sync",
        title="A sync that failed is ignored",
        check="state.io_errors",
        shows="errors_",
        alive=commits_on_a_bad_disk,
        subtlety=4,
        subject=mutant("ignored_sync"),
    ),
    _SEEDED(
        id="store_believes_short_writes",
        title="A write that took a part passes for whole",
        check="state.io_errors",
        shows="file_limit_unrecoverable is",
        alive=commits_on_a_bad_disk,
        subtlety=3,
        subject=mutant("short_writes"),
    ),
    _SEEDED(
        id="store_never_verifies",
        title="Contents are not compared with their digest",
        check="state.bit_flips",
        shows="bit_flips_silent is",
        alive=damaged,
        subtlety=2,
        subject=mutant("no_check"),
    ),
    _SEEDED(
        id="store_keeps_no_head",
        title="What was acknowledged is known to the write-ahead log alone",
        check="state.truncation_and_swap",
        shows="swaps_lost is",
        alive=commits,
        subtlety=5,
        subject=mutant("no_head"),
    ),
    _SEEDED(
        id="C10_deletes_damaged",
        title="Damaged contents are deleted instead of set aside",
        check="state.truncation_and_swap",
        shows="swaps_lost is",
        alive=damaged,
        subtlety=3,
        subject=mutant("deletes_damaged"),
    ),
    _SEEDED(
        id="C10_collects_by_a_damaged_history",
        title="A collection takes the generations it can read for all there are",
        check="state.truncation_and_swap",
        shows="swaps_lost is",
        alive=damaged,
        subtlety=5,
        subject=mutant("collects_damaged"),
    ),
    _SEEDED(
        id="store_without_a_lock",
        title="Writers do not exclude each other",
        check="state.concurrent_writers",
        shows="writers_lost is",
        alive=shared,
        subtlety=2,
        subject=mutant("no_lock"),
    ),
    _SEEDED(
        id="store_last_writer_wins",
        title="A commit overwrites one it was not based on",
        check="state.concurrent_writers",
        shows="overwrote a newer one",
        alive=shared,
        subtlety=3,
        subject=mutant("ignores_parent"),
    ),
    _SEEDED(
        id="C10_collects_what_is_being_committed",
        title="A collection takes contents of a commit being made for garbage",
        check="state.collection_keeps_live",
        shows="collection_lost is",
        alive=collected,
        subtlety=4,
        subject=mutant("no_grace"),
    ),
    _SEEDED(
        id="store_readers_without_a_lock",
        title="Readers do not hold collections off",
        check="state.collection_keeps_live",
        shows="collection_lost is",
        alive=shared,
        subtlety=5,
        subject=mutant("no_read_lock"),
    ),
    _SEEDED(
        id="C10_forgets_what_is_kept",
        title="A collection marks from the newest generation only",
        check="state.collection_keeps_live",
        shows="collection_lost is",
        alive=collected,
        subtlety=3,
        source="huggingface/transformers#37260",
        subject=mutant("forgets_kept"),
    ),
    _SEEDED(
        id="C17_migrates_piecemeal",
        title="A migration commits statement by statement",
        check="state.migration_golden",
        shows="migration_lost is",
        alive=old_stores,
        subtlety=4,
        subject=mutant("piecemeal_migration"),
    ),
    _SEEDED(
        id="C17_migrates_without_a_copy",
        title="A migration keeps no copy of the index as it was",
        check="state.migration_golden",
        shows="there is no copy of the index as it was",
        alive=old_stores,
        subtlety=3,
        subject=mutant("no_backup"),
    ),
    _SEEDED(
        id="C21_takes_any_schema",
        title="A schema of a later release is taken for the own one",
        check="state.newer_schema_refused",
        shows="newer_schema_torn is 3 trials, expected 0",
        alive=old_stores,
        subtlety=2,
        source="ollama/ollama#4987",
        subject=mutant("any_schema"),
    ),
    Defect(
        id="C18_saves_the_step_after",
        title="A checkpoint says that one step more was done",
        stage=Stage.STATE,
        check="state.checkpoint_restore",
        shows="resumed_at is 5 steps, expected 4",
        subject=ForgetsTheStep,
        alive=observe.resumed,
        source="huggingface/nanotron 2f9e7d88",
        subtlety=3,
    ),
)
"""Stores, and a checkpoint in one."""
