"""Errors a caller may act on, and the exit codes they end with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `forge-harness` command; 0 to 5 mean what they mean in pytest."""

    PASS = 0
    GATE_FAILED = 1
    INTERRUPTED = 2
    INTERNAL_ERROR = 3
    USAGE = 4
    NOTHING_COLLECTED = 5
    INCOMPLETE = 7
    VERIFICATION_FAILED = 8
    BASELINE_MISSING = 9


class ForgeError(Exception):
    """A problem the user can act on: one sentence with the value, what was expected, the remedy.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code: ExitCode = ExitCode.INTERNAL_ERROR


class UsageError(ForgeError):
    """A wrong argument, option or file given by the user."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A configuration value is unknown, of the wrong type or out of range.

    Attributes:
        key: Dotted name of the offending key.
        suggestion: Nearest known name when the key is unknown, else None.
    """

    def __init__(self, message: str, *, key: str = "", suggestion: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.suggestion = suggestion


class SubjectError(UsageError):
    """The subject cannot be loaded or offers nothing that can be validated."""


class CheckpointError(UsageError):
    """A checkpoint cannot be read or written as asked: unknown, ambiguous or unsupported."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint does not hold what it claims to hold.

    Attributes:
        path: File at fault.
        tensor: Name of the tensor at fault, or "".
    """

    exit_code = ExitCode.VERIFICATION_FAILED

    def __init__(self, message: str, *, path: str = "", tensor: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.tensor = tensor


class RegistryError(UsageError):
    """The model registry does not have, or does not take, what was asked."""


class LoadError(UsageError):
    """A load run cannot be done as asked: its plan, its requests or its server are not there."""


class GeneratorError(ForgeError):
    """The process that sends the load did not start, or ended before it was done."""


class StateError(UsageError):
    """The state store cannot do what was asked; what it already holds is untouched."""


class ConflictError(StateError):
    """The store has moved on since the generation a commit was based on."""


class UnknownStateError(StateError):
    """No such state, file or generation in the store, or its content was collected."""


class StoreLockedError(StateError):
    """Another process holds the store's lock for longer than the caller would wait."""


class SealedStateError(StateError):
    """The store holds sealed contents and was opened without a key."""


class NotAStoreError(StateError):
    """A directory holds something else than a state store, or lies where none is safe."""


class NewerSchemaError(StateError):
    """The store was written by a newer release than this one."""


class DamagedStateError(StateError):
    """What the store holds is not what was committed; it is never returned as if it were.

    Attributes:
        path: File at fault, or "".
        digest: SHA-256 of the content that is lost, or "".
    """

    exit_code = ExitCode.VERIFICATION_FAILED

    def __init__(self, message: str, *, path: str = "", digest: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.digest = digest


class SecurityError(UsageError):
    """A key, token, permission or signature does not allow what was asked."""


class MissingKeyError(SecurityError):
    """A key that is needed is not there."""


class WrongKeyError(SecurityError):
    """The content is sealed under a key the keyring does not have."""


class DamagedSealError(SecurityError):
    """Sealed content was changed, cut off, or is not what it is taken for."""

    exit_code = ExitCode.VERIFICATION_FAILED


class TokenError(SecurityError):
    """A token is none, unknown, expired, revoked or meant for somebody else."""


class AccessDeniedError(SecurityError):
    """A role does not have the permission."""


class SignatureError(SecurityError):
    """A signature is missing, not of a pinned key, or over something else."""

    exit_code = ExitCode.VERIFICATION_FAILED


class AuditError(SecurityError):
    """The audit log takes no record, so what was to be recorded must not be done."""

    exit_code = ExitCode.INTERNAL_ERROR


class NothingCollectedError(ForgeError):
    """A selection matched no check."""

    exit_code = ExitCode.NOTHING_COLLECTED


class BackendUnavailableError(ForgeError):
    """An explicitly chosen kernel backend is not there; nothing falls back in silence."""

    exit_code = ExitCode.USAGE


class RunDirectoryError(ForgeError):
    """A run directory cannot be created, read or written."""

    exit_code = ExitCode.USAGE


class VerificationError(ForgeError):
    """A run directory does not hold what it claims to hold."""

    exit_code = ExitCode.VERIFICATION_FAILED


class NonFiniteError(ForgeError):
    """Training met a NaN or an infinity and stopped before it reached the weights."""

    exit_code = ExitCode.GATE_FAILED


class NonTernaryCodeError(ForgeError, ValueError):
    """A code outside -1, 0, +1 was given to a packer or found in packed bytes."""


class ScaleError(ForgeError, ValueError):
    """A scale of ternary codes is neither 0 nor a normal number of fp32, as products have it."""


def several(count: int, noun: str, plural: str = "") -> str:
    """Returns a count with its noun: "1 check", "2 checks"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Returns the entry of `valid` that `name` was most likely meant to be, if any is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_choice(what: str, got: object, valid: Iterable[str]) -> str:
    """Returns the one sentence for an unknown name: value, nearest name, valid names."""
    choices = sorted(valid)
    close = nearest(str(got), choices)
    hint = f" Did you mean {close!r}?" if close else ""
    return f"Unknown {what} {got!r}.{hint} Valid: {', '.join(choices) or 'none'}."
