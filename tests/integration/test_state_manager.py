from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from forge_harness import StateManager
from forge_harness.errors import (
    AuditError,
    DamagedStateError,
    StateError,
    UnknownStateError,
    WrongKeyError,
)
from forge_harness.integration.state_kinds import StateKind
from forge_harness.integration.state_manager import StateInput
from forge_harness.security.audit import AuditLog
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import HEAD_BYTES, KeyringSealer
from forge_harness.state import NewState, Store


@pytest.fixture
def manager(tmp_path: Path):
    with StateManager(tmp_path / "states") as opened:
        yield opened


def reopened(manager: StateManager) -> StateManager:
    manager.close()
    return StateManager(manager.root, create=False)


def test_what_was_saved_is_there_after_reopening(manager: StateManager) -> None:
    weights = {"layer.weight": torch.arange(6.0).reshape(2, 3), "step": 7}
    first = manager.save(phase=5, kind="checkpoint", name="digits/step-7", data=weights)
    manager.save(phase="phase5", kind="metrics", name="digits", data={"accuracy": 0.98})
    with reopened(manager) as again:
        loaded = again.load(phase="Phase 5", name="digits/step-7")
        assert torch.equal(loaded["layer.weight"], weights["layer.weight"])
        assert loaded["step"] == 7
        assert again.load(phase=5, name="digits") == {"accuracy": 0.98}
        assert again.get(phase=5, name="digits/step-7") == first
        assert again.verify().ok


def test_a_new_version_leaves_the_old_one_in_its_generation(manager: StateManager) -> None:
    old = manager.save(phase=4, kind="config", name="c", data={"a": 1})
    new = manager.save(phase=4, kind="config", name="c", data={"a": 2})
    assert manager.load(phase=4, name="c") == {"a": 2}
    assert manager.load(phase=4, name="c", generation=old.generation) == {"a": 1}
    assert new.generation == old.generation + 1


def test_several_states_are_one_generation_or_none(manager: StateManager, tmp_path: Path) -> None:
    given = [
        StateInput(phase=5, kind="metrics", name="m", data={"loss": 1.0}),
        StateInput(phase=5, kind="model", name="w", data=b"weights"),
    ]
    saved = manager.save_all(given)
    assert len({state.generation for state in saved}) == 1
    broken = [*given, StateInput(phase=5, kind="model", name="x", data=tmp_path / "missing")]
    before = manager.summary()
    with pytest.raises(StateError, match="no file or directory"):
        manager.save_all(broken)
    assert manager.summary() == before


def test_unknown_names_and_kinds_are_one_sentence(manager: StateManager) -> None:
    manager.save(phase=5, kind="model", name="digits", data=b"w")
    with pytest.raises(UnknownStateError, match="digits"):
        manager.load(phase=5, name="digit")
    with pytest.raises(StateError, match="Did you mean 'model'"):
        manager.save(phase=5, kind="modle", name="digits", data=b"w")
    with pytest.raises(StateError, match="is no name of a state"):
        manager.save(phase=5, kind="model", name="../escape", data=b"w")
    with pytest.raises(StateError, match="store's own"):
        manager.save(phase="checkpoints", kind="model", name="a", data=b"w")


def test_own_kinds_have_their_own_schema(tmp_path: Path) -> None:
    recipe = StateKind(name="recipe", holds="a recipe", required=("steps",))
    with StateManager(tmp_path / "states", kinds=[recipe]) as manager:
        manager.save(phase=5, kind="recipe", name="r", data={"steps": 3})
        with pytest.raises(StateError, match="lacks 'steps'"):
            manager.save(phase=5, kind="recipe", name="r", data={})


def test_a_checkpoint_brings_everything_back_and_forgets_nothing(manager: StateManager) -> None:
    manager.save(phase=5, kind="config", name="kept", data={"lr": 1})
    manager.checkpoint("before")
    manager.save(phase=5, kind="config", name="kept", data={"lr": 2})
    manager.save(phase=5, kind="config", name="later", data={"x": 0})
    after = manager.checkpoint("after")
    manager.restore("before")
    assert [state.name for state in manager.list()] == ["kept"]
    assert manager.load(phase=5, name="kept") == {"lr": 1}
    assert set(manager.checkpoints()) == {"before", "after"}
    manager.restore("after")
    assert manager.load(phase=5, name="kept") == {"lr": 2}
    assert manager.load(phase=5, name="later") == {"x": 0}
    manager.restore(after.number)
    with pytest.raises(UnknownStateError, match="Did you mean 'before'"):
        manager.restore("befor")


