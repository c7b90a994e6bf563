"""Where the suites and fixtures that ship with the harness are."""

from __future__ import annotations

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
