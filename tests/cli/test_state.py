from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forge_harness import StateManager
from forge_harness.cli.state import state_group
from forge_harness.errors import ExitCode, ForgeError, UsageError
from forge_harness.integration.state_kinds import StateKind
from forge_harness.security.audit_file import AuditFile
from forge_harness.security.key_sources import write_keyring
from forge_harness.security.keys import Keyring
from forge_harness.security.sealing import KeyringSealer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with StateManager(tmp_path / "states") as manager:
        manager.save(phase=4, kind="config", name="c", data={"lr": 1})
        manager.save(phase=5, kind="model", name="m", data=b"w" * 100_000)
    return tmp_path / "states"


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(state_group, [*arguments, "--root", str(root)], standalone_mode=False)


def test_ls_says_what_the_phases_hold(root: Path) -> None:
    text = run(root, "ls").output
    assert "2 states: phase4 1 (50.0%), phase5 1 (50.0%); 0 migrated, 2 generations" in text
    listed = json.loads(run(root, "ls", "--json", "--phase", "5").output)
    assert [state["name"] for state in listed["states"]] == ["m"]
    assert listed["summary"]["states"] == 2


def test_a_label_that_moves_says_from_where(root: Path) -> None:
    """A script that was run again took the place to go back to away without a word."""
    assert run(root, "checkpoint", "before").output == "Checkpoint before: generation 2.\n"
    again = run(root, "checkpoint", "before").output
    assert again.startswith("Checkpoint before: generation 3; it named generation 2, which `gc`")


def test_what_is_older_than_what_was_saved_is_not_handed_out_as_it(
    root: Path, tmp_path: Path
) -> None:
    """`get` wrote the version before, and said that it was verified."""
    copy = tmp_path / "copy"
    with StateManager(root) as manager:
        manager.save(phase=5, kind="model", name="m", data=b"newer")
        shutil.copytree(root, copy)
    (copy / "index.db-wal").unlink()
    (copy / "index.db-shm").unlink()
    get = ("get", "5", "m", "--out", str(tmp_path / "out"))
    refused = run(copy, *get)
    assert "has lost what is newer than generation 2" in str(refused.exception)
    assert isinstance(refused.exception, ForgeError)
    assert refused.exception.exit_code == ExitCode.VERIFICATION_FAILED
    assert not (tmp_path / "out").exists()
    listed = run(copy, "ls")
    assert "Warning: generation 3: it was acknowledged and is not in" in listed.stderr
    assert run(copy, *get, "--generation", "2").return_value == 0
    with StateManager(copy) as manager:
        assert len(manager.lost()) == 1
        manager.save(phase=5, kind="config", name="c", data={})
        assert manager.lost() == []
    assert run(copy, "ls").stderr == ""
    assert run(copy, "verify").return_value == ExitCode.VERIFICATION_FAILED


def test_show_names_files_and_digests(root: Path) -> None:
    shown = json.loads(run(root, "show", "5", "m", "--json").output)
    assert shown["files"]["data"]["size"] == 100_000
    assert shown["files"]["data"]["digest"] in run(root, "show", "phase5", "m").output