@pytest.mark.parametrize("target", [None, True, 1.0])
def test_what_is_no_generation_is_not_restored(manager: StateManager, target: object) -> None:
    """None, of a label nobody had set, restored what was there already, and said it had."""
    manager.save(phase=5, kind="config", name="c", data={})
    with pytest.raises(StateError, match=f"What to restore is {target}; expected the label"):
        manager.restore(target)  # type: ignore[arg-type]
    assert len(manager.generations()) == 1


def test_collection_keeps_checkpoints_and_the_newest(manager: StateManager) -> None:
    for value in range(4):
        manager.save(phase=5, kind="data", name="d", data=bytes([value]) * 100_000)
        if value == 1:
            manager.checkpoint("one")
    manager.collect(retain=1, grace_s=0.0)
    assert manager.load(phase=5, name="d") == bytes([3]) * 100_000
    manager.restore("one")
    assert manager.load(phase=5, name="d") == bytes([1]) * 100_000
    assert manager.verify().ok


def test_migration_keeps_content_and_lineage_and_is_idempotent(manager: StateManager) -> None:
    source = manager.save(phase=5, kind="package", name="digits", data=b"w" * 50_000)
    moved = manager.migrate(phase=5, name="digits", to_phase=6)
    assert (moved.phase, moved.parents, moved.files) == ("phase6", (source.id,), source.files)
    assert manager.load(phase=6, name="digits") == b"w" * 50_000
    generations = len(manager.generations())
    assert manager.migrate(phase=5, name="digits", to_phase=6) == moved
    assert len(manager.generations()) == generations
    newer = manager.save(phase=5, kind="package", name="digits", data=b"x")
    assert manager.migrate(phase=5, name="digits", to_phase=6).parents == (newer.id,)
    assert manager.summary().migrated == 1


def test_a_migration_does_not_overwrite_what_is_not_its_own(manager: StateManager) -> None:
    manager.save(phase=5, kind="model", name="a", data=b"5")
    manager.save(phase=6, kind="model", name="a", data=b"6")
    with pytest.raises(StateError, match="does not come from phase5/a; give another name"):
        manager.migrate(phase=5, name="a", to_phase=6)
    assert manager.load(phase=6, name="a") == b"6"
    assert manager.migrate(phase=5, name="a", to_phase=6, new_name="b").name == "b"


def test_a_state_is_migrated_under_whatever_name_it_has(manager: StateManager) -> None:
    """A run that is kept has the name of its directory, which no rule of ours was asked about."""
    given = NewState(phase="phase5", kind="package", name="lauf ä/package", files={"data": b"w"})
    with Store.open(manager.root) as store:
        store.commit([given])
    assert manager.migrate(phase=5, name="lauf ä/package", to_phase=6).name == "lauf ä/package"
    with pytest.raises(StateError, match="is no name of a state"):
        manager.migrate(phase=5, name="lauf ä/package", to_phase=6, new_name="ä")


def test_a_damaged_state_is_not_migrated(manager: StateManager) -> None:
    state = manager.save(phase=5, kind="model", name="a", data=b"5" * 200_000)
    (blob,) = state.files.values()
    (file,) = manager.root.rglob(f"*{blob.digest[2:]}*")
    file.chmod(0o600)
    content = bytearray(file.read_bytes())
    content[100_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStateError):
        manager.migrate(phase=5, name="a", to_phase=6)
    assert [found.phase for found in manager.list()] == ["phase5"]


def test_summary_counts_by_phase_and_kind(manager: StateManager) -> None:
    for phase, count in ((4, 2), (5, 3), (6, 1)):
        for index in range(count):
            manager.save(phase=phase, kind="config", name=f"c{index}", data={"n": index})
    manager.checkpoint("all")
    summary = manager.summary()
    assert summary.states == 6
    assert dict(summary.phases) == {"phase4": 2, "phase5": 3, "phase6": 1}
    assert dict(summary.kinds) == {"config": 6}
    assert summary.checkpoints == ("all",)


