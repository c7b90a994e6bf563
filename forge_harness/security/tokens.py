"""Access tokens: 256 random bits, kept as keyed hashes, revocable, with an end and an audience."""

from __future__ import annotations

import base64
import errno
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from forge_harness.canonical import canonical_json
from forge_harness.durable import exclusive, read_plain, write_durably
from forge_harness.errors import SecurityError, TokenError

from .access import Access, Principal
from .keys import Keyring, Purpose

PREFIX = "fht_"
SCHEMA = "forge-tokens/1"
_SECRET_BYTES = 32
_FORM = re.compile(r"fht_[A-Za-z0-9_-]{43}")
LONGEST_DAYS = 365
_TEXTS = ("id", "hash", "name", "audience", "created_at", "expires_at")
_TICK_S = 2.0
"""The coarsest clock of a file system we know of (FAT)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What is kept of a token; the token itself is shown once and kept nowhere.

    Attributes:
        id: 16 hexadecimal digits, for listing and revoking.
        hash: HMAC-SHA-256 of the token, hexadecimal.
        name: Of who holds it.
        roles: What it may do.
        audience: The service it is for.
        created_at: UTC, ISO 8601.
        expires_at: UTC, ISO 8601; from then on it opens nothing.
        revoked_at: UTC, ISO 8601, or None.
    """

    id: str
    hash: str
    name: str
    roles: tuple[str, ...]
    audience: str
    created_at: str
    expires_at: str
    revoked_at: str | None = None


