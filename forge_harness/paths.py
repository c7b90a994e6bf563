"""Where the suites and fixtures that ship with the harness are; paths that users give."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Returns `<package>/<name>` in a wheel, `<checkout>/<name>` otherwise.

    Raises:
        FileNotFoundError: Neither exists.
    """
    for candidate in (_PACKAGE / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"{name!r} is neither in {_PACKAGE} nor beside it; reinstall bitnet-forge-harness."
    )


def suites_dir() -> Path:
    """Returns the directory of the executable checks, with `catalogue.toml` in it."""
    return data_dir("suites")


def fixtures_dir() -> Path:
    """Returns the directory of the data the suites use."""
    return data_dir("fixtures")


def own_sources() -> tuple[Path, ...]:
    """Returns the directories of the harness's own code: package, kernels and suites."""
    suites, kernels = suites_dir(), _PACKAGE.parent / "kernels"
    if not (kernels / "forge_kernels").is_dir():
        kernels = _PACKAGE.parent / "forge_kernels"
    beside = () if suites.is_relative_to(_PACKAGE) else (suites,)
    return (_PACKAGE, kernels, *beside)


def home_path(text: str | Path) -> Path:
    """Returns a path with `~` and `~user` expanded; where there is no such user, as it is.

    `Path.expanduser` raises a RuntimeError there. What is not there is found out by who opens it.
    """
    return Path(os.path.expanduser(text))


def is_utf8(path: str | Path) -> bool:
    """Whether a name can be written in UTF-8; other bytes of it are lone surrogates in Python."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def resolved_path(path: str | Path) -> Path:
    """Returns a path made absolute, without links and `..`; what does not exist yet included.

    Raises:
        OSError: ELOOP, with the path as given: a link in it leads to itself. `Path.resolve` raises
            a RuntimeError until Python 3.12, and nothing from then on.
    """
    whole = Path(os.path.realpath(path))
    try:
        whole.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    return whole
