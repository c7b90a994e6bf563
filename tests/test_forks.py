"""Locks and children of fork: a child keeps nobody out, and lets go of nothing it does not have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from forge_harness.durable import exclusive

from .forking import child_that_lives_on, forked, needs_fork, with_threads

pytestmark = [needs_fork, with_threads]

KILLED_WITH_A_CHILD = """
import os, signal, sys, time
from pathlib import Path
{imports}
with {lock}:
    if (child := os.fork()) == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
LOCKS = {
    "exclusive": (
        "from forge_harness.durable import exclusive",
        "exclusive(Path(sys.argv[1]) / 'file')",
    ),
    "heads": (
        "from forge_harness.security.audit_heads import HeadFile",
        "HeadFile(Path(sys.argv[1]) / 'heads')._locked()",
    ),
    "store": (
        "from forge_harness.state.lock import StoreLock",
        "StoreLock(Path(sys.argv[1]) / 'lock', 1.0).exclusive()",
    ),
    "training": (
        "from forge_harness.cli.directory_lock import training_into",
        "training_into(Path(sys.argv[1]) / 'run')",
    ),
}


def taken_within(path: Path, seconds: float) -> bool:
    """Whether another process gets the lock."""
    code = (
        "import sys; from pathlib import Path; from forge_harness.durable import exclusive\n"
        "with exclusive(Path(sys.argv[1])): pass"
    )
    try:
        subprocess.run([sys.executable, "-c", code, str(path)], timeout=seconds, check=True)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_a_child_forked_under_a_lock_keeps_nobody_out(tmp_path: Path) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(tmp_path / "file"):
            held.set()
            go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    with child_that_lives_on():
        go.set()
        holder.join()
        assert taken_within(tmp_path / "file", 10)


def test_a_child_that_leaves_the_block_does_not_let_go_for_its_parent(tmp_path: Path) -> None:
    lock = exclusive(tmp_path / "file")
    lock.__enter__()
    assert forked(lambda: lock.__exit__(None, None, None)) == "False"
    assert not taken_within(tmp_path / "file", 2)
    lock.__exit__(None, None, None)


def test_a_child_takes_the_lock_itself_once_its_parent_let_go(tmp_path: Path) -> None:
    def take() -> str:
        with exclusive(tmp_path / "file"):
            return "taken"

    with exclusive(tmp_path / "other"):
        assert forked(take) == "taken"


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_a_lock_ends_with_who_took_it_and_not_with_its_children(tmp_path: Path, name: str) -> None:
    """A killed process whose children live on: nobody could write any more until they ended."""
    imports, lock = LOCKS[name]
    arguments = [sys.executable, "-c"]
    first = KILLED_WITH_A_CHILD.format(imports=imports, lock=lock)
    done = subprocess.run(
        [*arguments, first, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=60
    )
    child = int(done.stdout)
    try:
        assert done.returncode == -signal.SIGKILL
        again = f"import sys\nfrom pathlib import Path\n{imports}\nwith {lock}: print('taken')"
        taken = subprocess.run(
            [*arguments, again, str(tmp_path)], capture_output=True, text=True, timeout=10
        )
        assert taken.stdout == "taken\n", taken.stderr
    finally:
        os.kill(child, signal.SIGKILL)