class TokenStore:
    """Tokens in a file. Reading is cheap: the file is read again only when it changed.

    Args:
        path: The file; made with the first token.
        key: 32 bytes, hashes new tokens; without it the hashes are worth nothing.
        former: Keys of tokens that were issued before a rotation.
        access: Whose roles tokens may have; None: the shipped ones.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: bytes,
        former: Iterable[bytes] = (),
        access: Access | None = None,
    ) -> None:
        self.path = path
        self.access = access or Access()
        self._keys = (key, *former)
        self._stamp: tuple[int, int, int] | None = None
        self._damage = ""
        """Why nothing can be made of the content that was read last, "" when it is sound."""
        self._by_hash: dict[str, Token] = {}

    @classmethod
    def of_keyring(cls, path: Path, keyring: Keyring) -> TokenStore:
        """Opens a file of tokens with a keyring's active key, and its former ones for reading.

        Raises:
            MissingKeyError: The keyring has no active key for tokens.
        """
        key = keyring.active(Purpose.TOKENS)
        former = (each for each in keyring.usable_keys(Purpose.TOKENS) if each != key)
        return cls(path, key=key, former=former)

    def issue(
        self,
        name: str,
        roles: Iterable[str],
        *,
        audience: str,
        days: float = 30.0,
        record: Callable[[Token], None] | None = None,
    ) -> tuple[str, Token]:
        """Makes a token; returns it and what is kept of it, once that is on disk.

        Args:
            name: Of who will hold it.
            roles: Some of the known roles.
            audience: The service it is for.
            days: Until it expires.
            record: Told of the token before it is on disk; what it raises, there is no token.

        Raises:
            SecurityError: A role is unknown, the time is none, or what is at the path is no plain
                file; nothing was recorded.
            OSError: The file system refused; there is no new token.
        """
        chosen = tuple(sorted(self.access.check_roles(roles)))
        if not chosen or not 0 < days <= LONGEST_DAYS:
            raise SecurityError(
                f"A token needs at least one role and an end within {LONGEST_DAYS} days; got roles "
                f"{list(chosen)} and {days:g} days."
            )
        secret = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()[:43]
        now = datetime.now(UTC)
        token = Token(
            id=secrets.token_hex(8),
            hash=_hash(self._keys[0], secret),
            name=name,
            roles=chosen,
            audience=audience,
            created_at=now.isoformat(timespec="seconds"),
            expires_at=(now + timedelta(days=days)).isoformat(timespec="seconds"),
        )
        with self._changing() as tokens:
            if record is not None:
                record(token)
            self._write([*tokens, token])
        return secret, token

    def revoke(self, token_id: str, *, record: Callable[[Token], None] | None = None) -> Token:
        """Ends a token now; returns once that is on disk.

        Args:
            token_id: Of the token.
            record: Told of the revoked token before it is on disk; what it raises, nothing ended.

        Raises:
            TokenError: There is none of that id; nothing was recorded.
            SecurityError: What is at the path is no plain file.
        """
        with self._changing() as tokens:
            found = next((token for token in tokens if token.id == token_id), None)
            if found is None:
                raise TokenError(
                    f"There is no token {token_id!r}; list the tokens to see their ids."
                )
            ended = found.revoked_at or datetime.now(UTC).isoformat(timespec="seconds")
            revoked = replace(found, revoked_at=ended)
            if record is not None:
                record(revoked)
            self._write([revoked if token is found else token for token in tokens])
        return revoked

    def tokens(self) -> list[Token]:
        """Returns what is kept of every token.

        Raises:
            SecurityError: The file is no token file.
        """
        if not self._refresh():
            return []
        return list(self._by_hash.values())

    def authenticate(self, secret: str, *, audience: str, now: datetime | None = None) -> Principal:
        """Returns who holds a token.

        Args:
            secret: As the holder sent it.
            audience: The service that asks.
            now: None: now.

        Raises:
            TokenError: It is malformed, unknown, revoked, expired or for another service. The
                message has no part of it.
            SecurityError: The file is missing, or no token file.
        """
        if not _FORM.fullmatch(secret):
            raise TokenError(
                f"The token is malformed; expected {PREFIX!r} and 43 letters, digits, '-' or '_'."
            )
        if not self._refresh():
            raise self._unreadable("there is no such file")
        # The look-up is by a keyed hash, so its time says nothing about a token.
        found = (self._by_hash.get(_hash(key, secret)) for key in self._keys)
        token = next((each for each in found if each is not None), None)
        if token is None:
            raise TokenError("The token is unknown; ask for a new one.")
        if token.revoked_at is not None:
            raise TokenError(f"Token {token.id} was revoked on {token.revoked_at}; get a new one.")
        if (now or datetime.now(UTC)) >= datetime.fromisoformat(token.expires_at):
            raise TokenError(f"Token {token.id} expired on {token.expires_at}; get a new one.")
        if token.audience != audience:
            raise TokenError(
                f"Token {token.id} is for {token.audience!r}, and this is {audience!r}; use the "
                "token of this service."
            )
        return Principal(token.name, frozenset(token.roles))

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """Yields the tokens, which nobody else changes until the block ends."""
        # Before the lock, which would stay behind beside it.
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path))
        if self.path.exists() and not self.path.is_file():
            raise SecurityError(
                f"{str(self.path)!r} is no plain file; expected a file of tokens, or a new name."
            )
        with exclusive(self.path):
            yield self.tokens()

    def _refresh(self) -> bool:
        """Reads the file if it changed; returns whether there is one."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._damage, self._by_hash = None, "", {}
            return False
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            self._stamp, self._by_hash = None, {}
            try:
                content = read_plain(self.path)
            except OSError as error:  # Of the moment: nothing about the file need change.
                raise self._unreadable(str(error)) from error
            self._take(content)
            # Another write within one tick of the file system's clock would not show.
            if abs(time.time() - status.st_mtime) >= _TICK_S:
                self._stamp = stamp
        if self._damage:
            raise self._unreadable(self._damage)
        return True

    def _take(self, content: bytes) -> None:
        self._damage = ""
        try:
            self._by_hash = {token.hash: token for token in _parsed(content)}
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            self._damage = str(error)

    def _unreadable(self, why: str) -> SecurityError:
        return SecurityError(
            f"The token file {str(self.path)!r} cannot be read ({why}); nobody is let in until it "
            "is restored from a copy."
        )

    def _write(self, tokens: Iterable[Token]) -> None:
        content = {"schema": SCHEMA, "tokens": [asdict(token) for token in tokens]}
        write_durably(self.path, canonical_json(content))
        self._stamp = None


def _parsed(content: bytes) -> list[Token]:
    """Returns the tokens in a file; raises KeyError, TypeError, ValueError or RecursionError."""
    document = json.loads(content)
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']!r}")
    tokens = []
    for entry in document["tokens"]:
        token = Token(**{**entry, "roles": tuple(entry["roles"])})
        texts = [*token.roles, *(getattr(token, name) for name in _TEXTS)]
        if token.revoked_at is not None:
            texts.append(token.revoked_at)
        if not isinstance(entry["roles"], list) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"token {str(token.id)[:40]!r} has a value of another type")
        if datetime.fromisoformat(token.expires_at).tzinfo is None:
            raise ValueError("an end without a time zone")
        tokens.append(token)
    return tokens


def _hash(key: bytes, secret: str) -> str:
    return hmac.digest(key, secret.encode(), "sha256").hex()
