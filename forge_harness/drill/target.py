"""Opening the store under test by its name, in this process or in a child."""

from __future__ import annotations

from collections.abc import Callable
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
    """Opens the store at `root` with what `name` says."""
    return opener_of(name)(root, **options)