def test_save_and_get_bring_a_directory_back(root: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a").write_bytes(b"a")
    saved = run(
        root, "save", str(tmp_path / "package"), "--phase", "6", "--kind", "package", "--name", "p"
    )
    assert saved.output == "phase6/p: generation 3, 1 bytes.\n"
    run(root, "get", "6", "p", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "a").read_bytes() == b"a"


def test_verify_exits_8_and_names_what_is_damaged(root: Path) -> None:
    assert run(root, "verify").return_value == 0
    (file,) = (path for path in (root / "objects").rglob("*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[70_000] ^= 4
    file.chmod(0o600)
    file.write_bytes(content)
    result = run(root, "verify")
    assert result.return_value == 8
    assert "1 problem:" in result.output
    assert run(root, "verify", "--shallow").return_value == 0
    assert json.loads(run(root, "verify", "--json").output)["problems"]


def test_checkpoint_restore_gc(root: Path) -> None:
    assert run(root, "checkpoint", "a").output == "Checkpoint a: generation 2.\n"
    with StateManager(root) as manager:
        manager.remove(phase=5, name="m")
    assert "Restored a as generation 5" in run(root, "restore", "a").output
    assert run(root, "show", "5", "m").return_value == 0
    assert "Collected: retained" in run(root, "gc", "--retain", "1").output
    report = json.loads(run(root, "gc", "--json").output)
    assert report["retained"] >= 1


def test_migrate_and_its_wrong_uses(root: Path) -> None:
    assert "phase6/m: generation 3" in run(root, "migrate", "5", "m", "--to", "6").output
    assert "schema is current, 3 generations" in run(root, "migrate", "--schema").output
    for wrong in (["migrate", "5", "m"], ["migrate", "--schema", "5"]):
        assert isinstance(run(root, *wrong).exception, ForgeError)


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    for command in (["ls"], ["verify"], ["gc"], ["checkpoint", "a"], ["migrate", "--schema"]):
        result = run(tmp_path / "none", *command)
        assert isinstance(result.exception, ForgeError)
        assert "There is no state store" in str(result.exception)
    assert not (tmp_path / "none").exists()


def test_changes_are_recorded_in_the_audit_log(root: Path, tmp_path: Path) -> None:
    keys, log = tmp_path / "keys.json", tmp_path / "audit.db"
    write_keyring(keys, Keyring.new())
    run(root, "checkpoint", "first", "--keys", str(keys), "--audit", str(log))
    file = AuditFile(log, read_only=True)
    try:
        (record,) = file.newest(5)
    finally:
        file.close()
    assert (record.event.action, record.event.resource) == ("state.checkpoint", "first")


def test_an_audit_log_without_keys_is_refused(root: Path, tmp_path: Path) -> None:
    done = run(root, "checkpoint", "first", "--audit", str(tmp_path / "audit.db"))
    assert isinstance(done.exception, UsageError)
    assert "needs --keys" in str(done.exception)
    assert not (tmp_path / "audit.db").exists()


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A sealed store with one content in a file and one in the index; its keys are beside it."""
    keyring = Keyring.new()
    write_keyring(tmp_path / "keys.json", keyring)
    with StateManager(tmp_path / "sealed", sealer=KeyringSealer(keyring)) as manager:
        manager.save(phase=5, kind="model", name="large", data=b"w" * 100_000)
        manager.save(phase=5, kind="model", name="small", data=b"w")
    return tmp_path / "sealed"


def test_what_is_sealed_and_was_not_opened_is_not_verified(sealed: Path) -> None:
    keys = ("--keys", str(sealed.with_name("keys.json")))
    result = run(sealed, "verify")
    assert result.return_value == 7
    assert "Incomplete: 2 generations, 2 states, 2 contents; nothing is wrong with" in result.output
    assert "Not opened: 2 sealed contents" in result.output
    report = json.loads(run(sealed, "verify", "--json").output)
    assert (report["unopened"], report["unread"], report["problems"]) == (2, 0, [])
    assert run(sealed, "verify", *keys).return_value == 0
    assert json.loads(run(sealed, "verify", "--json", *keys).output)["unopened"] == 0


def test_a_head_that_no_key_opens_any_more_is_seen_with_the_keys_alone(sealed: Path) -> None:
    keys = ("--keys", str(sealed.with_name("keys.json")))
    (file,) = (path for path in (sealed / "objects").rglob("*") if path.is_file())
    content = bytearray(file.read_bytes())
    content[20] ^= 4
    file.chmod(0o600)
    file.write_bytes(content)
    assert run(sealed, "verify").return_value == 7
    assert run(sealed, "verify", *keys).return_value == 8


def test_a_problem_counts_for_more_than_what_was_not_opened(sealed: Path) -> None:
    (file,) = (path for path in (sealed / "objects").rglob("*") if path.is_file())
    file.unlink()
    result = run(sealed, "verify")
    assert result.return_value == 8
    assert "Not opened: 1 sealed content," in result.output


def test_a_shallow_verification_says_what_it_did_not_read(root: Path) -> None:
    result = run(root, "verify", "--shallow")
    assert result.return_value == 0
    assert "Not read: 2 contents" in result.output
    assert json.loads(run(root, "verify", "--shallow", "--json").output)["unread"] == 2
    assert "Not read" not in run(root, "verify").output


def test_a_verified_store_says_what_can_no_longer_be_gone_back_to(root: Path) -> None:
    """`verify` found that nothing was wrong, and `restore` that the content was collected."""
    assert "Collected" not in run(root, "verify").output
    assert run(root, "rm", "5", "m").return_value == 0
    assert run(root, "gc", "--retain", "1", "--grace", "0").return_value == 0
    result = run(root, "verify")
    assert (result.return_value, "nothing is wrong." in result.output) == (0, True)
    assert "Collected: 1 content that `gc` was told to free; generations with it" in result.output
    assert isinstance(run(root, "restore", "2").exception, ForgeError)


def test_what_no_store_wrote_is_named_and_stays(root: Path) -> None:
    (root / "objects" / "junk").write_text("x")
    (root / "objects" / "ab").mkdir(exist_ok=True)
    (root / "objects" / "ab" / "notes.txt").write_text("x")
    (root / "tmp" / "folder").mkdir()
    result = run(root, "verify")
    assert result.return_value == 0, result.output
    assert "Not of the store: objects/ab/notes.txt;" in result.output
    report = json.loads(run(root, "verify", "--json").output)
    assert report["foreign"] == ["objects/ab/notes.txt", "objects/junk"]
    assert run(root, "gc", "--grace", "0").return_value == 0
    assert (root / "objects" / "junk").exists()
    assert (root / "objects" / "ab" / "notes.txt").exists()


def test_nothing_is_written_out_into_the_store_itself(sealed: Path) -> None:
    keys = ("--keys", str(sealed.with_name("keys.json")))
    before = sorted(sealed.rglob("*"))
    for inside in ("inside", "objects/inside", "."):
        result = run(sealed, "get", "5", "large", "--out", str(sealed / inside), *keys)
        assert isinstance(result.exception, UsageError)
        assert "name a place outside" in str(result.exception)
    assert sorted(sealed.rglob("*")) == before


@pytest.mark.parametrize(
    "wrong",
    [("missing", "model", "m"), ("states", "modle", "m"), ("states", "model", "a b")],
    ids=["path", "kind", "name"],
)
def test_a_save_that_is_refused_makes_no_store(root: Path, tmp_path: Path, wrong) -> None:
    """`state ls` then showed an empty store where a mistyped path or kind had been told."""
    path, kind, name = wrong
    given = ("--phase", "5", "--kind", kind, "--name", name)
    result = run(tmp_path / "new", "save", str(tmp_path / path), *given)
    assert isinstance(result.exception, ForgeError)
    assert not (tmp_path / "new").exists()


def test_a_kind_that_is_mistyped_lists_no_empty_table(root: Path) -> None:
    result = run(root, "ls", "--kind", "modle")
    assert "Unknown kind of state 'modle'. Did you mean 'model'?" in str(result.exception)
    assert run(root, "ls", "--kind", "package").return_value == 0
    with StateManager(root, kinds=[StateKind(name="recipe", holds="a recipe")]) as manager:
        manager.save(phase=5, kind="recipe", name="r", data={})
    assert " r " in run(root, "ls", "--kind", "recipe").output


def test_a_label_has_no_files_to_write_out(root: Path, tmp_path: Path) -> None:
    """It was an empty directory, "written and verified"."""
    run(root, "checkpoint", "a")
    result = run(root, "get", "checkpoints", "a", "--out", str(tmp_path / "out"))
    assert "checkpoints/a holds no files: it names generation 2" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_what_is_taken_out_can_be_freed(root: Path) -> None:
    """The checkpoints of finished runs stayed for good: `gc` keeps what the store holds now."""
    run(root, "checkpoint", "a")
    gc = ("gc", "--retain", "1", "--grace", "0", "--json")
    assert json.loads(run(root, *gc).output)["bytes_freed"] == 0
    refused = run(root, "rm", "5", "m", "n")
    assert "Did you mean 'phase5/m'?" in str(refused.exception)
    assert run(root, "show", "5", "m").return_value == 0
    assert run(root, "rm", "5", "m", "m").output == "phase5/m: removed in generation 4.\n"
    assert json.loads(run(root, *gc).output)["bytes_freed"] == 0
    assert run(root, "rm", "checkpoints", "a").return_value == 0
    assert json.loads(run(root, *gc).output)["bytes_freed"] == 100_000
    assert "1 state: phase4 1 (100.0%)" in run(root, "ls").output
