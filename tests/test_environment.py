"""The environment record."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys

from forge_harness.canonical import canonical_json
from forge_harness.environment import collect_environment


def test_it_is_json_and_names_the_machine_class():
    found = collect_environment()
    canonical_json(found)
    for key in ("os", "machine", "cpu", "cpu_usable", "python", "memory_bytes"):
        assert found[key], key
    assert found["packages"]["bitnet-forge-harness"]
    assert found["packages"]["torch"]


def test_it_names_no_person_and_no_path(tmp_path):
    text = json.dumps(collect_environment(tmp_path))
    for secret in (socket.gethostname(), str(tmp_path)):
        assert secret not in text
    assert getpass.getuser() not in json.loads(text).values()


def test_the_commit_is_the_directorys(tmp_path):
    assert collect_environment(tmp_path)["git_commit"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("1", encoding="utf-8")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *arguments], check=True)
    clean = collect_environment(tmp_path)
    assert len(clean["git_commit"]) == 40
    assert clean["git_dirty"] is False
    # A refreshed index is written under a lock, in the way of a commit made at the same time.
    index = (tmp_path / ".git" / "index").read_bytes()
    os.utime(tmp_path / "file", (1, 1))
    assert collect_environment(tmp_path)["git_dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert collect_environment(tmp_path)["git_dirty"] is True


def test_torch_is_not_imported():
    script = (
        "import sys; from forge_harness.environment import collect_environment as c; c()\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
