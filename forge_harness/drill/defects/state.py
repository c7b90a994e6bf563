"""State stores with one seeded bug, and checkpoints that lose something on their way.

The stores are those of `forge_harness.drill.store_mutants`, which the drill of the store measures
its campaigns with; here each is the store of a subject, and a check of the state suite is measured.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from forge_harness.drill import observe
from forge_harness.drill.defect import Defect, Observable, Stage
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
    """

    def __init__(self, opener: str) -> None:
        self.opener = opener

    def state_store(self) -> StoreSpec:
        """See `KeepsState.state_store`."""
        return StoreSpec(opener=self.opener, old_stores=super().state_store().old_stores)


class ForgetsTheStep(ReferenceSubject):
    """Saves a checkpoint under the number of the step that comes next."""

    def save_session(self, session: TrainingSession, path: Path) -> None:
        """See `Checkpoints.save_session`."""
        counted: Any = session
        counted.step_index += 1
        super().save_session(session, path)
        counted.step_index -= 1


def _store(
    id_: str,
    mutant: str,
    title: str,
    check: str,
    shows: str,
    alive: Observable,
    subtlety: int,
    source: str = "",
) -> Defect:
    return Defect(
        id=id_,
        title=title,
        stage=Stage.STATE,
        check=f"state.{check}",
        shows=shows,
        subject=partial(KeepsIn, f"forge_harness.drill.store_mutants:{mutant}"),
        alive=alive,
        subtlety=subtlety,
        source=source,
    )


_WRITES = "commit_atomic"

DEFECTS: tuple[Defect, ...] = (
    _store(
        "C11_contents_not_synced",
        "no_file_sync",
        "Contents are renamed into place and never synced",
        _WRITES,
        "replay_",
        commits,
        4,
        "NVIDIA/nvidia-resiliency-ext#365",
    ),
    _store(
        "C11_names_not_synced",
        "no_name_sync",
        "Directories are not synced after a rename",
        _WRITES,
        "replay_",
        commits,
        4,
    ),
    _store(
        "C11_index_not_synced",
        "unsynced_index",
        "The index answers before it is on disk (SQLite, synchronous=NORMAL)",
        _WRITES,
        "replay_lost is",
        commits,
        4,
    ),
    _store(
        "C11_leftovers_not_synced",
        "no_adopt_sync",
        "A file that a killed writer left is taken over without a sync",
        _WRITES,
        "replay_unrecoverable is",
        commits_over_leftovers,
        5,
    ),
    _store(
        "C12_trusts_leftovers",
        "trusts_orphans",
        "A file that a killed writer left is taken over unread",
        _WRITES,
        "replay_unrecoverable is",
        commits_over_leftovers,
        4,
        "RLinf/RLinf#1469",
    ),
    _store(
        "C12_index_before_contents",
        "index_first",
        "The index refers to contents before they are there",
        _WRITES,
        "_unrecoverable is",
        commits_on_a_bad_disk,
        3,
        "AI-Hypercomputer/maxtext#5260",
    ),
    _store(
        "C11_written_in_place",
        "in_place",
        "Contents are written over in place",
        _WRITES,
        "replay_unrecoverable is",
        commits,
        2,
        "Lightning-AI/pytorch-lightning#688",
    ),
    _store(
        "C20_answers_before_it_commits",
        "early_answer",
        "A commit returns before it is made",
        _WRITES,
        "kill_lost is",
        commits,
        3,
    ),
    _store(
        "C20_states_committed_one_by_one",
        "two_commits",
        "States of one commit become visible one by one",
        _WRITES,
        "kill_torn is",
        commits,
        3,
        "pytorch/torchtitan#602",
    ),
    _store(
        "store_retries_a_failed_sync",
        "retried_sync",
        "A sync that failed is tried again, and the second try is believed (fsyncgate)",
        "io_errors",
        "errors_",
        commits_on_a_bad_disk,
        5,
    ),
    _store(
        "store_ignores_a_failed_sync",
        "ignored_sync",
        "A sync that failed is ignored",
        "io_errors",
        "errors_",
        commits_on_a_bad_disk,
        4,
    ),
    _store(
        "store_believes_short_writes",
        "short_writes",
        "A write that took a part passes for whole",
        "io_errors",
        "file_limit_unrecoverable is",
        commits_on_a_bad_disk,
        3,
    ),
    _store(
        "store_never_verifies",
        "no_check",
        "Contents are not compared with their digest",
        "bit_flips",
        "bit_flips_silent is",
        damaged,
        2,
    ),
    _store(
        "store_keeps_no_head",
        "no_head",
        "What was acknowledged is known to the write-ahead log alone",
        "truncation_and_swap",
        "swaps_lost is",
        commits,
        5,
    ),
    _store(
        "C10_deletes_damaged",
        "deletes_damaged",
        "Damaged contents are deleted instead of set aside",
        "truncation_and_swap",
        "swaps_lost is",
        damaged,
        3,
    ),
    _store(
        "C10_collects_by_a_damaged_history",
        "collects_damaged",
        "A collection takes the generations it can read for all there are",
        "truncation_and_swap",
        "swaps_lost is",
        damaged,
        5,
    ),
    _store(
        "store_without_a_lock",
        "no_lock",
        "Writers do not exclude each other",
        "concurrent_writers",
        "writers_lost is",
        shared,
        2,
    ),
    _store(
        "store_last_writer_wins",
        "ignores_parent",
        "A commit overwrites one it was not based on",
        "concurrent_writers",
        "overwrote a newer one",
        shared,
        3,
    ),
    _store(
        "C10_collects_what_is_being_committed",
        "no_grace",
        "A collection takes contents of a commit being made for garbage",
        "collection_keeps_live",
        "collection_lost is",
        collected,
        4,
    ),
    _store(
        "store_readers_without_a_lock",
        "no_read_lock",
        "Readers do not hold collections off",
        "collection_keeps_live",
        "collection_lost is",
        shared,
        5,
    ),
    _store(
        "C10_forgets_what_is_kept",
        "forgets_kept",
        "A collection marks from the newest generation only",
        "collection_keeps_live",
        "collection_lost is",
        collected,
        3,
        "huggingface/transformers#37260",
    ),
    _store(
        "C17_migrates_piecemeal",
        "piecemeal_migration",
        "A migration commits statement by statement",
        "migration_golden",
        "migration_lost is",
        old_stores,
        4,
    ),
    _store(
        "C17_migrates_without_a_copy",
        "no_backup",
        "A migration keeps no copy of the index as it was",
        "migration_golden",
        "there is no copy of the index as it was",
        old_stores,
        3,
    ),
    _store(
        "C21_takes_any_schema",
        "any_schema",
        "A schema of a later release is taken for the own one",
        "newer_schema_refused",
        "newer_schema_torn is 3 trials, expected 0",
        old_stores,
        2,
        "ollama/ollama#4987",
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
