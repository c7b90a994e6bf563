"""Paths that users give: links to themselves, and homes that are not there."""

import errno
import re
from pathlib import Path

import pytest

from forge_harness.paths import home_path, resolved_path

PACKAGE = Path(__file__).parents[1] / "forge_harness"
CATCHES_IT = {"formats/hf_files.py"}


@pytest.fixture
def loop(tmp_path):
    path = tmp_path / "loop"
    path.symlink_to(path)
    return path


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_link_to_itself_is_an_error_of_the_system_with_the_path_as_given(loop, below):
    with pytest.raises(OSError, match="symbolic links") as caught:
        resolved_path(loop / below)
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(loop / below))


def test_links_and_what_is_not_there_yet_resolve(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert resolved_path(tmp_path / "link" / ".." / "link" / "new") == (
        tmp_path.resolve() / "there" / "new"
    )


def test_a_home_of_nobody_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert home_path("~/x") == Path("/somewhere/x")
    assert home_path("~no-such-user/x") == Path("~no-such-user/x")


def test_the_package_resolves_paths_of_users_in_this_way_only():
    """`Path.resolve` and `Path.expanduser` raise RuntimeError: an internal error to the caller."""
    calls = re.compile(r"(?<!__file__\))\.(resolve|expanduser)\(\)")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if calls.search(path.read_text(encoding="utf-8"))
    }
    assert found - {"load/generator/locustfile.py"} == CATCHES_IT
