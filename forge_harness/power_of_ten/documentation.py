"""How much of what a module offers is documented: the "Documentation" row of the specification."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_harness.security.scan_files import relative

from .measures import Place
from .python_source import UNREADABLE, parsed, read_python, why_unreadable
from .trees import files_of

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Documentation:
    """Modules and public definitions, and those without a docstring.

    Attributes:
        definitions: Modules, and public classes, functions and methods in them.
        missing: Those without a docstring.
    """

    definitions: int
    missing: tuple[Place, ...]

    @property
    def share(self) -> float:
        """Share with a docstring, 0 to 1; 0 where nothing is defined."""
        return 1 - len(self.missing) / self.definitions if self.definitions else 0.0


def documentation(roots: Sequence[Path]) -> Documentation:
    """Counts docstrings over trees of Python; a file that cannot be parsed is one without.

    Args:
        roots: Directories or files; a file of several counts once.

    Raises:
        UsageError: There is no such tree.
    """
    total, missing = 0, []
    for root, files in files_of(roots, (".py",)):
        for path in files:
            name = relative(path, root)
            try:
                tree = parsed(read_python(path), name)
            except UNREADABLE as error:
                total += 1
                missing.append(Place(name, 0, f"not counted: {why_unreadable(error)}"))
                continue
            for label, line, node in _public(tree):
                total += 1
                if not ast.get_docstring(node):
                    missing.append(Place(name, line, f"{label} has no docstring"))
    return Documentation(total, tuple(sorted(missing)))


def _public(tree: ast.Module) -> Iterator[tuple[str, int, ast.Module | _Definition]]:
    if tree.body:
        yield "the module", 1, tree
    for node in tree.body:
        if not isinstance(node, _Definition) or node.name.startswith("_"):
            continue
        yield node.name, node.lineno, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, _Definition) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner.lineno, inner
