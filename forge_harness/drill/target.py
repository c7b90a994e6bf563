"""Opening the store under test by its name, in this process or in a child."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from forge_harness.errors import UsageError

if TYPE_CHECKING:
    from forge_harness.state import Store

OWN_STORE = "forge_harness.state:Store.open"


def opener_of(name: str) -> Callable[..., Store]:
    """Imports what opens a store.

    Args:
        name: `module:attribute`, the attribute dotted where it is nested.

    Raises:
        UsageError: The module or the attribute is not there, or cannot be called.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"The store opener {name!r} cannot be imported: {error}. Expected module:attribute, "
            "importable in a fresh process."
        ) from error
    if not callable(found):
        raise UsageError(
            f"The store opener {name!r} is a {type(found).__name__}; expected something that opens "
            "a store when it is called with a path."
        )
    return cast("Callable[..., Store]", found)


def open_store(name: str, root: Path, **options: Any) -> Store:  # noqa: ANN401 - options of Store.open
    """Opens the store at `root` with what `name` says.

    Raises:
        UsageError: It takes no such arguments, or what it returns is no store.
    """
    opener = opener_of(name)
    try:
        store = opener(root, **options)
    except TypeError as error:
        if _takes(opener, root, options):
            raise
        raise UsageError(
            f"The store opener {name!r} cannot be called with a path"
            f"{''.join(f', {option}' for option in options)}: {error}. Expected a function that "
            "takes what Store.open takes."
        ) from error
    if not hasattr(store, "commit"):
        raise UsageError(
            f"The store opener {name!r} returned a {type(store).__name__}; expected an open store."
        )
    return store


def require_opens(name: str) -> None:
    """Refuses what makes no store where there is none: no campaign of it could begin.

    Raises:
        UsageError: It cannot be imported, or raises something.
    """
    with tempfile.TemporaryDirectory(prefix="forge-opener-") as scratch:
        try:
            open_store(name, Path(scratch) / "store").close()
        except UsageError:
            raise
        except Exception as error:  # code of the user's own: it raises what it likes
            raise UsageError(
                f"The store opener {name!r} raised {type(error).__name__} where a new store was to "
                f"be made: {error}. Expected an open store."
            ) from error


def _takes(opener: Callable[..., object], root: Path, options: Mapping[str, object]) -> bool:
    import inspect  # Takes longer to import than a child program to run.

    try:
        inspect.signature(opener).bind(root, **options)
    except (TypeError, ValueError):  # ValueError: an extension module's function does not tell.
        return False
    return True
