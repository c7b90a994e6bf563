"""Where a keyring comes from: a file only its owner reads, an environment variable, a command."""

from __future__ import annotations

import base64
import binascii
import os
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from forge_harness.durable import exclusive, write_durably
from forge_harness.errors import MissingKeyError, SecurityError

from .keys import Keyring

_LONGEST_WAIT_S = 30.0


def load_keyring(source: str, environ: MutableMapping[str, str] | None = None) -> Keyring:
    """Loads a keyring from where a word says.

    Args:
        source: `env:NAME` (base64 of the keyring; the variable is removed), `command:ARGV` (its
            standard output; no shell), or the path of a file.
        environ: None: that of the process.

    Raises:
        MissingKeyError: There is nothing there.
        SecurityError: It is readable by others, or is no keyring.
    """
    kind, _, rest = source.partition(":")
    if (path := keyring_path(source)) is not None:
        return keyring_from_file(path)
    if kind == "env":
        return keyring_from_environment(rest, os.environ if environ is None else environ)
    return keyring_from_command(_words(rest))


def followed_keyring(source: str) -> Callable[[], Keyring]:
    """Returns what gives a source's keyring as it is now: a file is read again once it changed.

    For what runs for hours. While the file cannot be read, it gives the keyring that was; one of
    the environment or of a command stays what it is.

    Raises:
        MissingKeyError: There is nothing there.
        SecurityError: It is readable by others, or is no keyring.
    """
    keyring, path = load_keyring(source), keyring_path(source)
    if path is None:
        return lambda: keyring
    stamp: tuple[int, ...] = ()

    def current() -> Keyring:
        nonlocal keyring, stamp
        with suppress(OSError, SecurityError):
            status = path.stat()
            found = (status.st_mtime_ns, status.st_ino, status.st_size)
            if found != stamp:
                keyring, stamp = keyring_from_file(path), found
        return keyring

    return current


def keyring_path(source: str) -> Path | None:
    """Returns the file that a word as `load_keyring` takes it names; None where it names none."""
    return None if source.partition(":")[0] in ("env", "command") else Path(source)


def keyring_from_file(path: Path) -> Keyring:
    """Reads a keyring file, which must be its owner's alone.

    Raises:
        MissingKeyError: There is no such file.
        SecurityError: Others may read it, it is another user's or no regular file, or no keyring.
    """
    try:
        # One descriptor for check and read: a name could be changed between the two.
        # Nonblocking: a pipe would be waited for before it can be refused.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise MissingKeyError(
            f"There is no keyring {str(path)!r}; make one with `forge-harness keys new`."
        ) from error
    except OSError as error:
        raise SecurityError(
            f"The keyring {str(path)!r} cannot be opened ({error.strerror}); expected a regular "
            "file of your own, not a link."
        ) from error
    try:
        _refuse_shared(path, os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return Keyring.from_bytes(stream.read())
    finally:
        os.close(descriptor)


@contextmanager
def changing_keyring(path: Path) -> Iterator[Keyring]:
    """Yields the keyring of a file that nobody else changes until the block ends.

    Of two that read, change and write it side by side, one would lose a key, and all that is
    sealed under it.

    Raises:
        MissingKeyError: There is no such file.
        SecurityError: As `keyring_from_file`.
    """
    keyring_from_file(path)
    with exclusive(path):
        yield keyring_from_file(path)


def create_keyring(path: Path, keyring: Keyring) -> None:
    """Writes a new keyring file.

    Raises:
        FileExistsError: The name is taken.
        OSError: The file system refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Takes the name first: of two that find it free, one gets it.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        write_keyring(path, keyring)
    except BaseException:
        path.unlink()
        raise


def write_keyring(path: Path, keyring: Keyring) -> None:
    """Writes a keyring file durably, for its owner only; replaces an older one.

    Raises:
        OSError: The file system refused; an older file is untouched.
    """
    previous = os.umask(0o077)
    try:
        write_durably(path, keyring.to_bytes())
    finally:
        os.umask(previous)


def keyring_from_environment(name: str, environ: MutableMapping[str, str]) -> Keyring:
    """Reads a keyring from a variable and removes the variable, so that no child inherits it.

    Raises:
        MissingKeyError: The variable is not set.
        SecurityError: It is not base64 of a keyring.
    """
    text = environ.pop(name, None)
    if not text:
        raise MissingKeyError(
            f"The environment variable {name!r} is not set; expected base64 of a keyring."
        )
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SecurityError(
            f"The environment variable {name!r} is not base64; expected base64 of a keyring."
        ) from None
    return Keyring.from_bytes(content)


def keyring_from_command(arguments: Sequence[str], timeout_s: float = _LONGEST_WAIT_S) -> Keyring:
    """Reads a keyring from a command's standard output (a password manager, a vault's client).

    Args:
        arguments: Program and arguments; no shell sees them.
        timeout_s: Seconds it may take.

    Raises:
        MissingKeyError: It cannot be started, fails or takes too long.
        SecurityError: It prints no keyring.
    """
    if not arguments:
        raise MissingKeyError("No command is given; expected command:PROGRAM ARGUMENTS.")
    try:
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MissingKeyError(
            f"The key command {arguments[0]!r} took over {timeout_s:g} s; run it by hand to see "
            "what it waits for."
        ) from error
    except OSError as error:
        raise MissingKeyError(
            f"The key command {arguments[0]!r} cannot be started ({error.strerror})."
        ) from error
    if done.returncode:
        raise MissingKeyError(
            f"The key command {arguments[0]!r} ended with exit code {done.returncode}; run it by "
            "hand to see why."
        )
    return Keyring.from_bytes(done.stdout)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        # Without the command: what it is given may be a credential.
        raise SecurityError(
            f"The key command cannot be told apart into words ({error}); expected command:PROGRAM "
            "ARGUMENTS, quoted as for a shell."
        ) from error


def _refuse_shared(path: Path, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise SecurityError(
            f"The keyring {str(path)!r} is not a regular file of your own (owner {status.st_uid})."
        )
    if mode & 0o077:
        raise SecurityError(
            f"The keyring {str(path)!r} has mode {mode:04o} and others may read it; expected 0600: "
            f"chmod 600 {shlex.quote(str(path))}, and rotate if somebody may have."
        )