def test_files_of_a_directory_are_written_out_verified(
    manager: StateManager, tmp_path: Path
) -> None:
    (tmp_path / "package" / "sub").mkdir(parents=True)
    (tmp_path / "package" / "a").write_bytes(b"a" * 100_000)
    (tmp_path / "package" / "sub" / "b").write_bytes(b"b")
    manager.save(phase=5, kind="package", name="p", data=tmp_path / "package")
    manager.copy_out(tmp_path / "out", phase=5, name="p")
    assert (tmp_path / "out" / "a").read_bytes() == b"a" * 100_000
    assert (tmp_path / "out" / "sub" / "b").read_bytes() == b"b"
    with pytest.raises(StateError, match="give a new one"):
        manager.copy_out(tmp_path / "out", phase=5, name="p")
    assert manager.load(phase=5, name="p") == {"a": b"a" * 100_000, "sub/b": b"b"}


def test_a_missing_store_is_not_made_when_it_should_be_there(tmp_path: Path) -> None:
    with pytest.raises(StateError):
        StateManager(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def sealed_manager(root: Path, keyring: Keyring) -> StateManager:
    return StateManager(root, sealer=KeyringSealer(keyring))


def test_a_sealed_store_changes_its_key_without_rewriting_contents(tmp_path: Path) -> None:
    root, before = tmp_path / "states", Keyring.new()
    big, small = b"model weights" * 100_000, b"a few secret bytes"
    with sealed_manager(root, before) as manager:
        manager.save(phase=5, kind="model", name="big", data=big)
        manager.save(phase=5, kind="config", name="small", data=small)
    for path in root.rglob("*"):
        if path.is_file():
            assert not any(needle in path.read_bytes() for needle in (big[:64], small)), path
    (blob,) = (path for path in (root / "objects").rglob("*") if path.is_file())
    body = blob.read_bytes()[HEAD_BYTES:]
    after = before.rotated()
    with sealed_manager(root, after) as manager:
        assert manager.rewrap() == (2, 2)
        assert manager.rewrap() == (0, 2)
        assert manager.verify().ok
    assert blob.read_bytes()[HEAD_BYTES:] == body
    with sealed_manager(root, after.destroyed(before.active_id())) as manager:
        assert manager.load(phase=5, name="big") == big
        assert manager.load(phase=5, name="small") == small
    with StateManager(root) as manager:  # no key: everything is checked as it lies on disk
        report = manager.verify()
        assert (report.problems, report.unopened, report.ok) == ((), 2, False)


def test_without_or_with_another_key_nothing_is_read_or_written(tmp_path: Path) -> None:
    root = tmp_path / "states"
    with sealed_manager(root, Keyring.new()) as manager:
        manager.save(phase=5, kind="model", name="m", data=b"m" * 100_000)
    with StateManager(root) as manager:
        with pytest.raises(StateError, match="sealed and the store was opened without a key"):
            manager.load(phase=5, name="m")
        with pytest.raises(StateError, match="nothing is written in the clear"):
            manager.save(phase=5, kind="model", name="n", data=b"n")
        with pytest.raises(StateError, match="opened without a key"):
            manager.rewrap()
    with sealed_manager(root, Keyring.new()) as manager:
        with pytest.raises(WrongKeyError, match="the keyring has"):
            manager.load(phase=5, name="m")
        with pytest.raises(WrongKeyError):
            manager.rewrap()
    assert not any((root / "quarantine").iterdir())


def test_a_flipped_bit_of_a_sealed_content_is_found_with_and_without_the_key(
    tmp_path: Path,
) -> None:
    root, keyring = tmp_path / "states", Keyring.new()
    with sealed_manager(root, keyring) as manager:
        manager.save(phase=5, kind="model", name="m", data=b"m" * 100_000)
    (blob,) = (path for path in (root / "objects").rglob("*") if path.is_file())
    content = bytearray(blob.read_bytes())
    content[50_000] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(content)
    with StateManager(root) as manager:
        assert not manager.verify().ok
    with sealed_manager(root, keyring) as manager:
        assert not manager.verify().ok
        with pytest.raises(DamagedStateError):
            manager.load(phase=5, name="m")


@pytest.fixture
def audited(tmp_path: Path):
    keyring = Keyring.new()
    log = AuditLog.of_keyring(tmp_path / "audit.db", keyring)
    options = {"sealer": KeyringSealer(keyring), "audit": log, "actor": "ann"}
    with log, StateManager(tmp_path / "states", **options) as manager:
        yield manager, log


def recorded(log: AuditLog) -> list[tuple[str, str, str]]:
    return [(r.event.action, r.event.resource, r.event.decision) for r in log.tail(100)]


def test_every_change_and_every_copy_is_in_the_audit_log(audited, tmp_path: Path) -> None:
    manager, log = audited
    manager.save(phase=4, kind="config", name="c", data={"a": 1})
    manager.checkpoint("first")
    manager.migrate(phase=4, name="c", to_phase=5)
    manager.copy_out(tmp_path / "copy", phase=5, name="c")
    manager.remove(phase=4, name="c")
    manager.restore("first")
    manager.collect(retain=1)
    manager.rewrap()
    store = str(tmp_path / "states")
    assert recorded(log) == [
        ("state.save", "phase4/c", "allow"),
        ("state.checkpoint", "first", "allow"),
        ("state.migrate", "phase4/c, phase5/c", "allow"),
        ("state.copy_out", "phase5/c", "allow"),
        ("state.remove", "phase4/c", "allow"),
        ("state.restore", "1", "allow"),
        ("state.collect", store, "allow"),
        ("state.rewrap", store, "allow"),
    ]
    assert {r.event.actor for r in log.tail(100)} == {"ann"}


def test_what_ended_with_an_error_is_recorded_as_such(audited, tmp_path: Path) -> None:
    manager, log = audited
    manager.save(phase=4, kind="config", name="c", data={"a": 1})
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    with pytest.raises(StateError):
        manager.copy_out(tmp_path / "copy", phase=4, name="c")
    assert recorded(log)[1:] == [
        ("state.copy_out", "phase4/c", "allow"),
        ("state.copy_out", "phase4/c", "error"),
    ]


def test_what_cannot_be_recorded_is_not_done(audited) -> None:
    manager, log = audited
    manager.save(phase=4, kind="config", name="c", data={"a": 1})
    log.close()
    before = manager.summary()
    for act in (
        lambda: manager.save(phase=4, kind="config", name="d", data={"a": 2}),
        lambda: manager.checkpoint("first"),
        lambda: manager.remove(phase=4, name="c"),
        lambda: manager.migrate(phase=4, name="c", to_phase=5),
        lambda: manager.collect(retain=1),
    ):
        with pytest.raises(AuditError):
            act()
    assert manager.summary() == before


def test_what_no_head_vouches_for_is_not_done_and_recorded_as_an_error(
    audited, tmp_path: Path
) -> None:
    manager, log = audited
    manager.save(phase=4, kind="config", name="c", data={"a": 1})
    heads = tmp_path / "audit.db.heads"
    heads.rename(tmp_path / "kept")
    heads.mkdir()
    before = manager.summary()
    with pytest.raises(AuditError):
        manager.save(phase=4, kind="config", name="d", data={"a": 2})
    heads.rmdir()
    (tmp_path / "kept").rename(heads)
    assert manager.summary() == before
    assert recorded(log)[1:] == [
        ("state.save", "phase4/d", "allow"),
        ("state.save", "phase4/d", "error"),
    ]


@pytest.mark.parametrize("name", ["../pwned", "{tmp}/pwned", "sub/../../pwned"])
def test_a_store_that_would_write_elsewhere_is_damaged_and_not_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root, name = tmp_path / "states", name.format(tmp=tmp_path)
    with monkeypatch.context() as patch:
        # As somebody who writes a store by other means than this harness.
        for module in ("records", "manifest"):
            patch.setattr(f"forge_harness.state.{module}.file_names_problem", lambda names: None)
        state = NewState(
            phase="phase5",
            kind="package",
            name="p",
            metadata={"encoding": "directory"},
            files={"model.bin": b"ok", name: b"pwned"},
        )
        with Store.open(root) as store:
            store.commit([state])
    with StateManager(root, create=False) as manager:
        problems = manager.verify().problems
        assert any("is no relative path" in problem.what for problem in problems)
        with pytest.raises(StateError):
            manager.copy_out(tmp_path / "out" / "here", phase=5, name="p")
    assert list(tmp_path.rglob("pwned")) == []


def test_a_number_of_thousands_of_digits_is_no_generation(manager: StateManager) -> None:
    manager.save(phase=5, kind="config", name="c", data={"a": 1})
    with pytest.raises(UnknownStateError):
        manager.restore("9" * 5000)


def test_a_label_is_no_number_of_a_generation(manager: StateManager) -> None:
    """`restore 1` meant the checkpoint from then on, and generation 1 had no name any more."""
    manager.save(phase=5, kind="model", name="m", data=b"1")
    for label in ("1", "17", "007", "\u0661"):
        with pytest.raises(StateError, match=r"no checkpoint label|number of a generation"):
            manager.checkpoint(label)
    assert manager.checkpoints() == {}


def test_a_state_with_the_longest_file_name_comes_out_again(
    manager: StateManager, tmp_path: Path
) -> None:
    """It was taken, and could never be written anywhere."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("n" * 255)).write_bytes(b"content")
    manager.save(phase=5, kind="package", name="p", data=tmp_path / "in")
    manager.copy_out(tmp_path / "out", phase=5, name="p")
    assert (tmp_path / "out" / ("n" * 255)).read_bytes() == b"content"


def test_a_copy_below_a_file_is_one_sentence(manager: StateManager, tmp_path: Path) -> None:
    manager.save(phase=5, kind="model", name="m", data=b"1")
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        manager.copy_out(tmp_path / "file" / "x", phase=5, name="m")
    assert isinstance(caught.value, NotADirectoryError)


HUGE = 10**5000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"phase": None}, "The phase of a state is None"),
        ({"phase": True}, "The phase of a state is True"),
        ({"phase": 5.0}, "The phase of a state is 5.0"),
        ({"phase": HUGE}, "The phase of a state is a int too long"),
        ({"phase": "9" * 5000}, "The phase of a state is '999"),
        ({"phase": "٣"}, "is no phase of a state"),
        ({"name": None}, "None is no name of a state"),
        ({"name": b"x"}, "b'x' is no name of a state"),
        ({"kind": ["model"]}, "Unknown kind of state"),
        ({"metadata": [1]}, "metadata of 'x' is .1.; expected a mapping"),
        ({"metadata": {"encoding": "text"}}, "has 'encoding', which the store writes itself"),
        ({"parents": "abc"}, "parents of 'x' are 'abc'"),
        ({"parents": None}, "parents of 'x' are None"),
        ({"parents": (5,)}, "A parent of 'x' is 5"),
        ({"parents": ("0" * 32,)}, "There is no state with id '0000"),
        ({"data": {"a": np.array([object()])}}, r"array at data\['a'\] is of object"),
        ({"data": [np.array(["text"])]}, r"array at data\[0\] is of <U4"),
        ({"data": np.zeros(2, np.complex128)}, "array at data is of complex128"),
        ({"data": np.ma.array([1, 2], mask=[0, 1])}, "array at data is masked"),
        ({"data": torch.empty(3, device="meta")}, "tensor at data is on the meta device"),
        ({"data": {"w": torch.eye(2).to_sparse()}}, r"tensor at data\['w'\] is sparse_coo"),
        ({"data": torch.zeros(2, dtype=torch.complex128)}, "is of torch.complex128"),
        ({"data": HUGE}, "integer of 16610 bits"),
        ({"kind": "metrics", "data": {"loss": 10**400}}, "holds 1000.* expected a finite number"),
        ({"data": Path(os.devnull)}, "is no plain file or directory"),
        ({"data": {HUGE: 1}}, "key of data is an integer"),
        ({"data": "\ud800"}, "at character 0, which UTF-8 cannot hold"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(manager, given, said) -> None:
    good = {"phase": 5, "kind": "artifact", "name": "x", "data": b"x"}
    with pytest.raises(StateError, match=said) as caught:
        manager.save(**{**good, **given})
    assert len(str(caught.value)) < 500
    assert manager.generations() == []
    assert manager.verify().contents == 0


def test_a_label_has_no_value_to_load(manager: StateManager) -> None:
    manager.save(phase=5, kind="model", name="m", data=b"w")
    manager.checkpoint("before")
    with pytest.raises(StateError, match="holds no files: it names generation 1"):
        manager.load(phase="checkpoints", name="before")


def test_a_parent_is_a_state_of_any_generation(manager: StateManager) -> None:
    old = manager.save(phase=4, kind="model", name="m", data=b"old")
    manager.save(phase=4, kind="model", name="m", data=b"new")
    made = manager.save(phase=5, kind="model", name="m", data=b"x", parents=(old.id,))
    assert made.parents == (old.id,)


def test_an_account_without_a_name_is_recorded_by_its_number(tmp_path, monkeypatch) -> None:
    """As in containers that run under a number that is in no password file."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    with (
        AuditLog(tmp_path / "audit.db", key=bytes(32), signing_key=bytes(32)) as audit,
        StateManager(tmp_path / "states", audit=audit) as manager,
    ):
        manager.save(phase=5, kind="artifact", name="x", data=b"x")
        assert {record.event.actor for record in audit.tail(1)} == {f"uid {os.getuid()}"}
