from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_harness.errors import (
    ConflictError,
    DamagedStateError,
    ExitCode,
    StateError,
    UnknownStateError,
    WrongKeyError,
)
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import KeyringSealer
from forge_harness.state import BlobRef, NewState, Store

LARGE = os.urandom(9 << 20)
"""Three chunks of 4 MiB, the last one short."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def new(name: str, content: bytes | Path = b"content", phase: str = "phase5") -> NewState:
    return NewState(phase=phase, kind="checkpoint", name=name, files={"data": content})


def objects(store: Store) -> list[Path]:
    return sorted(path for path in (store.root / "objects").rglob("*") if path.is_file())


@pytest.mark.parametrize("content", [b"", b"x", bytes(32 << 10), bytes((32 << 10) + 1), LARGE])
def test_what_was_committed_is_read_back_after_reopening(tmp_path: Path, content: bytes) -> None:
    state = NewState(
        phase="phase5",
        kind="checkpoint",
        name="a/b",
        files={"data": content, "notes": "häß".encode()},
        metadata={"loss": 1.5, "nested": {"list": [1, None, "ü"]}},
        parents=("0" * 32,),
    )
    with Store.open(tmp_path / "store") as store:
        generation = store.commit([state], note="why")
    with Store.open(tmp_path / "store", read_only=True) as store:
        found = store.get("phase5", "a/b")
        assert store.read(found) == content
        assert store.read(found, "notes") == "häß".encode()
        assert found.files["data"] == BlobRef(hashlib.sha256(content).hexdigest(), len(content))
        assert (found.metadata, found.parents) == (state.metadata, state.parents)
        assert (found.kind, found.generation) == ("checkpoint", 1)
        assert store.current() == generation
        assert (generation.note, generation.changed) == ("why", (found.id,))
        assert store.verify().problems == ()


def test_a_file_is_committed_and_copied_out_without_loading_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(LARGE)
    with Store.open(tmp_path / "store") as store:
        store.commit([new("large", source), new("small", Path(__file__))])
        store.copy_to(store.get("phase5", "large"), "data", tmp_path / "out" / "copy")
        store.copy_to(store.get("phase5", "small"), "data", tmp_path / "small")
        assert [path.name for path in objects(store)] == [hashlib.sha256(LARGE).hexdigest()]
    assert (tmp_path / "out" / "copy").read_bytes() == LARGE
    assert (tmp_path / "small").read_bytes() == Path(__file__).read_bytes()


def test_equal_content_is_kept_once(store: Store) -> None:
    store.commit([new("a", LARGE), new("b", LARGE)])
    store.commit([new("c", LARGE)])
    ref = store.get("phase5", "a").files["data"]
    store.commit([NewState(phase="p", kind="k", name="d", files={"data": ref})])
    assert len(objects(store)) == 1
    assert store.read(store.get("p", "d")) == LARGE
    assert not list((store.root / "tmp").iterdir())


def test_a_reference_to_content_that_is_not_held_is_refused(store: Store) -> None:
    ref = BlobRef("0" * 64, 3)
    with pytest.raises(UnknownStateError, match="does not hold content 0000"):
        store.commit([NewState(phase="p", kind="k", name="a", files={"data": ref})])
    assert store.current() is None


def test_a_state_may_have_metadata_only(store: Store) -> None:
    store.commit([NewState(phase="p", kind="k", name="a", files={}, metadata={"x": 1})])
    assert store.get("p", "a").metadata == {"x": 1}
    assert store.verify().ok


def test_one_commit_of_several_states_is_one_generation(store: Store) -> None:
    generation = store.commit([new("b"), new("a"), new("c", phase="phase4")])
    assert generation.number == 1
    assert [(s.phase, s.name) for s in store.list()] == [
        ("phase4", "c"),
        ("phase5", "a"),
        ("phase5", "b"),
    ]
    assert [s.name for s in store.list(phase="phase4")] == ["c"]
    assert store.list(kind="else") == []
    assert len({*generation.changed}) == 3


def test_each_generation_names_its_parent_and_keeps_its_view(store: Store) -> None:
    first = store.commit([new("a", b"1"), new("b", b"1")])
    second = store.commit([new("a", b"2")])
    third = store.remove("phase5", "b")
    assert [g.parent_digest for g in (first, second, third)] == [
        None,
        first.manifest_digest,
        second.manifest_digest,
    ]
    assert store.generations() == [first, second, third]
    views = {
        number: {s.name: store.read(s) for s in store.list(generation=number)}
        for number in (1, 2, 3)
    }
    assert views == {1: {"a": b"1", "b": b"1"}, 2: {"a": b"2", "b": b"1"}, 3: {"a": b"2"}}
    assert store.read(store.get("phase5", "b", generation=2)) == b"1"


def test_restore_appends_a_generation_equal_to_an_old_one(store: Store) -> None:
    store.commit([new("a", b"1"), new("gone", b"1"), new("kept", b"1", "phase6")])
    old = store.list()
    store.commit([new("a", b"2"), new("late", b"2"), new("kept", b"2", "phase6")])
    store.remove("phase5", "gone")
    restored = store.restore(1)
    assert restored.number == 4
    assert store.list() == old
    store.restore(2, keep_phases=["phase6"])
    assert {s.name: store.read(s) for s in store.list()} == {
        "a": b"2",
        "gone": b"1",
        "late": b"2",
        "kept": b"1",
    }
    assert store.verify().ok


def test_a_commit_based_on_another_generation_is_refused(tmp_path: Path, store: Store) -> None:
    store.commit([new("a")])
    with Store.open(store.root) as other:
        other.commit([new("b")], parent=1)
    with pytest.raises(ConflictError, match=r"generation 1 and the store is at generation 2") as e:
        store.commit([new("c", LARGE)], parent=1)
    assert e.value.exit_code == ExitCode.USAGE
    assert [s.name for s in store.list()] == ["a", "b"]
    assert not list((store.root / "tmp").iterdir())


def test_unknown_names_are_refused_with_the_nearest(store: Store) -> None:
    store.commit([new("model-final")])
    with pytest.raises(UnknownStateError, match="Did you mean 'phase5/model-final'"):
        store.get("phase5", "model-finale")
    with pytest.raises(UnknownStateError, match="Did you mean 'data'"):
        store.read(store.get("phase5", "model-final"), "date")
    with pytest.raises(UnknownStateError, match="Generation 7"):
        store.list(generation=7)
    with pytest.raises(UnknownStateError, match="no state phase5/other"):
        store.remove("phase5", "other")
    with pytest.raises(UnknownStateError, match="Generation 9"):
        store.restore(9)
    with pytest.raises(UnknownStateError, match="no state with id 'x'"):
        store.state("x")
    assert store.current().number == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "states",
    [
        [],
        [new("a"), new("a", b"other")],
        [NewState(phase="p", kind="k", name="a", files={}, metadata={"x": float("nan")})],
        [NewState(phase="p", kind="k", name="a", files={}, metadata={"x": object()})],
        [NewState(phase="p", kind="k", name="a", files={"data": Path("/no/such/file")})],
    ],
    ids=["none", "twice", "nan", "object", "no file"],
)
def test_what_cannot_be_kept_is_refused_whole(store: Store, states: list[NewState]) -> None:
    with pytest.raises(StateError):
        store.commit(states)
    assert store.current() is None


@pytest.mark.parametrize("label", ["", "a\n", "\0", "x" * 256, "\ud800"])
def test_labels_are_checked(label: str) -> None:
    with pytest.raises(StateError, match="expected 1 to 255 characters"):
        NewState(phase="p", kind="k", name=label, files={})


def test_a_flipped_bit_is_never_returned_and_its_chunk_is_named(store: Store) -> None:
    store.commit([new("a", LARGE)])
    state, (path,) = store.get("phase5", "a"), objects(store)
    damaged = bytearray(LARGE)
    damaged[5 << 20] ^= 1
    path.write_bytes(damaged)
    assert "first wrong byte is in 4194304..8388607" in store.verify().problems[0].what
    with pytest.raises(DamagedStateError, match=r"4194304\.\.8388607") as caught:
        store.read(state)
    assert caught.value.exit_code == ExitCode.VERIFICATION_FAILED
    assert (caught.value.digest, caught.value.path) == (state.files["data"].digest, str(path))
    assert [p.read_bytes() for p in (store.root / "quarantine").iterdir()] == [bytes(damaged)]
    with pytest.raises(DamagedStateError, match="file is missing"):
        store.read(state)
    store.commit([new("a", LARGE)])
    assert store.read(state) == LARGE


def test_copying_damaged_content_leaves_the_target_as_it_was(store: Store, tmp_path: Path) -> None:
    store.commit([new("a", LARGE)])
    (path,) = objects(store)
    path.write_bytes(LARGE[:-1])
    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(DamagedStateError, match="has 9437183 bytes; expected 9437184"):
        store.copy_to(store.get("phase5", "a"), "data", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []


def test_damaged_content_in_the_index_is_never_returned(store: Store) -> None:
    store.commit([new("a", b"right")])
    store._opened().connection.execute("UPDATE object SET content = x'00'")
    with pytest.raises(DamagedStateError, match="has 1 bytes; expected 5"):
        store.read(store.get("phase5", "a"))
    assert [p.read_bytes() for p in (store.root / "quarantine").iterdir()] == [b"\0"]
    store.commit([new("b", b"right")])
    assert store.read(store.get("phase5", "a")) == b"right"


def test_verify_moves_nothing_unless_asked(store: Store) -> None:
    store.commit([new("a", LARGE)])
    (path,) = objects(store)
    path.write_bytes(b"")
    assert not store.verify(deep=False).ok
    assert path.exists()
    report = store.verify(quarantine=True)
    assert (report.ok, path.exists(), store.verify().quarantined) == (False, False, 1)


def test_a_read_only_store_changes_nothing(store: Store) -> None:
    store.commit([new("a", LARGE)])
    (path,) = objects(store)
    path.write_bytes(b"damaged")
    with Store.open(store.root, read_only=True) as reader:
        with pytest.raises(DamagedStateError):
            reader.read(reader.get("phase5", "a"))
        assert path.exists()
        for change in (
            lambda: reader.commit([new("b")]),
            lambda: reader.remove("phase5", "a"),
            lambda: reader.restore(1),
            reader.collect,
        ):
            with pytest.raises(StateError, match="opened read-only"):
                change()


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(StateError, match="was closed"):
        store.list()


def test_threads_share_a_store(store: Store) -> None:
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for step in range(5):
                content = f"{worker} {step}".encode() * 10_000
                store.commit([new(f"{worker}", content)])
                assert store.read(store.get("phase5", f"{worker}")) == content
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.current().number == 20  # type: ignore[union-attr]
    assert store.verify().ok


def test_what_another_process_sealed_stops_a_writer_without_a_key(tmp_path):
    def new(name):
        return NewState(phase="phase5", kind="model", name=name, files={"data": name.encode()})

    with Store.open(tmp_path / "store") as plain:
        plain.commit([new("one")])
        plain.commit([new("two")])
        with Store.open(tmp_path / "store", sealer=KeyringSealer(Keyring.new())) as sealing:
            sealing.commit([new("three")])
        with pytest.raises(StateError, match="holds sealed contents"):
            plain.commit([new("four")])


def test_a_commit_does_not_look_through_all_contents(tmp_path):
    with Store.open(tmp_path / "store") as store:
        asked = []
        store._opened().connection.set_trace_callback(asked.append)
        for name in ("a", "b", "c"):
            store.commit(
                [NewState(phase="p", kind="model", name=name, files={"data": name.encode()})]
            )
        store._opened().connection.set_trace_callback(None)
    assert sum("WHERE sealed" in query for query in asked) == 1


OUTSIDE = ["../pwned", "/tmp/pwned", "a/../../pwned", "a//b", "./a", "a/", ".", "..", "a\\..\\b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_name_stays_within_its_state(name: str) -> None:
    with pytest.raises(StateError, match="is no relative path"):
        NewState(phase="phase5", kind="package", name="p", files={"ok": b"", name: b""})


def test_a_file_is_no_directory_of_another() -> None:
    with pytest.raises(StateError, match="'a/b' of a state is also the directory of 'a/b/c'"):
        NewState(phase="phase5", kind="package", name="p", files={"a/b/c": b"", "a/b": b""})
    NewState(phase="phase5", kind="package", name="p", files={"a.b/c": b"", "a": b"", "..a": b""})


def test_keys_of_another_keyring_seal_nothing_beside_what_is_there(tmp_path):
    """No one keyring opened all of the store any more, and nobody was told."""
    root, ours = tmp_path / "store", Keyring.new()
    for name, content in (("small", b"x"), ("large", bytes(100_000))):
        with Store.open(root, sealer=KeyringSealer(ours)) as store:
            store.commit([new(name, content)])
        with Store.open(root, sealer=KeyringSealer(Keyring.new())) as store:
            for change in (
                lambda store=store: store.commit([new("other")]),
                lambda store=store, name=name: store.remove("phase5", name),
                lambda store=store: store.restore(1),
            ):
                with pytest.raises(WrongKeyError, match="open it with the keyring it was sealed"):
                    change()
            assert len(store.generations()) == len(store.list())


@pytest.mark.parametrize("content", [b"x", bytes(100_000)], ids=["small", "large"])
def test_a_store_that_stays_open_goes_on_under_the_key_it_was_put_under(tmp_path, content):
    """It went on under the former key, and what it wrote was lost when that was destroyed."""
    root, first = tmp_path / "store", Keyring.new()
    given = {"keyring": first}
    with (
        Store.open(root, sealer=KeyringSealer(first)) as stays,
        Store.open(root, sealer=KeyringSealer(lambda: given["keyring"])) as follows,
    ):
        stays.commit([new("old", content)])
        follows.commit([new("older", b"other" + content)])
        after = first.rotated()
        with Store.open(root, sealer=KeyringSealer(after)) as other:
            assert other.rewrap() == (2, 2)
        with pytest.raises(WrongKeyError):
            stays.commit([new("late", b"late" + content)])
        given["keyring"] = after
        follows.commit([new("fresh", b"fresh" + content)])
    with Store.open(root, sealer=KeyringSealer(after.destroyed(first.active_id()))) as store:
        assert store.verify().problems == ()
        assert {state.name for state in store.list()} == {"old", "older", "fresh"}


def test_what_was_sealed_while_the_keys_were_rotated_comes_under_the_new_one(tmp_path):
    root, first = tmp_path / "store", Keyring.new()
    given = {"keyring": first}
    with Store.open(root) as store:
        store.commit([new("a", b"plain")])

    class Rotated(Store):
        def writing(self):
            given["keyring"] = first.rotated()
            return super().writing()

    with Rotated.open(root, sealer=KeyringSealer(lambda: given["keyring"])) as store:
        store.commit([new("large", bytes(100_000)), new("small", b"x")])
    after = given["keyring"].destroyed(first.active_id())
    with Store.open(root, sealer=KeyringSealer(after)) as store:
        assert store.verify().problems == ()


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_a_store_that_was_replaced_while_it_is_open_takes_no_commit(tmp_path, becomes):
    """A copy put in its place never saw what was acknowledged into the file that was removed."""
    root = tmp_path / "store"
    with Store.open(root) as store:
        store.commit([new("a")])
        shutil.copytree(root, tmp_path / "copy")
        shutil.rmtree(root)
        if becomes == "another":
            shutil.copytree(tmp_path / "copy", root)
        with pytest.raises(StateError, match=r"replaced since|Nothing was committed"):
            store.commit([new("b")])
        assert [state.name for state in store.list()] == ["a"]
    if becomes == "another":
        with Store.open(root) as store:
            assert store.verify().ok
            assert [state.name for state in store.list()] == ["a"]


def test_a_destroyed_key_keeps_nothing_new_out(tmp_path):
    """Its id stays in the keyring: what was lost with it was meant to be."""
    root, first = tmp_path / "store", Keyring.new()
    with Store.open(root, sealer=KeyringSealer(first)) as store:
        store.commit([new("old")])
    after = first.rotated().destroyed(first.active_id())
    with Store.open(root, sealer=KeyringSealer(after)) as store:
        store.commit([new("fresh", b"another")])
        assert store.read(store.get("phase5", "fresh")) == b"another"


@pytest.mark.parametrize("content", [b"x", bytes(100_000)])
def test_what_a_destroyed_key_sealed_can_be_committed_again(tmp_path, content):
    """It was refused for good: the copy nobody can open passed for the one that was meant."""
    root, first = tmp_path / "store", Keyring.new()
    with Store.open(root, sealer=KeyringSealer(first)) as store:
        store.commit([new("old", content)])
    after = first.rotated().destroyed(first.active_id())
    with Store.open(root, sealer=KeyringSealer(after)) as store:
        store.commit([new("old", content)])
        assert store.read(store.get("phase5", "old")) == content
        assert store.verify().problems == ()


@pytest.mark.parametrize("content", [b"x", bytes(100_000)])
def test_sealed_content_that_is_damaged_says_nothing_about_keys(tmp_path, content):
    root, sealer = tmp_path / "store", KeyringSealer(Keyring.new())
    with Store.open(root, sealer=sealer) as store:
        store.commit([new("old", content)])
    for path in (root / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    with Store.open(root, sealer=sealer) as store:
        assert store.commit([new("fresh")]).number == 2


def test_a_commit_on_an_empty_store_is_one_on_generation_0(tmp_path):
    with Store.open(tmp_path / "store") as store:
        assert store.commit([new("a")], parent=0).number == 1
        with pytest.raises(ConflictError, match="based on generation 0 and the store is at"):
            store.commit([new("a")], parent=0)


@pytest.mark.parametrize("harm", ["removed", "cut", "head"])
def test_one_lost_content_keeps_no_other_under_the_old_key(tmp_path, harm):
    """The rest stayed under a key that was then destroyed, or could never be."""
    root, old = tmp_path / "store", Keyring.new()
    with Store.open(root, sealer=KeyringSealer(old)) as store:
        for number in range(6):
            content = bytes([number]) * (100_000 if number % 2 else 100)
            store.commit([new(f"n{number}", content)])
        lost = store.get("phase5", "n3").files["data"]
        path = (
            root / "objects" / (stored := store._opened().object(lost.digest).stored)[:2] / stored
        )
    if harm == "removed":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        path.write_bytes(bytes(200) + path.read_bytes()[200:])
    after = old.rotated()
    with Store.open(root, sealer=KeyringSealer(after)) as store:
        with pytest.raises(StateError, match="1 of 6 sealed contents") as caught:
            store.rewrap()
        assert lost.digest in str(caught.value)
    gone = after.destroyed(old.active_id())
    with Store.open(root, sealer=KeyringSealer(gone)) as store:
        for number in (0, 1, 2, 4, 5):
            assert store.read(store.get("phase5", f"n{number}"))[:1] == bytes([number])


def test_a_lock_that_cannot_be_opened_is_one_sentence_for_readers_too(tmp_path):
    """`verify` said to name a place that can be written to."""
    root = tmp_path / "store"
    with Store.open(root) as store:
        store.commit([new("a", bytes(100_000))])
        (root / "lock").unlink()
        (root / "lock").symlink_to("lock")
        for look in (store.verify, lambda: store.read(store.get("phase5", "a"))):
            with pytest.raises(StateError, match=r"could not be (read|verified): Too many levels"):
                look()


def read_all(root: Path) -> None:
    with Store.open(root) as store:
        for state in store.list():
            store.read(state)


@pytest.mark.parametrize("name", ["head", "losses", "index.db", "content"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    root = tmp_path / "store"
    with Store.open(root) as store:
        store.commit([new("a", bytes(100_000))])
        (content,) = objects(store)
    path = content if name == "content" else root / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(StateError, match=r"it is not a plain file|it has 0 bytes; expected"):
        read_all(root)


def test_a_pipe_in_place_of_the_lock_keeps_no_reader_waiting(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with Store.open(root) as store:
        store.commit([new("a", bytes(100_000))])
    (root / "lock").unlink()
    os.mkfifo(root / "lock")
    read_all(root)
