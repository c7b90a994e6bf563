"""Finds the subject a user names: `module:object`, a file, an entry point, or the reference."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from forge_harness.canonical import file_sha256, sha256_hex, tree_digest
from forge_harness.errors import CheckpointError, SubjectError, nearest, unknown_choice
from forge_harness.imports import import_from
from forge_harness.paths import home_path, resolved_path
from forge_harness.subject.protocols import capabilities_of

ENTRY_POINT_GROUP = "forge_harness.subjects"
REFERENCE_SPEC = "reference"


@dataclass(frozen=True, slots=True)
class LoadedSubject:
    """A subject and what is known of it."""

    subject: object
    spec: str
    """How to load it again, in any process."""
    name: str
    capabilities: frozenset[str]
    digest: str | None
    """`sha256:<hex>` of the source file the subject came from; None for an entry point's."""


def load_subject(spec: str | None = None) -> LoadedSubject:
    """Loads a subject.

    Args:
        spec: `package.module:object`, `path/to/file.py:object`, the name of an entry point in
            the group `forge_harness.subjects`, the path of a checkpoint (a directory, or a file
            that is no Python), or `reference` / None for the reference pipeline. A class or
            function is called without arguments; what it returns is the subject.

    Raises:
        SubjectError: Nothing is there, importing it raised, or it offers no capability.
        CheckpointError: A checkpoint cannot be read, with the reader's own sentence.
    """
    text = spec or REFERENCE_SPEC
    if text == REFERENCE_SPEC:
        target, source = _attribute(
            _import("forge_harness.subject.reference"), "ReferenceSubject", text
        )
        text = REFERENCE_SPEC
    elif _is_checkpoint(Path(text)):
        return _checkpoint(Path(text))
    elif ":" in text:
        location, _, attribute = text.rpartition(":")
        module, _ = load_module(location)
        target, source = _attribute(module, attribute, text)
    else:
        target, source = _entry_point(text)
    subject = _instantiate(target, text)
    capabilities = capabilities_of(subject)
    if not capabilities:
        raise SubjectError(
            f"Subject {text!r} offers no capability; implement the methods of at least one "
            "protocol in forge_harness.subject.protocols (`forge-harness doctor` lists them)."
        )
    return LoadedSubject(
        subject=subject,
        spec=text,
        name=_name_of(subject, text),
        capabilities=capabilities,
        digest=None if source is None else f"sha256:{file_sha256(source)}",
    )


def load_module(location: str) -> tuple[ModuleType, str]:
    """Imports a module by name or from a file.

    Returns:
        The module, and how to load it from any directory: its name, or the file's absolute path.

    Raises:
        SubjectError: Nothing is there, or importing it raised.
    """
    if not _is_path(location):
        return _import(location), location
    path = Path(location)
    return _load_file(path), str(resolved_path(home_path(path)))


def _name_of(subject: object, spec: str) -> str:
    name = str(getattr(subject, "name", type(subject).__name__))
    if not name.strip() or not name.isprintable():
        raise SubjectError(
            f"Subject {spec!r} has the name {name!r}; expected text of one line, which reports can "
            "show."
        )
    return name


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.suffix != ".py")


def _checkpoint(path: Path) -> LoadedSubject:
    from forge_harness.formats.detect import detect
    from forge_harness.subject.checkpoint import CheckpointSubject

    if questions := detect(resolved_path(path)).questions:
        raise CheckpointError(
            f"{path}: {questions[0]} A subject cannot be told: convert it first, with "
            "`forge-harness convert` and that option, and name the result."
        )
    subject = CheckpointSubject(resolved_path(path))
    return LoadedSubject(
        subject=subject,
        spec=str(resolved_path(path)),
        name=subject.name,
        capabilities=capabilities_of(subject),
        digest=tree_digest(path),
    )


def _is_path(location: str) -> bool:
    return location.endswith(".py") or "/" in location or "\\" in location


def _load_file(path: Path) -> ModuleType:
    resolved = resolved_path(home_path(path))
    if not resolved.is_file():
        raise SubjectError(f"Subject file {str(path)!r} does not exist.")
    # One name a path, so that a file loaded twice in a process is one module, and classes in
    # it keep their identity.
    name = f"forge_subject_{sha256_hex(str(resolved).encode())[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, resolved)
    if module_spec is None or module_spec.loader is None:
        raise SubjectError(f"Subject file {str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    import_from(Path.cwd())
    # What a file imports from its own directory must be found as when it is run as a script.
    import_from(resolved.parent)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise SubjectError(f"Importing subject file {str(path)!r} {_raised(error)}") from error
    return module


def _import(name: str) -> ModuleType:
    import_from(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise SubjectError(
                f"Subject module {name!r} is not importable from {Path.cwd()}; give a file path "
                "(path/to/file.py:object) or install the package."
            ) from error
        raise SubjectError(
            f"Importing subject module {name!r} needs {error.name!r}, which is not installed."
        ) from error
    except Exception as error:
        raise SubjectError(f"Importing subject module {name!r} {_raised(error)}") from error


def _attribute(module: ModuleType, attribute: str, spec: str) -> tuple[object, Path | None]:
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        close = nearest(attribute, names)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SubjectError(f"Subject {spec!r}: the module has no {attribute!r}.{hint}")
    source = getattr(module, "__file__", None)
    return getattr(module, attribute), Path(source) if source else None


def _entry_point(name: str) -> tuple[object, Path | None]:
    found = entry_points(group=ENTRY_POINT_GROUP)
    if name not in found.names:
        raise SubjectError(
            unknown_choice("subject", name, {*found.names, REFERENCE_SPEC})
            + " Or give module:object, path/to/file.py:object or the path of a checkpoint."
        )
    try:
        return found[name].load(), None
    except Exception as error:
        raise SubjectError(f"Loading subject entry point {name!r} {_raised(error)}") from error


def _raised(error: Exception, when: str = "") -> str:
    return f"raised {type(error).__name__}{when}: {str(error).rstrip('.')}."


def _instantiate(target: object, spec: str) -> object:
    if not callable(target) or (not inspect.isclass(target) and capabilities_of(target)):
        return target
    try:
        return target()
    except Exception as error:
        raise SubjectError(f"Subject {spec!r} {_raised(error, ' when called')}") from error
