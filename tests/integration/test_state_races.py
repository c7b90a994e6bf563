"""What another process does between a look at the store and the change that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from forge_harness import StateManager
from forge_harness.errors import StateError
from forge_harness.state import Generation, NewState, Store

Between = Callable[[StateManager], object]


class Interrupted(Store):
    """Lets somebody else go first, once, before it commits or collects."""

    between: Callable[[], object] | None = None

    def writing(self) -> AbstractContextManager[None]:
        between, self.between = self.between, None
        if between is not None:
            between()
        return super().writing()


class Overtaken(Store):
    """Lets somebody else go next, once, after it has committed."""

    after: Callable[[], object] | None = None

    def commit(
        self, states: Sequence[NewState], *, note: str = "", parent: int | None = None
    ) -> Generation:
        made = super().commit(states, note=note, parent=parent)
        after, self.after = self.after, None
        if after is not None:
            after()
        return made


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[tuple[StateManager, StateManager]]:
    """One that can be interrupted, and another of the same store."""
    root = tmp_path / "states"
    with StateManager(root, open_store=Interrupted.open) as ours, StateManager(root) as other:
        ours.save(phase=5, kind="model", name="m", data=b"first" * 20_000)
        yield ours, other


def interrupt(manager: StateManager, between: Callable[[], object]) -> None:
    manager._store.between = between


def newer(manager: StateManager) -> None:
    manager.save(phase=5, kind="model", name="m", data=b"newer" * 20_000)


def test_a_checkpoint_that_was_made_while_a_collection_began_is_kept(managers) -> None:
    """It was acknowledged, and what it named was gone."""
    ours, other = managers

    def name_it_and_go_on() -> None:
        other.checkpoint("named")
        newer(other)

    interrupt(ours, name_it_and_go_on)
    ours.collect(retain=1, grace_s=0.0)
    other.restore("named")
    assert other.load(phase=5, name="m") == b"first" * 20_000


def test_a_checkpoint_names_what_is_still_there(managers) -> None:
    ours, other = managers

    def go_on_and_collect() -> None:
        newer(other)
        other.collect(retain=1, grace_s=0.0)

    interrupt(ours, go_on_and_collect)
    named = ours.checkpoint("named")
    assert other.checkpoints() == {"named": named.number}
    other.restore("named")
    assert other.load(phase=5, name="m") == b"newer" * 20_000


def test_what_was_saved_is_returned_whatever_was_saved_next(tmp_path: Path) -> None:
    """The id was that of another process's state, and so was every lineage made of it."""
    root = tmp_path / "states"
    with StateManager(root, open_store=Overtaken.open) as ours, StateManager(root) as other:
        ours._store.after = lambda: newer(other)
        saved = ours.save(phase=5, kind="model", name="m", data=b"ours")
        assert (saved.generation, saved.files["data"].size) == (1, 4)

        def theirs() -> None:
            newer(other)
            other.migrate(phase=5, name="m", to_phase=6)

        ours._store.after = theirs
        moved = ours.migrate(phase=5, name="m", to_phase=6)
        assert moved.generation == 3
        assert ours.get(phase=6, name="m").generation == 5


def test_a_migration_takes_no_name_that_was_taken_meanwhile(managers) -> None:
    """The other state was replaced, although one of that name is refused."""
    ours, other = managers
    interrupt(ours, lambda: other.save(phase=6, kind="model", name="m", data=b"theirs"))
    with pytest.raises(StateError, match="does not come from phase5/m"):
        ours.migrate(phase=5, name="m", to_phase=6)
    assert other.load(phase=6, name="m") == b"theirs"


def test_a_migration_takes_over_what_is_there_when_it_is_made(managers) -> None:
    ours, other = managers
    interrupt(ours, lambda: newer(other))
    ours.migrate(phase=5, name="m", to_phase=6)
    assert other.load(phase=6, name="m") == b"newer" * 20_000


def test_a_store_that_is_written_to_all_the_time_is_one_sentence(managers) -> None:
    ours, other = managers
    commit = ours._store.commit

    def never_first(states: list[NewState], **options: object) -> Generation:
        newer(other)
        return commit(states, **options)

    ours._store.commit = never_first
    with pytest.raises(StateError, match="written to all the time"):
        ours.checkpoint("named")
